"""The bubble of each schedule, by formula, by the simulator and as it runs, beside torch's own pipelining; and tensor parallelism.

    python benchmarks/pipeline_parallelism.py [--ranks 4] [--unit 0.1]        # stages that sleep, on the CPU; against tensor
    python benchmarks/pipeline_parallelism.py --device cuda [--ranks 2]       # stages of Llama-8B's layers, one a GPU; against tensor
    python benchmarks/pipeline_parallelism.py against-tensor                  # this part; the others stay in the result file

Stages that sleep a known time do not slow each other where ranks share two cores: what is measured there is the schedule
and its messages, not arithmetic. With layers, the ideal is what a rank takes for its micro-batches alone, without
messages, and the simulator gets the times of a forward and of both halves of a backward as measured in the same run.
Weights are random, in the real model's shape, the vocabulary small, so that the last stage is no longer than others.
One Llama on one rank, on two with tensor parallelism and on two as stages: see against_tensor.py.
"""

import argparse
import json
import statistics
import time

import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401  # ranks are forked from a server that has what is imported here
from against_tensor import measure_against
from clocks import spent, timed
from llama_layers import DTYPES, SHAPES, VOCABULARY, cross_entropy, model_of, steps
from record import print_table, result_file, write_result

from llmlab.parallel import Pipeline, RankError, launch
from llmlab.parallel.schedules import (
    Costs,
    activations_in_flight,
    bubble_closed_form,
    gpipe,
    interleaved,
    one_f_one_b,
    simulate,
    zero_bubble,
)
from llmlab.parallel.sleeper import Sleeper
from llmlab.parallel.stages import llama_stages
from llmlab.parallel.weight_steps import WeightSteps

SCHEDULES = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": lambda p, m: interleaved(p, m, 2),
    "zb-h1": lambda p, m: zero_bubble(p, m, "H1"),
    "zb-h2": lambda p, m: zero_bubble(p, m, "H2"),
    "zb-v": lambda p, m: zero_bubble(p, m, "V"),
}
OF_TORCH = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B"}
OF_TORCH_WITH_LAYERS = OF_TORCH | {"zb-v": "ScheduleZBVZeroBubble"}


def ours(mesh, schedule, unit, runs):
    """For each run when this rank's operations began and ended, its activations, and the bytes it sent."""
    chunks = [Sleeper((unit / schedule.v,) * 3) for _ in range(schedule.v)]
    pipeline = Pipeline(chunks, schedule, mesh, (1, 1), loss=lambda y, _: y.sum())
    if schedule.splits_backward:
        for chunk in chunks:
            chunk.steps = pipeline.weight_steps
    inputs = [torch.ones(1, 1)] * schedule.m
    found = []
    for _ in range(runs + 1):  # the first finds the others
        dist.barrier()
        record = pipeline.step(inputs, inputs)[1]
        found.append(
            {
                "began": record.ran[0].start, "ended": record.ran[-1].end,
                "busy": sum(ran.end - ran.start for ran in record.ran),
                "until_backward": record.until_backward, "until_weight": record.until_weight, "sent_bytes": record.sent_bytes,
            }
        )  # fmt: skip
    return found[1:]


def of_torch(mesh, name, m, v, unit, runs):
    """When this rank began and ended, with torch's runtime and the same stages."""
    from torch.distributed import pipelining

    rank, p = mesh.get_local_rank(), mesh.size()
    example = torch.ones(1, 1, requires_grad=True)  # without it no gradient is sent, and nobody waits for one
    stages = [
        pipelining.PipelineStage(Sleeper((unit / v,) * 3), chunk * p + rank, p * v, torch.device("cpu"), input_args=example, output_args=example, group=mesh.get_group())
        for chunk in range(v)
    ]  # fmt: skip
    kind = getattr(pipelining, OF_TORCH[name])

    def loss(y, _):
        return y.sum()

    schedule = kind(stages if v > 1 else stages[0], n_microbatches=m, loss_fn=loss)
    inputs, found = torch.ones(m, 1), []
    for _ in range(runs + 1):
        dist.barrier()
        began = time.monotonic()
        schedule.step(*([inputs] if rank == 0 else []), **({"target": inputs} if rank == p - 1 else {}))
        found.append({"began": began, "ended": time.monotonic()})
    return found[1:]


def measure(p, m, unit, runs):
    """One row for each schedule."""
    for name, make in SCHEDULES.items():
        schedule = make(p, m)
        ideal = 3 * m * unit
        by_rank = launch(ours, p, schedule, unit, runs, device="cpu")
        seconds = steps(by_rank)
        timeline = simulate(schedule, Costs(unit, unit, unit))
        held = activations_in_flight(schedule)
        row = {
            "schedule": name, "p": p, "m": m, "v": schedule.v, "unit_seconds": unit,
            "closed_form": bubble_closed_form(schedule.name, p, m, schedule.v),
            "simulated": float(timeline.bubble("total")),
            "simulated_seconds": float(timeline.makespan),
            "measured": [(s - ideal) / s for s in seconds],
            "measured_seconds": seconds,
            "busy_seconds": [[run["busy"] for run in rank] for rank in by_rank],
            "activations_by_formula": [tuple(h) for h in held],
            "activations_counted": [(rank[-1]["until_backward"], rank[-1]["until_weight"]) for rank in by_rank],
            "sent_bytes": [rank[-1]["sent_bytes"] for rank in by_rank],
        }  # fmt: skip
        if name in OF_TORCH:
            theirs = steps(launch(of_torch, p, name, m, schedule.v, unit, runs, device="cpu"))
            row["torch_seconds"] = theirs
            row["torch"] = [(s - ideal) / s for s in theirs]
        yield row


# Stages of layers


def alone(device, chunks, shape, splits):
    """Seconds of a forward, a backward and a weight step of all layers of this rank, for one micro-batch."""
    steps, total = WeightSteps(), [0.0, 0.0, 0.0]
    if splits:
        for chunk in chunks:
            steps.defer(chunk)
    for chunk in chunks:
        ids = torch.randint(0, VOCABULARY, shape[:2], device=device)
        x = ids if chunk.embedding is not None else torch.randn(shape, device=device, dtype=DTYPES[device], requires_grad=True)  # fmt: skip
        times, kept = 8, []
        for _ in range(2):  # the second counts
            forward = spent(device, lambda c=chunk, x=x, k=kept: k.append(c(x)), times)
            gradient = torch.randn_like(kept[0])
            backward = spent(device, lambda k=kept, g=gradient: k.pop().backward(g), times)
            weight = spent(device, lambda: [step() for step in steps.take()], 1) / times
        total = [a + b for a, b in zip(total, (forward, backward, weight), strict=True)]
    return total


def layers_by_us(mesh, schedules, runs):
    """For each schedule: for each run when this rank began and ended; its activations and bytes; what its parts take alone."""
    device, rank = mesh.device_type, mesh.get_local_rank()
    (D, *_), _, tokens = SHAPES[device]
    found = {}
    for name, schedule in schedules.items():
        model = model_of(mesh.size(), device)
        stages = llama_stages(model, schedule, rank)
        parts = alone(device, stages, (1, tokens, D), schedule.splits_backward)
        model.zero_grad()
        pipeline = Pipeline(stages, schedule, mesh, (1, tokens, D), DTYPES[device], cross_entropy)
        ids = torch.randint(0, VOCABULARY, (schedule.m, tokens), device=device).split(1)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times, records = [], []
        for _ in range(runs + 1):  # the first finds the others
            model.zero_grad()
            times.append(timed(device, lambda p=pipeline, r=records, i=ids: r.append(p.step(i, i)[1])))
        record = records[-1]
        found[name] = {
            "runs": times[1:], "alone": parts, "activations": (record.until_backward, record.until_weight), "sent_bytes": record.sent_bytes,
            "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        }  # fmt: skip
        del model, stages, pipeline
    return found


def layers_by_torch(mesh, name, schedule, runs):
    """When this rank began and ended, with torch's runtime and the same stages."""
    from torch.distributed import pipelining

    device, rank, p = mesh.device_type, mesh.get_local_rank(), mesh.size()
    (D, *_), _, tokens = SHAPES[device]
    model = model_of(p, device)
    stream = torch.zeros(1, tokens, D, device=device, dtype=DTYPES[device], requires_grad=True)
    ids = torch.randint(0, VOCABULARY, (schedule.m, tokens), device=device)
    stages = []
    for chunk, module in enumerate(llama_stages(model, schedule, rank)):
        index, last = schedule.stage_of(rank, chunk), schedule.num_stages - 1
        out = stream if index < last else torch.zeros(1, tokens, VOCABULARY, device=device, dtype=DTYPES[device], requires_grad=True)  # fmt: skip
        where = torch.device(device, rank) if device == "cuda" else torch.device(device)
        stages.append(
            pipelining.PipelineStage(
                module, index, last + 1, where, input_args=stream if index else ids[:1], output_args=out, group=mesh.get_group()
            )
        )  # fmt: skip
    kind = getattr(pipelining, OF_TORCH_WITH_LAYERS[name])
    run = kind(stages if schedule.v > 1 else stages[0], n_microbatches=schedule.m, loss_fn=cross_entropy)
    first, last = schedule.rank_of(0) == rank, schedule.rank_of(schedule.num_stages - 1) == rank
    found = []
    for _ in range(runs + 1):
        model.zero_grad()
        found.append(timed(device, lambda: run.step(*([ids] if first else []), **({"target": ids} if last else {}))))
    return found[1:]


def measure_layers(p, m, device, runs):
    """One row for each schedule."""
    schedules = {name: make(p, m) for name, make in SCHEDULES.items()}
    ours_by_rank = launch(layers_by_us, p, schedules, runs, device=device)
    for name, schedule in schedules.items():
        by_rank = [rank[name] for rank in ours_by_rank]
        seconds = steps([rank["runs"] for rank in by_rank])
        forward, backward, weight = (max(rank["alone"][i] for rank in by_rank) for i in range(3))
        costs = Costs(forward, backward, weight) if schedule.splits_backward else Costs(forward, backward / 2, backward / 2)  # fmt: skip
        timeline, ideal = simulate(schedule, costs), m * (forward + backward + weight)
        row = {
            "schedule": name, "p": p, "m": m, "v": schedule.v, "forward_seconds": forward, "backward_seconds": backward, "weight_seconds": weight,
            "closed_form": bubble_closed_form(schedule.name, p, m, schedule.v), "simulated": float(timeline.bubble("total")),
            "simulated_seconds": float(timeline.makespan), "measured": [(s - ideal) / s for s in seconds], "measured_seconds": seconds,
            "ideal_seconds": ideal, "tokens_per_second": m * SHAPES[device][2] / statistics.median(seconds),
            "activations_by_formula": [tuple(h) for h in activations_in_flight(schedule)],
            "activations_counted": [rank["activations"] for rank in by_rank],
            "sent_bytes": [rank["sent_bytes"] for rank in by_rank], "peak_bytes": [rank["peak_bytes"] for rank in by_rank],
        }  # fmt: skip
        if name in OF_TORCH_WITH_LAYERS:
            try:
                theirs = steps(launch(layers_by_torch, p, name, schedule, runs, device=device, timeout=120))
                row["torch_seconds"], row["torch"] = theirs, [(s - ideal) / s for s in theirs]
            except RankError as error:
                print(f"torch's {name} failed: {error}")
        yield row


def print_row(row):
    """One line: bubbles as shares of the step, of which those that ran are medians."""
    theirs = f"{statistics.median(row['torch']):7.3f}" if "torch" in row else "      –"
    print(
        f"{row['schedule']:12} {row['m']:3} {row['closed_form']:8.3f} {row['simulated']:9.3f} "
        f"{statistics.median(row['measured']):9.3f} {theirs}   {[a for a, _ in row['activations_counted']]}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parts = ["sleep", "layers", "against-tensor"]
    parser.add_argument(
        "parts", nargs="*", choices=[[], *parts], help="sleep on a CPU, layers on GPUs, and against-tensor unless told"
    )
    parser.add_argument("--ranks", type=int, help="4, or as many as there are GPUs, unless told")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--unit", type=float, default=0.1, help="seconds of a forward of a whole rank that sleeps")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    device = options.device
    p = options.ranks or (torch.cuda.device_count() if device == "cuda" else 4)
    wanted = options.parts or ["layers" if device == "cuda" else "sleep", "against-tensor"]
    file = result_file("pipeline_parallelism", device, p if device == "cuda" else 1)
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    tables = {name: kept[name] for name in ("bubbles", "layers", "against_tensor") if name in kept}
    for part in (part for part in wanted if part != "against-tensor"):
        rows = tables["layers" if part == "layers" else "bubbles"] = []
        print(
            f"{'schedule':12} {'m':>3} {'formula':>8} {'simulated':>9} {'measured':>9} {'torch':>7}   activations until B"
        )
        for m in options.micro_batches:
            for row in measure_layers(p, m, device, options.runs) if part == "layers" else measure(p, m, options.unit, options.runs):  # fmt: skip
                rows.append(row)
                print_row(row)
    if "against-tensor" in wanted:
        rows = tables["against_tensor"] = list(measure_against(device, 8, max(5, options.runs)))
        shown = ["messages", "sent_bytes", "held_bytes", "peak_bytes", "seconds", "computed"]
        print_table(
            [{k: row[k] for k in ("way", "what")} | {k: [f"{row[side][k] or 0:.4g}" for side in ("predicted", "measured")] for k in shown} for row in rows],
            ["way", "what", *shown],
        )  # fmt: skip
    print("wrote", write_result("pipeline_parallelism", device, [0, 1], tables, p if device == "cuda" else 1))


if __name__ == "__main__":
    main()
