"""GPTQ of one layer, and the column-by-column loop that it must give the same codes as: seconds, and how many codes differ.

python benchmarks/gptq_speed.py                # 4096 x 4096 on a GPU, 1024 x 1024 on a CPU
python benchmarks/gptq_speed.py --size 2048
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from clocks import spent
from record import print_table, write_result

from llmlab.obs import inverse_factor
from llmlab.quantization.gptq import gptq_quantize
from llmlab.quantization.integer import quantize_groups

SEED = 0
BITS, GROUP_SIZE, DAMP = 4, 128, 0.1
REPEATS = 3


def layer(size, device):
    """A weight, and H of inputs whose channels share directions and differ in size."""
    generator = torch.Generator(device).manual_seed(SEED)
    weight = torch.randn(size, size, generator=generator, device=device)
    mixing = torch.randn(size, size, generator=generator, device=device) / size**0.5 + torch.eye(size, device=device)
    spread = torch.logspace(-1, 0.5, size, device=device)[torch.randperm(size, generator=generator, device=device)]
    x = torch.randn(4 * size, size, generator=generator, device=device) @ mixing * spread
    return weight, x.T @ x / len(x)


def column_by_column(weight, hessian):
    """Algorithm 1 of the paper without its blocks: the rest of the matrix is updated behind every column."""
    order = hessian.diagonal().argsort(descending=True)
    factor = inverse_factor(hessian[order][:, order], DAMP)
    grid = quantize_groups(weight, BITS, GROUP_SIZE).scale.float().repeat_interleave(GROUP_SIZE, 1)[:, order]
    w, codes, highest = weight[:, order], torch.empty_like(weight), 2 ** (BITS - 1) - 1
    for j in range(weight.shape[1]):
        codes[:, j] = (w[:, j] / grid[:, j]).round().clamp(-highest - 1, highest)
        error = (w[:, j] - codes[:, j] * grid[:, j]) / factor[j, j]
        w[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    in_place = torch.empty_like(codes)
    in_place[:, order] = codes
    return in_place.to(torch.int8)


def gptq_rows(device, size):
    """Seconds of both ways, alternated; the share of codes that differ; how the outputs' errors compare."""
    weight, hessian = layer(size, device)
    ways = {
        "column by column": lambda: column_by_column(weight, hessian),
        "gptq_quantize": lambda: gptq_quantize(weight, hessian, BITS, GROUP_SIZE, damp=DAMP).codes,
        "factor alone": lambda: inverse_factor(hessian, DAMP),
    }
    found = {name: way() for name, way in ways.items()}  # and warm up
    samples = {name: [] for name in ways}
    for repeat in range(REPEATS):
        for name in list(ways) if repeat % 2 == 0 else list(ways)[::-1]:
            samples[name].append(spent(device, ways[name], 1))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    plain = quantize_groups(weight, BITS, GROUP_SIZE)
    scale = plain.scale.float().repeat_interleave(GROUP_SIZE, 1)

    def error(codes):
        d = weight - codes * scale
        return float(((d @ hessian) * d).sum().sqrt())

    rows = []
    for name, values in samples.items():
        row = {"way": name, "size": size, "seconds": medians[name], "samples": values,
               "times faster": medians["column by column"] / medians[name]}  # fmt: skip
        if name != "factor alone":
            row["codes that differ"] = float((found[name] != found["column by column"]).float().mean())
            row["error over rounding's"] = error(found[name]) / error(plain.codes)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int)
    args = parser.parse_args()
    rows = gptq_rows(args.device, args.size or (4096 if args.device == "cuda" else 1024))
    print_table(rows, ["way", "size", "seconds", "times faster", "codes that differ", "error over rounding's"])
    print(write_result("gptq_speed", args.device, [SEED], {"gptq": rows}))


if __name__ == "__main__":
    main()
