"""The bubble of each schedule, by formula, by the simulator and as it runs, beside torch's own pipelining.

Stages sleep a known time, so that ranks which share two cores do not slow each other: what is measured is the schedule
and its messages, not arithmetic. Run: python benchmarks/pipeline_parallelism.py [--ranks 4] [--unit 0.1]
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from record import write_result
from torch import nn

from llmlab.parallel import Pipeline, launch
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

SCHEDULES = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": lambda p, m: interleaved(p, m, 2),
    "zb-h1": lambda p, m: zero_bubble(p, m, "H1"),
    "zb-h2": lambda p, m: zero_bubble(p, m, "H2"),
    "zb-v": lambda p, m: zero_bubble(p, m, "V"),
}
OF_TORCH = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B"}


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds, steps):
        ctx.seconds, ctx.steps = seconds, steps
        time.sleep(seconds)
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        if ctx.steps is None:
            time.sleep(ctx.seconds)
        else:
            ctx.steps.add(lambda: time.sleep(ctx.seconds))
        return gradient, None, None


class Sleeper(nn.Module):
    """A stage whose forward takes ``seconds``, and each half of its backward too; it notes when."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.steps = seconds, None
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return _Sleep.apply(x * self.weight, self.seconds, self.steps)


def ours(mesh, schedule, unit, runs):
    """For each run when this rank's operations began and ended, its activations, and the bytes it sent."""
    chunks = [Sleeper(unit / schedule.v) for _ in range(schedule.v)]
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
        pipelining.PipelineStage(Sleeper(unit / v), chunk * p + rank, p * v, torch.device("cpu"), input_args=example, output_args=example, group=mesh.get_group())
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


def steps(by_rank):
    """Seconds of each run, from the first operation of any rank to the last of any."""
    return [max(r["ended"] for r in run) - min(r["began"] for r in run) for run in zip(*by_rank, strict=True)]


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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--unit", type=float, default=0.1, help="seconds of a forward of a whole rank")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rows = []
    print(
        f"{'schedule':12} {'m':>3} {'formula':>8} {'simulated':>9} {'measured':>9} {'torch':>7}   activations until B"
    )
    for m in options.micro_batches:
        for row in measure(options.ranks, m, options.unit, options.runs):
            rows.append(row)
            torchs = f"{statistics.median(row['torch']):7.3f}" if "torch" in row else "      –"
            print(
                f"{row['schedule']:12} {m:3} {row['closed_form']:8.3f} {row['simulated']:9.3f} "
                f"{statistics.median(row['measured']):9.3f} {torchs}   {[a for a, _ in row['activations_counted']]}",
                flush=True,
            )
    print("wrote", write_result("pipeline_parallelism", "cpu", [], {"bubbles": rows}))


if __name__ == "__main__":
    main()
