"""Tensor parallelism against its model: all-reduces, layers, bytes and whole models, by the number of ranks.

    python benchmarks/tensor_parallelism.py                                # every row, on the CPU or on all GPUs
    python benchmarks/tensor_parallelism.py --device cuda --ranks 1 2      # one process a GPU, over NCCL
    python benchmarks/tensor_parallelism.py layers --device cuda           # this row; the others stay in the result file

Ranks on a CPU have a thread each and share its cores, so more ranks than cores wait for each other: those rows are a check
of the code and of the communication's model. Weights are random, in the real model's shape. Predictions are made of what the same run measured: the read
bandwidth is that of a sum over 4 GiB (CPU: 256 MiB), the rate of products that of 8192^3 in bfloat16 (CPU: 1024^3 in
float32), each with all ranks at it at once; an all-reduce takes latency + 2 (t - 1)/t · bytes / bandwidth, fitted to every
second of its sizes. The peer is torch's DTensor, in the same processes, in turns. A time is the slowest rank's.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
import torch.distributed as dist
from clocks import spent, synchronize
from record import print_table, result_file, write_result
from torch import nn
from torch.nn import functional as F

from llmlab.config import MODEL_CONFIGS
from llmlab.parallel import Communicator, RankError, launch, parallelize
from llmlab.parallel.plan import Block, Column, OnPart, Row
from llmlab.roofline import decode_work, step_bytes

KiB, MiB = 2**10, 2**20
RUNS = 4  # of layers twice: the numbers of ranks go up, then down
TINY = replace(
    MODEL_CONFIGS["llama-3.2-1b"], name="a small Llama", vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_layers=4,
    num_heads=16, num_kv_heads=4, head_size=64, rotary_size=64, max_positions=512,
)  # fmt: skip
WIDER = {"cuda": torch.bfloat16, "cpu": torch.float32}
SIZES = {"cuda": [4 * KiB * 4**n for n in range(9)], "cpu": [4 * KiB * 4**n for n in range(7)]}
# shape, layers that a call runs through (so that weights do not stay in the cache)
LAYERS = {"cuda": [(MODEL_CONFIGS["llama-3-8b"], 4), (MODEL_CONFIGS["llama-2-70b"], 2)], "cpu": [(TINY, 2)]}
# what, sequences, tokens of each, backward too, calls in a sample
CASES = {
    "cuda": [("decode", 1, 1, False, 20), ("decode", 64, 1, False, 20), ("prefill", 1, 4096, False, 3), ("training", 1, 4096, True, 2)],
    "cpu": [("decode", 1, 1, False, 5), ("decode", 16, 1, False, 5), ("prefill", 1, 256, False, 1), ("training", 1, 256, True, 1)],
}  # fmt: skip
GENERATED = {"cuda": [MODEL_CONFIGS["llama-3.2-1b"], MODEL_CONFIGS["llama-3-8b"]], "cpu": [TINY]}
BATCHES, NEW = {"cuda": [1, 64], "cpu": [1, 8]}, {"cuda": 128, "cpu": 12}


# What runs on a rank


def alike(mesh):
    """The kind of device; ranks on a CPU get one thread, however many they are."""
    if mesh.device_type == "cpu":
        torch.set_num_threads(1)
    return mesh.device_type


def seconds_of(device, call, times):
    """Seconds of a call, over so many, from a moment at which all ranks are ready."""
    dist.barrier()
    return spent(device, call, times)


def graphed(call):
    """The call as a CUDA graph: what it takes without the host's launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def limits(mesh):
    """This rank's read bandwidth and rate of products, while the others are at it too."""
    device = alike(mesh)
    held = torch.ones((2**29 if device == "cuda" else 2**25), dtype=torch.int64, device=device)
    wide = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(wide, wide, device=device, dtype=WIDER[device]) for _ in range(2))
    reads, products = [], []
    for _ in range(RUNS + 1):
        reads.append(seconds_of(device, held.sum, 3))
        products.append(seconds_of(device, lambda: a @ b, 3))
    return held.numel() * 8 / statistics.median(reads[1:]), 2 * wide**3 / statistics.median(products[1:])


def all_reduces(mesh, sizes, graphs):
    """Seconds of an all-reduce, by size, for each run."""
    device, dtype, times, found = alike(mesh), WIDER[mesh.device_type], 20, {}
    for num_bytes in sizes:
        fresh = torch.randn(num_bytes // dtype.itemsize, device=device, dtype=dtype)
        sums = fresh.clone()

        def call(sums=sums):
            dist.all_reduce(sums)

        many = 1 if num_bytes >= 64 * MiB else 5 if num_bytes >= MiB else times
        run = graphed(lambda call=call, many=many: [call() for _ in range(many)]) if graphs else call
        samples = []
        for _ in range(5 * RUNS + 1):
            sums.copy_(fresh)  # sums of sums would overflow
            samples.append(seconds_of(device, run, 1 if graphs else many) / (many if graphs else 1))
        found[num_bytes] = samples[1:]
    return found


class Attention(nn.Module):
    """Grouped queries without rotary positions and without a cache: what tensor parallelism cuts."""

    def __init__(self, config, **kind):
        super().__init__()
        D, d = config.hidden_size, config.head_size
        self.d = d
        self.q = nn.Linear(D, config.num_heads * d, bias=False, **kind)
        self.k, self.v = (nn.Linear(D, config.num_kv_heads * d, bias=False, **kind) for _ in range(2))
        self.o = nn.Linear(config.num_heads * d, D, bias=False, **kind)

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (-1, self.d)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config, **kind):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate, self.up = (nn.Linear(D, width, bias=False, **kind) for _ in range(2))
        self.down = nn.Linear(width, D, bias=False, **kind)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, config, **kind):
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(config.hidden_size, **kind) for _ in range(2))
        self.attention, self.mlp = Attention(config, **kind), MLP(config, **kind)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def stack(config, depth, mesh):
    """The same whole layers on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(*[Layer(config, device=mesh.device_type, dtype=WIDER[mesh.device_type]) for _ in range(depth)])


def our_plan(config, sequence=False):
    d = config.head_size
    plan = {
        "*.attention": Block(sequence), "*.attention.q": Column(d), "*.attention.k": Column(d, replicate=True),
        "*.attention.v": Column(d, replicate=True), "*.attention.o": Row(d, sequence), "*.mlp": Block(sequence),
        "*.mlp.gate": Column(), "*.mlp.up": Column(), "*.mlp.down": Row(1, sequence),
    }  # fmt: skip
    return plan | ({"*.attention_norm": OnPart(), "*.mlp_norm": OnPart()} if sequence else {})


def by_dtensor(layers, mesh):
    """torch's own plan; the input of layers that share one is made a DTensor once, so that its gradient is summed once."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    def shared():
        return PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))

    plan = {"attention": shared(), "mlp": shared()}
    plan |= {f"attention.{name}": ColwiseParallel() for name in "qkv"} | {"attention.o": RowwiseParallel()}
    plan |= {"mlp.gate": ColwiseParallel(), "mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    for layer in layers:
        parallelize_module(layer, mesh, plan)
    return layers


def time_layers(mesh, config, depth, cases, graphs, peers):
    """The limits of this rank at that time; and for each case the seconds of a layer, by implementation and run, and how far
    the two are apart."""
    reached = limits(mesh)
    device, found = alike(mesh), []
    models = {"llmlab": parallelize(stack(config, depth, mesh), mesh, our_plan(config))}
    if "DTensor" in peers:
        models["DTensor"] = by_dtensor(stack(config, depth, mesh), mesh) if mesh.size() > 1 else stack(config, depth, mesh)  # fmt: skip
    for what, batch, tokens, backward, times in cases:
        if graphs and backward:
            continue
        torch.manual_seed(1)
        x = torch.randn(batch, tokens, config.hidden_size, device=device, dtype=WIDER[device], requires_grad=backward)

        def call(model, x=x, backward=backward):
            with torch.set_grad_enabled(backward):
                y = model(x)
            if backward:
                y.backward(x.detach())
                model.zero_grad()
                x.grad = None
            return y

        outputs = [call(model).detach() for model in models.values()]
        apart = max(((y - outputs[0]).norm() / outputs[0].norm()).item() for y in outputs)
        runs = {
            name: graphed(lambda m=model, c=call: c(m)) if graphs else (lambda m=model, c=call: c(m))
            for name, model in models.items()
        }
        samples = {name: [] for name in runs}
        for turn in range(RUNS + 1):
            for name in list(runs)[:: 1 if turn % 2 else -1]:
                samples[name].append(seconds_of(device, runs[name], times) / depth)
        found.append((what, batch, tokens, {name: s[1:] for name, s in samples.items()}, apart))
        runs.clear()
    gc.collect()
    return reached, found


def count_bytes(mesh, config, batch, tokens):
    """What the communicator logs in one layer, forward and backward, with and without sequence parallelism."""
    found, device = [], mesh.device_type
    for sequence in (False, True):
        ranks = Communicator(mesh)
        model = parallelize(stack(config, 1, mesh), ranks, our_plan(config, sequence))
        torch.manual_seed(1)
        x = torch.randn(batch, tokens, config.hidden_size, device=device, dtype=WIDER[device])
        x = x.chunk(ranks.size, 1)[ranks.rank] if sequence else x
        y = model(x.requires_grad_())
        half = len(ranks.log)
        y.backward(torch.ones_like(y))
        for way, log in (("forward", ranks.log[:half]), ("backward", ranks.log[half:])):
            whole = [m for m in log if m.num_bytes == batch * tokens * config.hidden_size * WIDER[device].itemsize]
            kinds = {
                kind: sum(m.kind == kind for m in whole) for kind in ("all_reduce", "all_gather", "reduce_scatter")
            }
            rest = sum(m.sent_bytes for m in log if m not in whole)  # the gradients of norms that saw a part
            found.append((sequence, way, kinds, sum(m.sent_bytes for m in whole), rest))
    return found


def generate(mesh, config, batches, new, graphs):
    """Seconds for so many greedy tokens of so many sequences, for each run; and the first tokens, to be compared."""
    from llmlab.batching.policies import SplitFuse
    from llmlab.engine import Engine, SamplingParams
    from llmlab.model import Transformer
    from llmlab.parallel.decoder import ParallelTransformer

    device, found = alike(mesh), []
    if mesh.size() == 1:
        model = Transformer.from_config(config, device, WIDER[device])
    else:
        ranks = Communicator(mesh)
        with torch.device("meta"):
            model = ParallelTransformer(config, ranks)
        model = model.to(WIDER[device]).to_empty(device=device)
        if config.tied_embeddings:
            model.head.weight = model.embedding.weight
        model.fill_positions(device)
        torch.manual_seed(ranks.rank)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, 1.0 if name.startswith("embedding") else parameter.shape[1] ** -0.5)
        model.eval()
    prompt, most = 16, max(batches)
    engine = Engine(
        model, SplitFuse(2048), num_blocks=most * (-(-(prompt + new) // 16) + 1), max_num_seqs=most, max_length=prompt + new,
        prefix_caching=False, graphs=graphs,
    )  # fmt: skip
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(5, config.vocab_size, (batch, prompt), generator=generator).tolist()
        samples, tokens = [], []
        for _ in range(4):
            engine.start_over()

            def call(engine=engine, prompts=prompts, tokens=tokens):
                tokens[:] = [c.token_ids for c in engine.generate(prompts, params)]

            samples.append(seconds_of(device, call, 1))
        found.append((batch, samples[1:], tokens))
    del engine, model, call
    gc.collect()  # graphs must be gone before the ranks part
    synchronize(device)
    return found


# What the main process makes of it


def slowest(by_rank):
    """For each run the slowest rank's seconds."""
    return [max(run) for run in zip(*by_rank, strict=True)]


def ring(t, num_bytes):
    return 2 * (t - 1) / t * num_bytes


def fitted(t, medians):
    """(latency, bandwidth) with the least relative error for every second size, from the smallest on."""
    x, y = np.array([ring(t, b) for b in medians])[::2], np.array(list(medians.values()))[::2]
    weight = y
    for _ in range(50):  # relative to the prediction, so that one slow sample does not bend the line
        (latency, slope), *_ = np.linalg.lstsq(np.stack([1 / weight, x / weight], 1), y / weight, rcond=None)
        latency, slope = max(latency, 1e-9), max(slope, 1e-15)
        weight = np.sqrt(y * (latency + slope * x))
    return float(latency), 1 / float(slope)


def attempt(fn, t, *args, device):
    """What the ranks returned, or None where they failed, which is printed: graphs over ranks may not be supported."""
    try:
        return launch(fn, t, *args, device=device, timeout=240)
    except RankError as error:
        print(f"{fn.__name__} on {t} ranks failed: {error}", flush=True)
        return None


def modes(device):
    return [("eager", False), ("graph", True)] if device == "cuda" else [("eager", False)]


def row_limits(device, ranks, measured):
    rows = []
    for t in ranks:
        by_rank = launch(limits, t, device=device)
        rows.append({"ranks": t, "read_bytes_per_second": min(r for r, _ in by_rank), "product_flops": min(p for _, p in by_rank)})  # fmt: skip
    measured["limits"] = rows


def row_all_reduce(device, ranks, measured):
    rows, fits = [], []
    for t in (t for t in ranks if t > 1):
        for mode, graphs in modes(device):
            by_rank = attempt(all_reduces, t, SIZES[device], graphs, device=device)
            if by_rank is None:
                continue
            samples = {size: slowest([rank[size] for rank in by_rank]) for size in SIZES[device]}
            medians = {size: statistics.median(s) for size, s in samples.items()}
            latency, bandwidth = fitted(t, medians)
            fits.append({"ranks": t, "mode": mode, "latency_seconds": latency, "bandwidth": bandwidth})
            for at, (size, s) in enumerate(samples.items()):
                predicted = latency + ring(t, size) / bandwidth
                rows.append({
                    "ranks": t, "mode": mode, "bytes": size, "measured_seconds": medians[size], "predicted_seconds": predicted,
                    "ratio": predicted / medians[size], "used_for_fit": at % 2 == 0, "seconds": s,
                })  # fmt: skip
    measured["all_reduce"], measured["all_reduce_fits"] = rows, fits


def sums_of_run(measured, t, mode):
    """The seconds of a collective of which each rank moves so many bytes."""
    fits = [f for f in measured["all_reduce_fits"] if f["ranks"] == t]
    fit = next((f for f in fits if f["mode"] == mode), fits[0] if fits else None)
    return lambda num_bytes: fit["latency_seconds"] + num_bytes / fit["bandwidth"] if fit else 0.0


def predicted_layer(config, device, t, case, bandwidth, rate, moved):
    """The longer of reading the weights and the arithmetic, in t parts; and the sums: two, and two more backward."""
    what, batch, tokens, *_ = case
    D, d, width = config.hidden_size, config.head_size, WIDER[device].itemsize
    weights = D * d * (2 * config.num_heads + 2 * config.num_kv_heads) + 3 * D * config.intermediate_size
    T, times = batch * tokens, 3 if what == "training" else 1
    pairs = batch * tokens * (tokens + 1) // 2
    flops = times * (2 * weights * T + 4 * config.num_heads * d * pairs)
    floor = max(times * weights * width / bandwidth, flops / rate) / t
    sums = (4 if what == "training" else 2) * moved(ring(t, T * D * width)) if t > 1 else 0.0
    return floor, sums


def passes(t, config, depth, device, graphs, found):
    """Add a run of t ranks to those found: with the peer, or without it where that fails."""
    for peers in (["DTensor"], []):
        by_rank = attempt(time_layers, t, config, depth, CASES[device], graphs, peers, device=device)
        if by_rank is not None:
            found.setdefault(t, []).append(by_rank)
            return


def row_layers(device, ranks, measured):
    rows = []
    for config, depth in LAYERS[device]:
        for mode, graphs in modes(device):
            alone: dict[Any, float] = {}
            found: dict[int, list[Any]] = {}
            for t in [*ranks, *ranks[::-1]]:
                passes(t, config, depth, device, graphs, found)
            for t in (t for t in ranks if t in found):
                bandwidth, rate = (statistics.mean(min(rank[0][i] for rank in one) for one in found[t]) for i in (0, 1))
                moved = sums_of_run(measured, t, mode)
                for at, (what, batch, tokens, of_first, apart) in enumerate(found[t][0][0][1]):
                    floor, sums = predicted_layer(config, device, t, (what, batch, tokens), bandwidth, rate, moved)
                    for name in of_first:
                        both = [one for one in found[t] if name in one[0][1][at][3]]
                        samples = [s for one in both for s in slowest([rank[1][at][3][name] for rank in one])]
                        seconds = statistics.median(samples)
                        rows.append({
                            "shape": config.name, "mode": mode, "what": what, "batch": batch, "tokens": tokens, "ranks": t, "by": name,
                            "measured_seconds": seconds, "predicted_seconds": floor + sums, "of_which_sums": sums,
                            "share_of_roofline": (floor + sums) / seconds,
                            "speed_up": alone.setdefault((name, at), seconds) / seconds if 1 in ranks else None,
                            "read_bytes_per_second": bandwidth, "product_flops": rate, "apart": apart, "seconds": samples,
                        })  # fmt: skip
    measured["layers"] = rows


def row_bytes(device, ranks, measured):
    rows = []
    config, batch, tokens = LAYERS[device][0][0], 1, 256
    whole = batch * tokens * config.hidden_size * WIDER[device].itemsize
    for t in (t for t in ranks if t > 1):
        by_rank = launch(count_bytes, t, config, batch, tokens, device=device)
        assert all(rank == by_rank[0] for rank in by_rank)
        for sequence, way, kinds, num_bytes, rest in by_rank[0]:
            rows.append({
                "ranks": t, "sequence_parallel": sequence, "way": way, **kinds, "counted_bytes": num_bytes,
                "formula_bytes": 2 * ring(t, whole), "of_norms_bytes": rest,
            })  # fmt: skip
    measured["bytes"] = rows


def row_generation(device, ranks, measured):
    rows = []
    for config in GENERATED[device]:
        for mode, graphs in modes(device):
            alone: dict[int, float] = {}
            for t in ranks:
                by_rank = attempt(generate, t, config, BATCHES[device], NEW[device], graphs, device=device)
                for at, (batch, _, tokens) in enumerate(by_rank[0] if by_rank else []):
                    assert all(rank[at][2] == tokens for rank in by_rank), "the ranks chose other tokens"
                    samples = slowest([rank[at][1] for rank in by_rank])
                    seconds, new, width = statistics.median(samples), NEW[device], WIDER[device].itemsize
                    limit = next(row for row in measured["limits"] if row["ranks"] == t)
                    bandwidth, moved = limit["read_bytes_per_second"], sums_of_run(measured, t, mode)
                    sums = (2 * config.num_layers + 1) * moved(ring(t, batch * config.hidden_size * width))
                    sums += moved((t - 1) / t * batch * config.vocab_size * width)
                    reads = sum(step_bytes(config, decode_work(batch, 16 + n), width, width) for n in range(1, new + 1))
                    predicted = reads / t / bandwidth + (new * sums if t > 1 else 0.0)
                    rows.append({
                        "shape": config.name, "mode": mode, "batch": batch, "ranks": t, "new_tokens": new, "tokens_per_second": batch * new / seconds,
                        "predicted_tokens_per_second": batch * new / predicted, "share_of_roofline": predicted / seconds,
                        "speed_up": alone.setdefault(batch, seconds) / seconds if 1 in ranks else None, "seconds": samples,
                    })  # fmt: skip
    measured["generation"] = rows


ROWS = {"limits": row_limits, "all-reduce": row_all_reduce, "bytes": row_bytes, "layers": row_layers, "generation": row_generation}  # fmt: skip
TABLES = ("limits", "all_reduce", "all_reduce_fits", "bytes", "layers", "generation")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="which rows; all unless told")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.device_count() else "cpu")
    parser.add_argument("--ranks", type=int, nargs="+", help="1, 2, 4 and so on, as many as there are, unless told")
    options = parser.parse_args()
    device, most = options.device, torch.cuda.device_count() if options.device == "cuda" else 4
    ranks = sorted(options.ranks or [n for n in (1, 2, 4, 8, 16) if n <= most])
    count = max(ranks) if device == "cuda" else 1
    file = result_file("tensor_parallelism", device, count)
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    measured = {name: kept[name] for name in TABLES if name in kept}
    measured |= {"ranks": ranks, "cores": os.cpu_count(), "ranks_share_cores": device == "cpu"}
    wanted = options.rows or list(ROWS)
    if not set(ranks) <= {row["ranks"] for row in measured.get("limits", [])}:  # predictions need them
        wanted = [*{"limits", "all-reduce", *wanted}]
    for row in sorted(wanted, key=list(ROWS).index):
        start = time.perf_counter()
        ROWS[row](device, ranks, measured)
        found = measured[row.replace("-", "_")]
        print(f"\n{row} ({time.perf_counter() - start:.0f} s)")
        print_table(found, [c for c in (found[0] if found else {}) if not isinstance(found[0][c], list)])
        written = write_result("tensor_parallelism", device, [0, 1], measured, count)
    print("wrote", written, flush=True)


if __name__ == "__main__":
    main()
