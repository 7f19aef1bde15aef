"""The inference engine against its roofline, against transformers, and against itself with one part turned off.

    python benchmarks/engine.py                       # every row that this device can run
    python benchmarks/engine.py throughput-1b decode  # these rows; the others stay as they are in the result file

Weights are random, in the real model's shape: speed does not depend on their values. The workload is lognormal, as
`workload` says. Rates are of output tokens that were asked for; shares are of the roofline of the same run: the read
bandwidth is that of a sum over 4 GiB, the rate of products that of 8192^3 in bfloat16.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from record import RESULTS, commit, device_name, print_table, today, write_result

from llmlab.batching import Metrics, Request
from llmlab.batching.policies import OrcaBatching, PrefillFirst, SplitFuse
from llmlab.batching.workload import AzureLengths
from llmlab.config import MODEL_CONFIGS, ModelConfig
from llmlab.engine import Engine, SamplingParams
from llmlab.kernels import kernels_for
from llmlab.model import Transformer
from llmlab.roofline import Work, decode_work, prefill_work, step_bytes, step_flops

CONFIGS = {
    "1b": MODEL_CONFIGS["llama-3.2-1b"],
    "8b": replace(MODEL_CONFIGS["llama-3-8b"], name="llama-3.1-8b", max_positions=16384),
    "qwen3-0.6b": MODEL_CONFIGS["qwen3-0.6b"],
}
REPEATS = 3
Row = dict[str, Any]


def workload(n: int, scale: int = 1) -> tuple[list[list[int]], list[int]]:
    """Prompts and output lengths: lognormal with means 220 and 190, clipped."""
    rng = np.random.default_rng(0)

    def lengths(mean: float, sigma: float, low: int, high: int) -> Any:
        return np.clip(rng.lognormal(np.log(mean) - sigma * sigma / 2, sigma, n), low, high).astype(int) // scale

    prompts, outputs = lengths(220, 1.0, 16, 1024), lengths(190, 0.9, 8, 512)
    return [rng.integers(5, 32000, max(1, k)).tolist() for k in prompts], [max(1, int(k)) for k in outputs]


def params(outputs: list[int]) -> list[SamplingParams]:
    return [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in outputs]


class Device:
    """What the card does at best, measured in this run."""

    def __init__(self) -> None:
        held = torch.ones(2**29, dtype=torch.int64, device="cuda")
        self.bandwidth = held.numel() * 8 / seconds_of(held.sum)
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.flops = 2 * 8192**3 / seconds_of(lambda: a @ b)

    def seconds(self, config: ModelConfig, steps: list[Work]) -> float:
        """The roofline of a whole run with perfect overlap: all its bytes, or all its operations."""
        num_bytes = sum(step_bytes(config, work) for work in steps)
        return max(num_bytes / self.bandwidth, sum(step_flops(config, work) for work in steps) / self.flops)


def seconds_of(call: Callable[[], Any], times: int = 10) -> float:
    """Median seconds of a call, by device events."""
    found = []
    for n in range(times + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if n >= 3:
            found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)


def least_work(config: ModelConfig, prompts: list[int], outputs: list[int]) -> list[Work]:
    """What a run cannot do without: each token once, each key as often as a token sees it, and the weights for as many steps
    as the longest output has. One ``Work`` a step, of which the first has all the prompts."""
    steps = [Work(sum(prompts), sum(prompts), sum(p * (p + 1) // 2 for p in prompts), len(prompts))]
    for n in range(1, max(outputs)):
        contexts = [p + n for p, out in zip(prompts, outputs, strict=True) if out > n]
        steps.append(Work(len(contexts), sum(contexts), sum(contexts), len(contexts)))
    return steps


@contextmanager
def model(name: str) -> Iterator[Transformer]:
    """Random bfloat16 weights in a shape, for as long as they are needed."""
    made = Transformer.from_config(CONFIGS[name], "cuda", torch.bfloat16)
    yield made
    del made
    release()


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def generate_seconds(engine: Engine, prompts: list[list[int]], outputs: list[int]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    completions = engine.generate(prompts, params(outputs))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert [len(c.token_ids) for c in completions] == outputs, {c.finish_reason for c in completions}
    return seconds


def throughput(name: str, device: Device) -> list[Row]:
    """Offline generation of the lognormal workload."""
    prompts, outputs = workload(384)
    with model(name) as made:
        engine = Engine(made, SplitFuse(2048), max_num_seqs=384, max_length=2048)
        generate_seconds(engine, prompts, outputs)
        samples = []
        for _ in range(REPEATS):
            engine.start_over()  # no prefix of the run before
            samples.append(generate_seconds(engine, prompts, outputs))
        del engine
    seconds = statistics.median(samples)
    floor = device.seconds(CONFIGS[name], least_work(CONFIGS[name], [len(p) for p in prompts], outputs))
    return [{
        "model": CONFIGS[name].name, "requests": 384, "tokens_per_second": sum(outputs) / seconds, "seconds": samples,
        "roofline_tokens_per_second": sum(outputs) / floor, "share_of_roofline": floor / seconds,
    }]  # fmt: skip


def uniform(device: Device) -> list[Row]:
    """256 requests, prompts and outputs uniform in 100..1024, in Qwen3-0.6B's shape."""
    rng = np.random.default_rng(0)
    lengths, outputs = rng.integers(100, 1025, 256).tolist(), rng.integers(100, 1025, 256).tolist()
    prompts = [rng.integers(5, 32000, n).tolist() for n in lengths]
    config = CONFIGS["qwen3-0.6b"]
    with model("qwen3-0.6b") as made:
        engine = Engine(made, SplitFuse(2048), max_num_seqs=256, max_length=2048)
        generate_seconds(engine, prompts[:32], [64] * 32)
        samples = []
        for _ in range(REPEATS):
            engine.start_over()
            samples.append(generate_seconds(engine, prompts, outputs))
        del engine
    seconds, floor = statistics.median(samples), device.seconds(config, least_work(config, lengths, outputs))
    return [{
        "model": config.name, "requests": 256, "tokens_per_second": sum(outputs) / seconds, "seconds": samples,
        "roofline_tokens_per_second": sum(outputs) / floor, "share_of_roofline": floor / seconds,
    }]  # fmt: skip


def begin_decoding(engine: Engine, batch: int, context: int, tokens: int) -> list[Request]:
    """Requests that have their prompts computed and decode on."""
    rng = np.random.default_rng(1)
    asked = [engine.add(rng.integers(5, 32000, context).tolist(), params([tokens])[0]) for _ in range(batch)]
    while any(r.computed_tokens < r.num_prompt for r in asked):
        engine.step()
    for _ in range(5):
        engine.step()
    return asked


def decode(device: Device) -> list[Row]:
    """One decode step by batch, against the bytes of weights and keys."""
    rows = []
    for name, cases in (
        ("1b", [(1, 128), (8, 256), (64, 256), (256, 256)]),
        ("8b", [(1, 128), (8, 256), (64, 256), (256, 256)]),
    ):
        config = CONFIGS[name]
        with model(name) as made:
            engine = Engine(made, SplitFuse(2048), max_num_seqs=256, max_length=2048)
            for batch, context in cases:
                begin_decoding(engine, batch, context, 110)
                samples, work = [], []
                for _ in range(4):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(20):
                        work.append(engine.state.running[0].num_tokens)
                        engine.step()
                    torch.cuda.synchronize()
                    samples.append((time.perf_counter() - start) / 20)
                seconds = statistics.median(samples)
                floor = step_bytes(config, decode_work(batch, round(statistics.mean(work)))) / device.bandwidth
                rows.append({
                    "model": config.name, "batch": batch, "context": context, "step_ms": 1e3 * seconds,
                    "roofline_ms": 1e3 * floor, "share_of_roofline": floor / seconds, "seconds": samples,
                })  # fmt: skip
                while engine.has_work:
                    engine.step()
            del engine
    return rows


def host(device: Device) -> list[Row]:
    """The host's time of a decode step, from the tokens' arrival to the next launch, and how long the device waits for it."""
    rows = []
    for name in ("1b", "8b"):
        with model(name) as made:
            engine = Engine(made, SplitFuse(2048), max_num_seqs=256, max_length=2048)
            begin_decoding(engine, 256, 256, 500)
            engine.times = []
            for _ in range(300):
                engine.step()
            times = engine.times[2:]
            engine.times, engine.runner.timed = None, True  # apart: to make events takes the host some 50 us a step
            steps = []
            for _ in range(100):
                engine.step()
                steps.append(engine.launched)
            torch.cuda.synchronize()
            steps = steps[2:]
            gaps = [a.ready.elapsed_time(b.begun) for a, b in itertools.pairwise(steps)]  # type: ignore[union-attr]
            whole = steps[0].ready.elapsed_time(steps[-1].begun)  # type: ignore[union-attr]
            spent = [1e6 * (b.commit + a.schedule + a.launch) for a, b in zip(times[1:], times, strict=False)]
            rows.append({
                "model": CONFIGS[name].name, "sequences": 256, "host_us_p50": float(np.percentile(spent, 50)),
                "host_us_p99": float(np.percentile(spent, 99)), "idle_share": sum(max(0.0, g) for g in gaps) / whole,
                **{f"{part}_us_p50": 1e6 * statistics.median(getattr(t, part) for t in times) for part in ("schedule", "launch", "commit")},
                "host_us": spent,
            })  # fmt: skip
            engine.runner.timed = False
            for request in [*engine.state.running]:
                engine.abort(request)
            engine.drain()
            del engine, steps
    return rows


def kernel_seconds(
    heads: int, kv_heads: int, d: int, batch: int, length: int, block_size: int
) -> dict[str, list[float]]:
    """Decode attention over blocks in a row, which the kernel is told, and over scattered ones; caches are rotated."""
    ops, per_row, copies = kernels_for("cuda"), -(-length // block_size), 6
    pool = (batch * per_row + 1, kv_heads, block_size, d)
    pools = [[torch.randn(pool, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(copies)]
    order = {"contiguous": torch.arange(batch * per_row), "paged": torch.randperm(batch * per_row)}
    tables = {kind: found.to("cuda", torch.int32).view(batch, per_row) for kind, found in order.items()}
    q = torch.randn(batch, heads, d, device="cuda", dtype=torch.bfloat16)
    rows, out = torch.arange(batch, device="cuda", dtype=torch.int32), torch.empty_like(q)
    lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)

    def call(kind: str) -> None:
        for k, v in pools:
            ops.decode_attention(q, k, v, tables[kind], rows, lengths, d**-0.5, out, 1, None, kind == "paged")

    graphs = {}
    for kind in order:
        call(kind)
        graphs[kind] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[kind]):
            call(kind)
    samples: dict[str, list[float]] = {kind: [] for kind in order}
    for turn in range(6):
        for kind in sorted(order, reverse=bool(turn % 2)):
            samples[kind].append(seconds_of(graphs[kind].replay) / copies)
    return samples


def paged_kernel(device: Device) -> list[Row]:
    """What paging costs the decode kernel, by block size."""
    rows = []
    for name, heads, kv_heads, d, batch, length in (
        ("llama-3.2-1b", 32, 8, 64, 256, 300), ("llama-3.1-8b", 32, 8, 128, 64, 300), ("llama-3.1-8b", 32, 8, 128, 32, 2600),
    ):  # fmt: skip
        for block_size in (8, 16, 32):
            samples = kernel_seconds(heads, kv_heads, d, batch, length, block_size)
            release()
            medians = {kind: statistics.median(found) for kind, found in samples.items()}
            num_bytes = 2 * batch * length * kv_heads * d * 2
            rows.append({
                "model": name, "batch": batch, "keys": length, "block_size": block_size,
                "contiguous_us": 1e6 * medians["contiguous"], "paged_us": 1e6 * medians["paged"],
                "paged_share_of_contiguous": medians["contiguous"] / medians["paged"],
                "share_of_bandwidth": num_bytes / medians["paged"] / device.bandwidth, "seconds": samples,
            })  # fmt: skip
    return rows


def ttft(engine: Engine, prompt: list[int]) -> float:
    """Seconds from the call to the first token."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    next(stream := engine.stream(prompt, params([2])[0]))
    seconds = time.perf_counter() - start
    stream.close()
    engine.drain()
    return seconds


def prefix(device: Device) -> list[Row]:
    """A shared prefix of 4,096 tokens: time to first token with and without a hit; and what looking for hits costs without any."""
    rng = np.random.default_rng(2)
    rows: list[Row] = []
    with model("8b") as made:
        engine = Engine(made, SplitFuse(8192), max_num_seqs=64, max_length=8192)

        ttft(engine, rng.integers(5, 32000, 4160).tolist())
        cold, warm = [], []
        for _ in range(5):
            shared = rng.integers(5, 32000, 4096).tolist()
            cold.append(ttft(engine, shared + rng.integers(5, 32000, 64).tolist()))
            warm.append(ttft(engine, shared + rng.integers(5, 32000, 64).tolist()))
        rows.append({
            "measure": "TTFT with a shared prefix of 4,096 tokens, 8B", "without_ms": 1e3 * statistics.median(cold),
            "with_ms": 1e3 * statistics.median(warm), "ratio": statistics.median(warm) / statistics.median(cold), "seconds": [cold, warm],
        })  # fmt: skip
        del engine
    prompts, outputs = workload(384)
    with model("1b") as made:
        found: dict[bool, list[float]] = {True: [], False: []}
        engines = {
            on: Engine(made, SplitFuse(2048), max_num_seqs=384, max_length=2048, prefix_caching=on, num_blocks=20_000)
            for on in found
        }
        for turn in range(7):
            for on in (True, False) if turn % 2 else (False, True):
                engines[on].start_over()
                found[on].append(generate_seconds(engines[on], prompts, outputs))
        on, off = (statistics.median(found[k][1:]) for k in (True, False))
        rows.append({
            "measure": "384 requests without a hit, 1B", "without_ms": 1e3 * off, "with_ms": 1e3 * on, "ratio": on / off,
            "seconds": [found[False], found[True]],
        })  # fmt: skip
        del engines
    return rows


def waste(device: Device) -> list[Row]:
    """KV slots allocated and not used, integrated over runs on lengths of the Azure traces; by the engine's own block tables."""
    rows: list[Row] = []
    with model("1b") as made:
        for trace in ("conversation", "code"):
            for block_size in (16, 32, 128):
                lengths = AzureLengths(trace).sample(300, seed=0)
                engine = Engine(made, SplitFuse(2048), max_num_seqs=128, max_length=16384, block_size=block_size)
                metrics, rng = Metrics(), np.random.default_rng(0)
                for prompt, output in lengths:
                    engine.add(rng.integers(5, 32000, prompt).tolist(), params([output])[0])
                while engine.has_work:
                    engine.step()
                    metrics.held(time.perf_counter(), *engine.state.slots_held())
                rows.append({"lengths": trace, "block_size": block_size, "requests": 300, "kv_waste": metrics.kv_waste})
                del engine
                release()
    return rows


ABLATIONS: dict[str, dict[str, Any]] = {
    "all of it": {}, "without CUDA graphs": {"graphs": False}, "without launching ahead": {"ahead": False},
    "without either": {"graphs": False, "ahead": False}, "without prefix caching": {"prefix_caching": False},
    "without splitting keys": {"splits": 1}, "without starting kernels early": {"early": False}, "decodes and chunks in turn": {"beside": False},
    "cuBLAS for one row too": {"few_rows": 0}, "prompts first, no mixed steps": {"policy": PrefillFirst(2048)},
}  # fmt: skip


def ablation(device: Device) -> list[Row]:
    """The 1B workload, and a decode step of one sequence, with one part turned off."""
    from llmlab.engine.runner import Runner
    from llmlab.kernels import attention, early, linear

    rows: list[Row] = []
    prompts, outputs = workload(384)
    usual = (linear.FEW_ROWS, Runner.splits, attention._beside)
    with model("1b") as made:
        for name, options in ABLATIONS.items():
            chosen = dict(options)
            linear.FEW_ROWS = chosen.pop("few_rows", usual[0])
            early.ENABLED = chosen.pop("early", True)
            if not chosen.pop("beside", True):
                attention._beside = lambda device: torch.cuda.current_stream()
            if chosen.pop("splits", None):
                Runner.splits = lambda self, rows, mixed=False: 1  # type: ignore[method-assign]
            engine = Engine(
                made,
                chosen.pop("policy", SplitFuse(2048)),
                max_num_seqs=384,
                max_length=2048,
                num_blocks=20_000,
                **chosen,
            )
            samples = []
            for _ in range(3):
                engine.start_over()
                samples.append(generate_seconds(engine, prompts, outputs))
            begin_decoding(engine, 1, 512, 70)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                engine.step()
            torch.cuda.synchronize()
            step = (time.perf_counter() - start) / 50
            rows.append({
                "engine": name, "tokens_per_second": sum(outputs) / min(samples[1:]), "one_sequence_step_ms": 1e3 * step, "seconds": samples,
            })  # fmt: skip
            linear.FEW_ROWS, Runner.splits, attention._beside, early.ENABLED = *usual, True  # type: ignore[method-assign]
            del engine
            release()
    return rows


def transformers_model(config: ModelConfig, attention: str) -> Any:
    """Random weights in the same shape, as transformers has it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_size, max_position_embeddings=16384, tie_word_embeddings=config.tied_embeddings,
        attn_implementation=attention, dtype=torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(made).eval()
    finally:
        torch.set_default_dtype(before)


def against_transformers(name: str, device: Device, slow: bool = False) -> list[Row]:
    """Ours, and transformers' continuous batching with its best settings; slow: as it comes and in static batches."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config, rows = CONFIGS[name], []
    prompts, outputs = workload(384)

    def continuous(made: Any, count: int, **settings: Any) -> list[float]:
        wanted = GenerationConfig(do_sample=False, max_new_tokens=512, eos_token_id=-1, pad_token_id=0)
        batching = ContinuousBatchingConfig(**settings)
        samples = []
        with made.continuous_batching_context_manager(
            generation_config=wanted, continuous_batching_config=batching
        ) as manager:
            for _ in range(REPEATS + 1 if count == 384 else 1):
                start = time.perf_counter()
                for prompt, output in zip(prompts[:count], outputs[:count], strict=True):
                    manager.add_request(prompt, max_new_tokens=output)
                lengths, done = [], 0
                while done < count:
                    result = manager.get_result(timeout=1)
                    if result is not None and result.is_finished():
                        lengths.append(len(result.generated_tokens))
                        done += 1
                    assert manager.is_running() or done == count
                samples.append(time.perf_counter() - start)
                assert sum(lengths) == sum(outputs[:count]), (sum(lengths), sum(outputs[:count]))
        return samples[1:] or samples

    def add(peer: str, count: int, samples: list[float]) -> None:
        rows.append({
            "engine": peer, "model": config.name, "requests": count,
            "tokens_per_second": sum(outputs[:count]) / statistics.median(samples), "seconds": samples,
        })  # fmt: skip

    made = transformers_model(config, "sdpa" if slow else "flash_attention_3")
    if slow:
        add("transformers, continuous batching as it comes (64 requests, once)", 64, continuous(made, 64))
        release()
        wide = max(len(p) for p in prompts[:64])
        padded = torch.tensor([[0] * (wide - len(p)) + p for p in prompts[:64]], device="cuda")
        mask = torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p in prompts[:64]], device="cuda")
        start, longest = time.perf_counter(), max(outputs[:64])
        made.generate(
            padded, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=False, pad_token_id=0, eos_token_id=None
        )  # fmt: skip
        add("transformers, one static batch of 64 (once)", 64, [time.perf_counter() - start])
    else:
        settings = {"use_cuda_graph": True, "use_async_batching": True}
        add(
            "transformers, continuous batching, FlashAttention-3, CUDA graphs, async",
            384,
            continuous(made, 384, **settings),
        )
    del made
    release()
    ours = throughput(name, device)[0]
    rows.append({"engine": "llmlab", **{k: ours[k] for k in ("model", "requests", "tokens_per_second", "seconds")}})
    for row in rows:
        row["ours_over_it"] = ours["tokens_per_second"] / row["tokens_per_second"]
    return rows


FORWARD_TOKENS = (16, 64, 128, 256, 512, 704, 1024, 2048, 4096, 8192)


def forward(device: Device) -> list[Row]:
    """A step that computes one whole prompt as one chunk, by its tokens, launched eagerly and as CUDA graphs; by device events."""
    rng = np.random.default_rng(3)
    rows = []
    for name in ("1b", "8b"):
        config = CONFIGS[name]
        with model(name) as made:
            for graphs in (False, True):
                most = max(FORWARD_TOKENS)
                engine = Engine(
                    made, SplitFuse(most), max_num_seqs=16, max_length=most + 16, graphs=graphs, prefix_caching=False
                )
                engine.runner.timed = True
                samples: dict[int, list[float]] = {tokens: [] for tokens in FORWARD_TOKENS}
                for turn in range(8):
                    for tokens in FORWARD_TOKENS[:: -1 if turn % 2 else 1]:
                        seconds = chunk_seconds(engine, rng.integers(5, 32000, tokens).tolist())
                        if turn > 1:  # those before warm up
                            samples[tokens].append(seconds)
                for tokens, found in samples.items():
                    seconds, work = statistics.median(found), prefill_work(1, tokens)
                    floor = max(step_bytes(config, work) / device.bandwidth, step_flops(config, work) / device.flops)
                    rows.append({
                        "model": config.name, "graphs": graphs, "tokens": tokens, "step_ms": 1e3 * seconds, "roofline_ms": 1e3 * floor,
                        "share_of_roofline": floor / seconds, "tokens_per_second": tokens / seconds, "seconds": found,
                    })  # fmt: skip
                del engine
                release()
    return rows


def chunk_seconds(engine: Engine, prompt: list[int]) -> float:
    """Device seconds of the step that computes the whole prompt, on an engine that has nothing else to do and is ``timed``."""
    engine.add(prompt, params([1])[0])
    engine.step()
    step = engine.launched
    while engine.has_work:
        engine.step()
    assert step is not None
    assert step.begun is not None
    assert step.ready is not None
    return step.begun.elapsed_time(step.ready) / 1e3


BUDGETS = (512, 704, 1024)  # tokens of a SplitFuse step in the comparison of policies


def splitfuse(device: Device) -> list[Row]:
    """400 long prompts in the 8B shape: all at once, and at 0.7 of prefill-first's saturation, under three policies."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(2600, 780, 400), 16, 6000).astype(int).tolist()
    outputs = np.clip(rng.normal(128, 38.4, 400), 4, 400).astype(int).tolist()
    prompts = [rng.integers(5, 32000, n).tolist() for n in lengths]
    gaps = rng.exponential(1.0, 400)
    rows: list[Row] = []
    policies = {
        "prefill first": (PrefillFirst(8192), {}),
        **{f"splitfuse, budget {budget}": (SplitFuse(budget), {}) for budget in BUDGETS},
        "orca, longest output reserved": (OrcaBatching(128, 8192), {"reserve_max_length": True, "max_length": 6400}),
    }  # fmt: skip
    with model("8b") as made:
        saturation = 0.0
        for name, (policy, options) in policies.items():
            engine = Engine(made, policy, **{"max_num_seqs": 128, "max_length": 6400, **options})
            generate_seconds(engine, prompts[:8], [4] * 8)
            row: Row = {"policy": name}
            if "orca" not in name:
                engine.start_over()
                seconds = generate_seconds(engine, prompts, outputs)
                row |= {"all_at_once_tokens_per_second": sum(outputs) / seconds, "all_at_once_seconds": seconds}
                saturation = saturation or 400 / seconds
            engine.start_over()
            summary = serve(engine, prompts, outputs, np.cumsum(gaps) / (0.7 * saturation))
            rows.append({**row, "requests_per_second": 0.7 * saturation, **summary})
            del engine
            release()
    first = rows[0]
    for row in rows:
        row["itl_p99_over_prefill_first"] = row["itl_p99_seconds"] / first["itl_p99_seconds"]
        row["ttft_p50_over_prefill_first"] = row["ttft_p50_seconds"] / first["ttft_p50_seconds"]
        if "all_at_once_seconds" in row:
            row["throughput_over_prefill_first"] = first["all_at_once_seconds"] / row["all_at_once_seconds"]
    return rows


def serve(engine: Engine, prompts: list[list[int]], outputs: list[int], arrivals: Any) -> dict[str, float]:
    """Requests that come by the clock; what their users saw."""
    metrics, waiting = Metrics(), list(zip(arrivals, prompts, outputs, strict=True))[::-1]
    start, asked = time.perf_counter(), {}
    while waiting or engine.has_work:
        now = time.perf_counter() - start
        while waiting and waiting[-1][0] <= now:
            arrival, prompt, output = waiting.pop()
            request = engine.add(prompt, params([output])[0])
            request.arrival = arrival
            metrics.arrived(request)
            asked[request.request_id] = request
        if not engine.has_work:
            time.sleep(max(0.0, waiting[-1][0] - now))
            continue
        taken = engine.step()
        now = time.perf_counter() - start
        for request in taken:
            metrics.token(request, now)
            if request.finish_reason:
                metrics.ended(request)
    return {k: float(v) for k, v in metrics.summary().items() if isinstance(v, int | float)}


def cpu() -> list[Row]:
    """SmolLM2 on two threads: continuous batching of up to 16 against transformers' static batches of 16."""
    from llmlab.checkpoint import load_model

    torch.set_num_threads(2)
    theirs, _ = load_model("smollm2-135m", "cpu")
    engine = Engine(Transformer.from_transformers(theirs), SplitFuse(256), num_blocks=2000, max_num_seqs=16)
    prompts, outputs = workload(48, scale=4)
    samples: dict[str, list[float]] = {"llmlab": [], "transformers": []}

    def static() -> None:
        for begin in range(0, 48, 16):
            batch, wanted = prompts[begin : begin + 16], max(outputs[begin : begin + 16])
            wide = max(map(len, batch))
            padded = torch.tensor([[0] * (wide - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p in batch])
            theirs.generate(
                padded, attention_mask=mask, max_new_tokens=wanted, min_new_tokens=wanted, do_sample=False, pad_token_id=0, eos_token_id=None
            )  # fmt: skip

    for turn in range(REPEATS):
        for name in ("llmlab", "transformers") if turn % 2 else ("transformers", "llmlab"):
            engine.start_over()
            start = time.perf_counter()
            if name == "llmlab":
                engine.generate(prompts, params(outputs))
            else:
                with torch.inference_mode():
                    static()
            samples[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in samples.items()}
    labels = {"llmlab": "llmlab, up to 16", "transformers": "transformers, static batches of 16"}
    return [
        {"engine": labels[name], "tokens_per_second": sum(outputs) / seconds, "ours_over_it": seconds / medians["llmlab"], "seconds": samples[name]}
        for name, seconds in medians.items()
    ]  # fmt: skip


GPU_ROWS: dict[str, Callable[[Device], list[Row]]] = {
    "throughput-1b": lambda device: throughput("1b", device),
    "throughput-8b": lambda device: throughput("8b", device),
    "decode": decode,
    "uniform": uniform,
    "host": host,
    "paged-kernel": paged_kernel,
    "prefix": prefix,
    "waste": waste,
    "ablation": ablation,
    "transformers-1b": lambda device: against_transformers("1b", device),
    "transformers-slow": lambda device: against_transformers("1b", device, slow=True),
    "transformers-8b": lambda device: against_transformers("8b", device),
    "forward": forward,
    "splitfuse": splitfuse,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "rows", nargs="*", choices=[[], *GPU_ROWS], help="which rows; all that this device runs unless told"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = Device() if arguments.device == "cuda" else None
    wanted = arguments.rows or (["cpu"] if device is None else list(GPU_ROWS))
    name = device_name(arguments.device)
    file = Path("engine", "cpu.json" if device is None else f"{name.replace(' ', '-')}.json")
    kept = [
        folder / file
        for folder in (Path(os.environ.get("LLMLAB_RESULTS", RESULTS)), RESULTS)
        if (folder / file).exists()
    ]
    before = json.loads(kept[0].read_text(encoding="utf-8")) if kept else {"rows": {}, "runs": {}}
    measured, runs = before["rows"], before["runs"]
    if device is not None:
        print(f"{name}: reads {device.bandwidth / 1e12:.3f} TB/s, products {device.flops / 1e12:.0f} TFLOP/s")
    for row in wanted:
        start = time.perf_counter()
        found = cpu() if device is None else GPU_ROWS[row](device)
        print(f"\n{row} ({time.perf_counter() - start:.0f} s)", flush=True)
        flat = [
            c
            for c in dict.fromkeys(k for r in found for k in r)
            if not any(isinstance(r.get(c), list | dict) for r in found)
        ]
        print_table(found, flat)
        limits = {} if device is None else {"read_bytes_per_second": device.bandwidth, "product_flops": device.flops}
        measured[row], runs[row] = found, {"commit": commit(), "date": today(), **limits}
        write_result("engine", arguments.device, [0, 1, 2], {"runs": runs, "rows": measured})


if __name__ == "__main__":
    main()
