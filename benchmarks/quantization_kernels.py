"""Products with quantized matrices on a GPU, against cuBLAS in bfloat16, other libraries and the roofline.

    python benchmarks/quantization_kernels.py --floors          # what the roofline allows, on paper; needs no GPU
    python benchmarks/quantization_kernels.py                   # every row; tilings are tried first, and the best are used
    python benchmarks/quantization_kernels.py few many          # these rows; the others stay as they are in the result file,
                                                                # and the tilings are the best of the sweep that is in it

Each call of a graph reads another of the copies of its matrix, so that none is in the cache. Kernels take turns, forwards
and backwards; a figure is the median of the turns. Other libraries are measured where they can be imported. Floors: bytes
over the bandwidth of a sum over 4 GiB, operations over the rate of products at 8192^3 in the same dtype, of the same run.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
from quantization_peers import PEERS_FEW, PEERS_MANY
from record import RESULTS, commit, device_name, print_table, today, write_result

from llmlab.kernels import kernels_for
from llmlab.kernels.layouts import Int4Weight, Nf4Weight, pack_int4

SHAPES = [(14336, 4096), (28672, 8192)]  # rows and columns of the matrix
GROUP = 128
TURNS = 7
COPIES = 8
SQUARE = 8192
Row = dict[str, Any]
Call = Callable[[int], torch.Tensor]  # a product with one of the copies


class Rates(NamedTuple):
    """Bytes and operations a second."""

    read: float
    bfloat16: float
    float8: float
    int8: float


H100 = Rates(3.10e12, 793e12, 1404e12, 937e12)  # as measured on one with 80 GB of HBM3


def graph_of(call: Call, copies: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of a call with each copy, and the last result."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(copies):
            result = call(n)
    return graph, result


def seconds_of(replay: Callable[[], Any], times: int) -> float:
    """Mean seconds of a replay over so many, by device events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def measure(calls: dict[str, Call], copies: int, turns: int = TURNS) -> dict[str, list[float]]:
    """Seconds of a call by name, one of each turn; replays fill 20 ms."""
    graphs = {name: graph_of(call, copies)[0] for name, call in calls.items()}
    times = {name: max(1, int(0.02 / seconds_of(graph.replay, 3))) for name, graph in graphs.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name in list(graphs) if turn % 2 == 0 else reversed(list(graphs)):
            samples[name].append(seconds_of(graphs[name].replay, times[name]) / copies)
    return samples


def measured_rates() -> Rates:
    """What this card does at best."""
    held = torch.ones(2**29, dtype=torch.int64, device="cuda")
    read = statistics.median(seconds_of(held.sum, 3) for _ in range(5))
    a, b = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    one = torch.ones((), device="cuda")
    a8, b8 = (t.to(torch.float8_e4m3fn) for t in (a, b))
    ai, bi = ((t * 40).clamp(-127, 127).to(torch.int8) for t in (a, b))
    products = (
        lambda: a @ b.t(),
        lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
        lambda: torch._int_mm(ai, bi.t()),
    )
    flops = [2 * SQUARE**3 / statistics.median(seconds_of(p, 5) for _ in range(5)) for p in products]
    return Rates(held.numel() * 8 / read, *flops)


def floor(kind: str, M: int, N: int, K: int, rates: Rates, group: int = GROUP) -> float:
    """The least seconds of a product: bytes over the bandwidth or operations over the rate, whichever is longer.

    Bytes: the matrix with its scales, x and the result in bfloat16, each once; for 8 bits x is also written and read as
    codes, by a kernel of its own that nothing overlaps.
    """
    num_bytes = {"bfloat16": 2, "int4": 0.5 + 2 / group, "nf4": 0.5 + 4 / 64, "int8": 1, "float8": 1}[kind] * N * K
    outside = 2 * M * (N + K)
    rate = {"int8": rates.int8, "float8": rates.float8}.get(kind, rates.bfloat16)
    first = 3 * M * K / rates.read if kind in ("int8", "float8") else 0.0
    return first + max((num_bytes + outside) / rates.read, 2 * M * N * K / rate)


def floors(rates: Rates) -> list[Row]:
    rows = []
    for N, K in SHAPES:
        for M in (1, 16, 64, 4096):
            full = floor("bfloat16", M, N, K, rates)
            for kind in ("int4", "nf4"):
                least = floor(kind, M, N, K, rates)
                rows.append(
                    {
                        "matrix": f"{N}x{K}",
                        "M": M,
                        "kind": kind,
                        "microseconds": least * 1e6,
                        "times_bfloat16": full / least,
                    }
                )
    full = floor("bfloat16", SQUARE, SQUARE, SQUARE, rates)
    for kind in ("float8", "int8"):
        least = floor(kind, SQUARE, SQUARE, SQUARE, rates)
        rows.append(
            {
                "matrix": f"{SQUARE}^2",
                "M": SQUARE,
                "kind": kind,
                "microseconds": least * 1e6,
                "times_bfloat16": full / least,
            }
        )
    return rows


def random_int4(N: int, K: int, group: int) -> list[Int4Weight]:
    """Copies of a 4-bit matrix of random codes."""
    scales = (torch.rand(N, K // group, device="cuda") + 0.5).bfloat16() / K**0.5 / 4
    made = pack_int4(torch.randint(-8, 8, (N, K), device="cuda", dtype=torch.int8), scales)
    return [Int4Weight(made.words.clone(), made.scales.clone(), *made[2:]) for _ in range(COPIES)]


def random_nf4(N: int, K: int) -> list[Nf4Weight]:
    """Copies of an NF4 matrix of random codes; the values of its table are those of the standard."""
    table = torch.tensor(
        [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
         0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], device="cuda",
    )  # fmt: skip
    codes = torch.randint(0, 256, (N * K // 2,), device="cuda", dtype=torch.uint8)
    absmax = (torch.rand(N * K // 64, device="cuda") + 0.5) / K**0.5
    return [Nf4Weight(codes.clone(), absmax.clone(), table, N, K) for _ in range(COPIES)]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def table_of(
    samples: dict[str, list[float]], kinds: dict[str, str], M: int, N: int, K: int, rates: Rates, **more: Any
) -> list[Row]:
    medians = {name: statistics.median(found) for name, found in samples.items()}
    full = medians["cuBLAS bfloat16"]
    rows = []
    for name, seconds in medians.items():
        kind = kinds.get(name)
        least = floor(kind, M, N, K, rates, 64 if "group 64" in name else GROUP) if kind else None
        rows.append({
            "matrix": f"{N}x{K}", "M": M, "kernel": name, "microseconds": seconds * 1e6, "times_bfloat16": full / seconds,
            "floor_microseconds": least and least * 1e6, "share_of_floor": least and least / seconds, "seconds": samples[name],
            **{key: values.get(name) for key, values in more.items()},
        })  # fmt: skip
    return rows


def over(product: Callable[..., torch.Tensor], x: torch.Tensor, copies: list[Any], *rest: Any) -> Call:
    """A product of x with a copy of a matrix, as a function of the copy's number."""
    return lambda n: product(x, copies[n], *rest)


def few(rates: Rates, peers: list[str], best: dict[str, list[Any]]) -> Iterator[Row]:
    """4-bit matrices against bfloat16 ones for M rows of x."""
    for N, K in SHAPES:
        yield from few_of(N, K, rates, peers, best)
        torch.cuda.empty_cache()


def few_of(N: int, K: int, rates: Rates, peers: list[str], best: dict[str, list[Any]]) -> Iterator[Row]:
    """The same for one shape."""
    fused = kernels_for("cuda")
    full = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) / K**0.5 for _ in range(COPIES)]
    nf4, int4, int4_64 = random_nf4(N, K), random_int4(N, K, GROUP), random_int4(N, K, 64)
    counters = fused.int4_counters(N, torch.device("cuda"))
    matrices = {
        "llmlab int4": fused.dequantize_int4(int4[0]),
        "llmlab int4, group 64": fused.dequantize_int4(int4_64[0]),
        "llmlab NF4": fused.dequantize_nf4(nf4[0]),
    }
    others = [PEERS_FEW[peer](full, GROUP) for peer in peers]
    for M in (1, 16, 64, 4096):
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        calls = {
            "cuBLAS bfloat16": over(F.linear, x, full),
            "llmlab int4": over(fused.int4_linear, x, int4, None, counters),
            "llmlab int4, group 64": over(fused.int4_linear, x, int4_64, None, counters),
            "llmlab NF4": over(fused.nf4_linear, x, nf4),
        }
        errors = {name: relative(calls[name](0), F.linear(x, matrix)) for name, matrix in matrices.items()}
        if tiling := tiling_of(best, f"int4 {M} {N} {K}"):
            calls["llmlab int4, best tiling"] = over(fused.int4_linear, x, int4, None, counters, tiling)
        if M == 1 and (tiling := tiling_of(best, f"nf4 {N} {K}")):
            calls["llmlab NF4, best tiling"] = over(fused.nf4_linear, x, nf4, None, tiling)
        assert max(errors.values()) < 1e-2, errors
        kinds = {name: "nf4" if "NF4" in name else "int4" for name in calls} | {"cuBLAS bfloat16": "bfloat16"}
        for other in others:
            calls |= {name: functools.partial(product, x) for name, product in other.items()}
        yield from table_of(measure(calls, COPIES), kinds, M, N, K, rates, relative_error=errors)


def many(rates: Rates, peers: list[str], best: dict[str, list[Any]]) -> Iterator[Row]:
    """8-bit products at 8192^3, the quantization of x included where the name does not say otherwise."""
    fused, copies = kernels_for("cuda"), 2  # each copy is larger than the cache
    x = torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16)
    full = [torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) / SQUARE**0.5 for _ in range(copies)]
    int8, float8 = ([fused.quantize_rows(t, dtype) for t in full] for dtype in (torch.int8, torch.float8_e4m3fn))
    rows8, rows_scale = fused.quantize_rows(x, torch.int8)
    f8, f8_scale = fused.quantize_rows(x, torch.float8_e4m3fn)

    def by_int_mm(n: int) -> torch.Tensor:
        codes, scales = fused.quantize_rows(x, torch.int8)
        return (torch._int_mm(codes, int8[n][0].t()) * scales[:, None] * int8[n][1]).bfloat16()

    def own_float8(n: int, tiling: Any = None) -> torch.Tensor:
        return fused.scaled_product(*fused.quantize_rows(x, torch.float8_e4m3fn), *float8[n], tiling=tiling)

    calls: dict[str, Call] = {
        "cuBLAS bfloat16": lambda n: x @ full[n].t(),
        "llmlab FP8 by rows": lambda n: fused.fp8_linear(x, *float8[n]),
        "llmlab FP8 by rows, own product": own_float8,
        "llmlab int8": lambda n: fused.int8_linear(x, *int8[n]),
        "_int_mm, then scales": by_int_mm,
        "quantization to int8 alone": lambda n: fused.quantize_rows(x, torch.int8)[0],
        "quantization to FP8 alone": lambda n: fused.quantize_rows(x, torch.float8_e4m3fn)[0],
        "int8 product alone": lambda n: fused.scaled_product(rows8, rows_scale, *int8[n]),
        "FP8 product alone": lambda n: fused.scaled_product(f8, f8_scale, *float8[n]),
        "_int_mm alone": lambda n: torch._int_mm(rows8, int8[n][0].t()),
    }
    if tiling := tiling_of(best, "int8"):
        calls["llmlab int8, best tiling"] = lambda n: fused.scaled_product(
            *fused.quantize_rows(x, torch.int8), *int8[n], tiling=tiling
        )
    if other := tiling_of(best, "float8"):
        calls["llmlab FP8 by rows, own product, best tiling"] = lambda n: own_float8(n, other)
    errors = {name: relative(call(0), x @ full[0].t()) for name, call in calls.items() if "llmlab" in name}
    assert max(errors.values()) < 0.05, errors
    for peer in peers:
        if peer in PEERS_MANY:
            calls |= {name: functools.partial(product, x) for name, product in PEERS_MANY[peer](full).items()}
    kinds = {"cuBLAS bfloat16": "bfloat16"} | {n: "float8" if "FP8" in n else "int8" for n in calls if "llmlab" in n}
    yield from table_of(measure(calls, copies), kinds, SQUARE, SQUARE, SQUARE, rates, relative_error=errors)


def best_of(
    name: str, tilings: list[Any], products: list[Callable[[Any], torch.Tensor]], best: dict[str, list[Any]]
) -> list[Row]:
    """Each tiling's microseconds, the fastest first, which is kept; one without room in shared memory has none.

    products: of a tiling, one for each copy of the matrix.
    """
    from triton.runtime.errors import OutOfResources

    rows: list[Row] = []
    for tiling in tilings:
        try:
            found = measure({"": functools.partial(with_tiling, products, tiling)}, len(products), 3)[""]
        except OutOfResources as error:
            rows.append({"product": name, "tiling": list(tiling), "microseconds": None, "refused": str(error)})
            continue
        rows.append(
            {"product": name, "tiling": list(tiling), "microseconds": statistics.median(found) * 1e6, "seconds": found}
        )
    rows.sort(key=lambda row: row["microseconds"] or math.inf)
    best[name] = rows[0]["tiling"]
    print(name, *(f"{row['tiling']} {row['microseconds']:.2f}" for row in rows[:5]), sep="\n  ", flush=True)
    return rows


def tiling_of(best: dict[str, list[Any]], product: str) -> Any:
    """The fastest tiling of a product that was found, here or in a run before; None where none was looked for."""
    from llmlab.kernels.int4 import Int4Tiling
    from llmlab.kernels.nf4 import Nf4Tiling
    from llmlab.kernels.rowwise import ProductTiling

    kind = {"int4": Int4Tiling, "nf4": Nf4Tiling}.get(product.split()[0], ProductTiling)
    return kind(*best[product]) if product in best else None


def with_tiling(products: list[Callable[[Any], torch.Tensor]], tiling: Any, n: int) -> torch.Tensor:
    return products[n](tiling)


def sweep(rates: Rates, peers: list[str], best: dict[str, list[Any]]) -> Iterator[Row]:
    """Tilings of each product."""
    from llmlab.kernels.rowwise import ProductTiling

    for N, K in SHAPES:
        yield from sweep_few(N, K, best)
        torch.cuda.empty_cache()
    fused = kernels_for("cuda")
    full = torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16)
    products = [
        ProductTiling(*tiling)
        for tiling in (
            (128, 256, 128, 8, 4, 8), (128, 256, 128, 8, 3, 8), (128, 256, 128, 8, 4, 16), (256, 128, 128, 8, 4, 8),
            (128, 128, 128, 4, 3, 8), (128, 128, 128, 8, 3, 8), (128, 128, 256, 8, 3, 8), (128, 256, 64, 8, 4, 8),
            (128, 256, 256, 8, 2, 8), (256, 128, 256, 8, 2, 8),
        )
    ]  # fmt: skip
    for name, dtype in (("int8", torch.int8), ("float8", torch.float8_e4m3fn)):
        codes, scales = fused.quantize_rows(full, dtype)
        product = functools.partial(fused.scaled_product, codes, scales, codes, scales, None, torch.bfloat16)
        yield from best_of(name, products, [product] * 2, best)


def sweep_few(N: int, K: int, best: dict[str, list[Any]]) -> Iterator[Row]:
    """Tilings of the products with a 4-bit matrix of one shape."""
    from llmlab.kernels.int4 import Int4Tiling
    from llmlab.kernels.nf4 import Nf4Tiling

    fused = kernels_for("cuda")
    int4, nf4 = random_int4(N, K, GROUP), random_nf4(N, K)
    counters = fused.int4_counters(N, torch.device("cuda"))
    shapes = {  # rows, warps, stages, ahead, least
        1: [(64, 4, 4, 2, 8), (64, 4, 3, 2, 8), (64, 4, 5, 2, 8), (64, 4, 4, 0, 8), (64, 4, 4, 4, 8), (64, 4, 4, 2, 16),
            (64, 2, 4, 2, 8), (128, 4, 3, 2, 8), (128, 8, 4, 2, 8)],
        16: [(64, 4, 4, 2, 8), (64, 4, 3, 2, 8), (64, 4, 4, 0, 8), (128, 4, 3, 2, 8), (128, 4, 4, 2, 8), (128, 8, 4, 2, 8),
             (64, 2, 4, 2, 8)],
        64: [(128, 8, 3, 2, 8), (128, 8, 2, 2, 8), (128, 8, 4, 2, 8), (64, 4, 2, 2, 8), (64, 4, 3, 2, 8), (128, 8, 3, 0, 8)],
    }  # fmt: skip
    for M, choices in shapes.items():
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        tilings = [Int4Tiling(rows, parts, *rest) for rows, *rest in choices for parts in (1, 2, 3, 4, 6, 8)]
        products = [functools.partial(fused.int4_linear, x, weight, None, counters) for weight in int4]
        yield from best_of(f"int4 {M} {N} {K}", tilings, products, best)
    x = torch.randn(1, K, device="cuda", dtype=torch.bfloat16)
    blocks = [(words, warps) for words, warps in ((512, 4), (256, 4), (512, 8)) if words <= K // 8]
    lookups = [Nf4Tiling(rows, words, warps, True) for rows in (4, 8, 16) for words, warps in blocks]
    lookups.append(Nf4Tiling(4, 512, 4, False))
    yield from best_of(
        f"nf4 {N} {K}", lookups, [functools.partial(fused.nf4_linear, x, weight, None) for weight in nf4], best
    )


ROWS: dict[str, Callable[[Rates, list[str], dict[str, Any]], Iterator[Row]]] = {
    "sweep": sweep,
    "few": few,
    "many": many,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="which rows; all unless told")
    parser.add_argument("--floors", action="store_true", help="print what the roofline of an H100 allows, and end")
    parser.add_argument(
        "--peers", nargs="*", choices=list(PEERS_FEW), help="libraries; those that can be imported unless told"
    )
    arguments = parser.parse_args()
    if arguments.floors:
        print_table(floors(H100), ["matrix", "M", "kind", "microseconds", "times_bfloat16"])
        return
    peers = arguments.peers
    if peers is None:
        peers = [name for name in PEERS_FEW if importlib.util.find_spec(name)]
    rates = measured_rates()
    limits = dict(zip(("read_bytes_per_second", "bfloat16_flops", "float8_flops", "int8_flops"), rates, strict=True))
    print(
        device_name("cuda"),
        *(f"{name} {value / 1e12:.2f}e12" for name, value in limits.items()),
        f"peers {peers}",
        sep="; ",
    )
    name = Path("quantization", f"{device_name('cuda').replace(' ', '-')}.json")
    kept = [f / name for f in (Path(os.environ.get("LLMLAB_RESULTS", RESULTS)), RESULTS) if (f / name).exists()]
    before = json.loads(kept[0].read_text(encoding="utf-8")) if kept else {}
    rows, runs = before.get("rows", {}), before.get("runs", {})
    best: dict[str, list[Any]] = {}
    for line in rows.get("sweep", []):
        best.setdefault(line["product"], line["tiling"])  # the fastest comes first
    for row in arguments.rows or list(ROWS):
        torch.manual_seed(0)
        found = []
        for line in ROWS[row](rates, peers, best):
            found.append(line)
            if row != "sweep":
                share = line["share_of_floor"]
                print(
                    f"{line['matrix']}, M = {line['M']}: {line['kernel']}: {line['microseconds']:.2f} µs, {line['times_bfloat16']:.2f} times "
                    f"bfloat16{f', {share:.2f} of the floor' if share else ''}", flush=True,
                )  # fmt: skip
        rows[row], runs[row] = found, {"commit": commit(), "date": today(), "peers": peers, **limits}
        write_result("quantization", "cuda", [0], {"runs": runs, "rows": rows})


if __name__ == "__main__":
    main()
