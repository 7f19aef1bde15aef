"""Quantization-aware training of SmolLM2-135M at 3 bits: what it wins back of the log-perplexity that rounding loses.

The full-precision model teaches the rounded one on the corpus's training split; perplexity is that of the test split.

    python benchmarks/quantized_training.py                       # 60 steps of 512 tokens: 15 to 40 minutes on a CPU core
    python benchmarks/quantized_training.py --steps 400 --batch 8  # on a GPU
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from perplexity import log_perplexity, windows_of
from record import print_table, write_result

from llmlab.calibration import calibration_windows
from llmlab.checkpoint import load_model
from llmlab.quantization.fake import finish_qat, prepare_qat
from llmlab.quantization.layerwise import quantize_layers
from llmlab.quantization.training import teacher_loss, train
from llmlab.text import corpus_hash

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens to test on")
    parser.add_argument("--from-rounding", action="store_true", help="start from each group's whole range, not clipped")
    args = parser.parse_args()

    model, tokenizer = load_model("smollm2-135m", args.device)
    teacher = copy.deepcopy(model)
    test = windows_of(tokenizer, "test", args.windows)
    loss_of = {"float32": log_perplexity(model, test)}
    quantize_layers(model, "round", args.bits, 64)
    loss_of["rounding"] = log_perplexity(model, test)
    model.load_state_dict(teacher.state_dict())
    print(loss_of, flush=True)

    begun = time.perf_counter()
    calibration = None if args.from_rounding else calibration_windows(tokenizer, windows=8)
    prepare_qat(model, args.bits, 64, token_ids=calibration)
    loss_of["start of training"] = log_perplexity(model, test)
    print(loss_of, flush=True)
    distil = teacher_loss(teacher)

    def loss(student, token_ids):
        with torch.autocast(args.device, torch.bfloat16):
            return distil(student, token_ids.to(args.device))

    def report(step, value):
        print(f"step {step}: {value:.4f} nats from the teacher, {time.perf_counter() - begun:.0f} s", flush=True)

    train_ids = windows_of(tokenizer, "train", None, args.length)
    losses = train(
        model, train_ids, loss, steps=args.steps, batch_size=args.batch, learning_rate=args.learning_rate, seed=SEED,
        report=report,
    )  # fmt: skip
    finish_qat(model)
    seconds = time.perf_counter() - begun
    loss_of["trained"] = log_perplexity(model, test)

    lost = loss_of["rounding"] - loss_of["float32"]
    rows = [
        {"weights": name, "log perplexity": value, "perplexity": math.exp(value), "won back": (loss_of["rounding"] - value) / lost}
        for name, value in loss_of.items()
    ]  # fmt: skip
    print_table(rows, ["weights", "log perplexity", "perplexity", "won back"])
    setting = {**vars(args), "group_size": 64, "symmetric": True, "corpus": corpus_hash(), "seconds": seconds}
    print(write_result("quantized_training", args.device, [SEED], {"rows": rows, "losses": losses, "setting": setting}))


if __name__ == "__main__":
    main()
