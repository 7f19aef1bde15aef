"""Quantized SmolLM2-135M: held-out perplexity and stored bytes by method and bits, the same windows of the same text for all.

The linear layers of the blocks are quantized; embeddings (which are the head too) and norms stay in fp32. Peer in the same
run: bitsandbytes' own layers, put where transformers' BitsAndBytesConfig puts them.

    python benchmarks/quantization.py                                # every row: about 40 minutes on 2 CPU cores
    python benchmarks/quantization.py --resume                         # the rows that a run cut short has left
    python benchmarks/quantization.py --method round nf4 --windows 2   # some of the rows, printed and not kept
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from perplexity import windows_of
from record import commit, device_name, print_table, result_file, write_result
from torch import nn
from torch.nn import functional as F

from llmlab.calibration import calibration_windows
from llmlab.checkpoint import load_model
from llmlab.quantization import METHODS, QuantizedLinear, quantize_groups, quantize_model
from llmlab.quantization.models import linear_layers, model_bytes
from llmlab.text import corpus_hash

SEED = 0
LENGTH = 512
GROUP = 64
# method, bits, group size and other settings
ROWS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("absmax", 8, GROUP, {}),
    ("zero_point", 8, GROUP, {}),
    ("round", 8, GROUP, {}),
    ("int8", 8, GROUP, {}),
    ("llm.int8", 8, GROUP, {}),
    ("bitsandbytes llm.int8", 8, GROUP, {}),
    ("fp8", 8, GROUP, {}),
    ("round", 4, 32, {"symmetric": False, "float_minimum": True}),
    ("round", 4, GROUP, {}),
    ("round", 4, GROUP, {"symmetric": False}),
    ("nf4", 4, GROUP, {}),
    ("nf4", 4, GROUP, {"double_quantization": False}),
    ("bitsandbytes nf4", 4, GROUP, {}),
    ("fp4", 4, GROUP, {}),
    ("round", 3, GROUP, {}),
    ("round", 3, GROUP, {"symmetric": False}),
    # what looks at a text, or takes long
    ("smooth", 8, GROUP, {}),
    ("awq", 4, GROUP, {}),
    ("awq", 3, GROUP, {}),
    ("gptq", 4, GROUP, {}),
    ("gptq", 3, GROUP, {}),
    ("gptq", 4, GROUP, {"clip": False}),
    ("gptq", 3, GROUP, {"clip": False}),
    ("awq+gptq", 4, GROUP, {"symmetric": False}),
    ("awq+gptq", 3, GROUP, {"symmetric": False}),
    ("half_quadratic", 4, GROUP, {}),
    ("half_quadratic", 3, GROUP, {}),
    ("awq+gptq", 4, GROUP, {}),
    ("awq+gptq", 3, GROUP, {}),
]


@torch.no_grad()
def window_losses(model: Any, windows: torch.Tensor, batch: int = 4) -> list[float]:
    """Mean nats a token of each window, each token predicted from those before it in its window."""
    device = next(model.parameters()).device
    found: list[float] = []
    for token_ids in windows.to(device).split(batch):
        logits = model(token_ids).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten(), reduction="none")
        found += losses.view(len(token_ids), -1).mean(1).tolist()
    return found


def put_peers(model: nn.Module, name: str) -> None:
    """bitsandbytes' layers in the place of the blocks' linear ones."""
    import bitsandbytes as peer

    for path, linear in linear_layers(model).items():
        shape = linear.in_features, linear.out_features
        if name == "bitsandbytes nf4":
            layer = peer.nn.Linear4bit(*shape, bias=False, quant_type="nf4", compress_statistics=True)
            layer.weight = peer.nn.Params4bit(
                linear.weight.detach(), requires_grad=False, quant_type="nf4", module=layer
            )
        else:
            layer = peer.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0)
            layer.weight = peer.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.to(linear.weight.device).train(linear.training))


def reproduced(linear: dict[str, torch.Tensor], group_size: int) -> int:
    """Layers of which int4 with a float minimum gives every weight again, to the last bit."""
    return sum(
        torch.equal(quantize_groups(weight, 4, group_size, False, True).dequantize(), weight)
        for weight in linear.values()
    )


def measure(
    row: tuple[str, int, int, dict[str, Any]], device: str, test: torch.Tensor, calibration: torch.Tensor
) -> dict[str, Any]:
    method, bits, group_size, options = row
    model, _ = load_model("smollm2-135m", device)
    num_weights = sum(linear.weight.numel() for linear in linear_layers(model).values())
    begun = time.perf_counter()
    if method.startswith("bitsandbytes"):
        put_peers(model, method)
    else:
        text = calibration if METHODS[method].solve is not None else None
        quantize_model(model, method, bits, group_size, text, **options)
    seconds = time.perf_counter() - begun
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    linear_bytes = sum(module.num_bytes for module in quantized) or None
    return {
        "method": method, "bits": bits, "group_size": group_size, "options": options,
        "bits_per_weight": linear_bytes * 8 / num_weights if linear_bytes else None,
        "model_bytes": model_bytes(model) if linear_bytes else None, "seconds": seconds, "commit": commit(),
        "window_losses": window_losses(model, test),
    }  # fmt: skip


def perplexity_table(args: argparse.Namespace, keep: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The table and what it was measured on; ``keep`` gets it behind each row, so that a run cut short leaves what it has."""
    model, tokenizer = load_model("smollm2-135m", args.device)
    test = windows_of(tokenizer, "test", args.windows, LENGTH)
    calibration = calibration_windows(tokenizer, windows=args.calibration, length=LENGTH, seed=SEED)
    linear = {name: layer.weight.detach() for name, layer in linear_layers(model).items()}
    exact = {str(size): reproduced(linear, size) for size in (32, 64)}
    print(f"int4 with a float minimum gives {exact} of {len(linear)} layers again, by group size", flush=True)
    rows: list[dict[str, Any]] = [{
        "method": "float32", "bits": 32, "group_size": None, "options": {}, "bits_per_weight": 32.0,
        "model_bytes": model_bytes(model), "seconds": 0.0, "commit": commit(), "window_losses": window_losses(model, test),
    }]  # fmt: skip
    wanted = [row for row in ROWS if args.method is None or row[0] in (*args.method, "round")]
    found = {
        "perplexity": rows,
        "layers_reproduced": {"of": len(linear), "by_group_size": exact},
        "setting": {
            "model": "smollm2-135m", "corpus": corpus_hash(), "test_windows": len(test), "length": LENGTH,
            "calibration_windows": args.calibration, "rows_to_measure": len(wanted) + 1,
        },
    }  # fmt: skip
    del model, linear
    kept = rows_of_file(args.device, found["setting"], rows[0]) if args.resume else {}
    for row in wanted:
        rows.append(kept.get(name_of(row)) or measure(row, args.device, test, calibration))
        compare(rows)
        print({k: v for k, v in rows[-1].items() if k != "window_losses"}, flush=True)
        keep(found)
    return found


def name_of(row: tuple[str, int, int, dict[str, Any]]) -> str:
    return repr(row)


def rows_of_file(device: str, setting: dict[str, Any], whole: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the result file, by what they measured; raises ValueError for another setting or another whole model."""
    result = json.loads(result_file("quantization", device).read_text(encoding="utf-8"))
    rows = result["perplexity"]
    if result["setting"] != setting or rows[0]["window_losses"] != whole["window_losses"]:
        raise ValueError("--resume: the result file is of another setting, or its whole model had other losses")
    names = [name_of((row["method"], row["bits"], row["group_size"], row["options"])) for row in rows]
    return dict(zip(names, rows, strict=True))


def compare(rows: list[dict[str, Any]]) -> None:
    """Each row's perplexity, and over that of the whole model and of rounding to as many bits."""
    rounding = {row["bits"]: _loss(row) for row in rows if row["method"] == "round" and not row["options"]}
    for row in rows:
        row["perplexity"] = math.exp(_loss(row))
        row["of_float32"] = math.exp(_loss(row) - _loss(rows[0]))
        row["of_rounding"] = math.exp(_loss(row) - rounding[row["bits"]]) if row["bits"] in rounding else None


def _loss(row: dict[str, Any]) -> float:
    losses: list[float] = row["window_losses"]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens to test on")
    parser.add_argument("--calibration", type=int, default=8, help="windows of 512 tokens to calibrate on")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of the result file, and measure the others"
    )
    parser.add_argument("--method", nargs="+", help="only these methods' rows, and rounding's; nothing is kept")
    args = parser.parse_args()
    print(f"{device_name(args.device)}, torch {torch.__version__}", flush=True)
    kept = args.method is None
    found = perplexity_table(
        args, lambda table: write_result("quantization", args.device, [SEED], table) if kept else None
    )
    columns = ["method", "bits", "group_size", "options", "bits_per_weight", "model_bytes", "perplexity", "of_float32",
               "of_rounding", "seconds"]  # fmt: skip
    print_table(found["perplexity"], columns)


if __name__ == "__main__":
    main()
