"""Held-out perplexity of SmolLM2-135M by the method that chose its codes: groups of 64, the same text for all.

python benchmarks/quantized_perplexity.py                        # every row: an hour on 2 CPU cores
python benchmarks/quantized_perplexity.py --bits 3 --method gptq  # those rows, beside rounding's
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
from llmlab.quantization.layerwise import quantize_layers
from llmlab.text import corpus_hash

SEED = 0
GROUP_SIZE = 64
# method, symmetric, clipped grids
ROWS = [
    ("round", True, False),
    ("round", False, False),
    ("half_quadratic", False, False),
    ("gptq", True, False),
    ("gptq", True, True),
    ("gptq", False, True),
    ("awq", True, False),
    ("awq", True, True),
    ("awq", False, True),
    ("awq+gptq", True, True),
    ("awq+gptq", False, True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--method", nargs="+", help="rows of these methods, and rounding's")
    parser.add_argument("--symmetric", action="store_true", help="only the rows without zero points")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens to test on")
    parser.add_argument("--calibration", type=int, default=8, help="windows of 512 tokens to calibrate on")
    args = parser.parse_args()

    model, tokenizer = load_model("smollm2-135m", args.device)
    test = windows_of(tokenizer, "test", args.windows)
    calibration = calibration_windows(tokenizer, windows=args.calibration, seed=SEED)
    before = copy.deepcopy(model.state_dict())
    exact = log_perplexity(model, test)
    table = [{"method": "float32", "log perplexity": exact, "perplexity": math.exp(exact)}]
    for bits in args.bits:
        rounding = None
        for method, symmetric, clip in ROWS:
            if (args.method and method not in (*args.method, "round")) or (args.symmetric and not symmetric):
                continue
            model.load_state_dict(before)
            begun = time.perf_counter()
            quantize_layers(model, method, bits, GROUP_SIZE, calibration, symmetric=symmetric, clip=clip)
            seconds = time.perf_counter() - begun
            value = log_perplexity(model, test)
            rounding = value if rounding is None else rounding  # symmetric rounding comes first
            table.append({
                "method": method, "bits": bits, "symmetric": symmetric, "clipped": clip, "log perplexity": value,
                "perplexity": math.exp(value), "of rounding's": math.exp(value - rounding), "seconds": seconds,
            })  # fmt: skip
            print(table[-1], flush=True)
    columns = ["method", "bits", "symmetric", "clipped", "log perplexity", "perplexity", "of rounding's", "seconds"]
    print_table(table, columns)
    setting = {**vars(args), "group_size": GROUP_SIZE, "corpus": corpus_hash(), "model": "smollm2-135m"}
    print(write_result("quantized_perplexity", args.device, [SEED], {"rows": table, "setting": setting}))


if __name__ == "__main__":
    main()
