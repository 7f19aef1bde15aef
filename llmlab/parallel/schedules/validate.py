"""Whether a schedule, or the programs made from one, can run, and if not, why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmlab.parallel.schedules.communication import Programs, Receive, Send, Step, incoming, lower, outgoing
from llmlab.parallel.schedules.rendezvous import simulate_blocking
from llmlab.parallel.schedules.schedule import Operation, Schedule, ScheduleError
from llmlab.parallel.schedules.simulate import simulate


def validate(schedule: Schedule | Programs) -> None:
    """Raise ScheduleError unless a schedule, or programs of one, are complete and can run to their ends.

    Of both: each rank does each kind of operation once for each of its chunks and each micro-batch, and the ranks, each
    in its order, come to their ends: F after F of the stage before, B after the rank's own F and B of the stage after,
    W after B. A schedule is then lowered and its programs looked at. Of programs: each transfer between ranks is sent
    once and received once, after the operation that makes it and before the one that uses it; and they come to their
    ends where a send blocks until its receiver takes it, also if a pair of ranks has but one channel.

    The message says what is missing or comes twice, which operation comes before what it needs, or who waits for whom
    on what, around the circle. Raises TypeError for what is neither.
    """
    if isinstance(schedule, Schedule):
        schedule = lower(schedule)
    elif not isinstance(schedule, Programs):
        raise TypeError(f"schedule: expected a Schedule or Programs, got {type(schedule).__name__} {schedule!r}")
    operations = schedule.operations()
    simulate(operations)
    for rank, steps in enumerate(schedule.steps):
        _check_transfers(operations, rank, steps)
        _check_order(operations, rank, steps)
    simulate_blocking(schedule)


def _check_transfers(schedule: Schedule, rank: int, steps: Sequence[Step]) -> None:
    """Each transfer that the rank's operations need or make is there once, and no other."""
    around = [(incoming(schedule, rank, o), outgoing(schedule, rank, o)) for o in schedule.orders[rank]]
    needed = dict.fromkeys(step for pair in around for step in pair if step)
    counts = Counter(step for step in steps if isinstance(step, Send | Receive))
    for step in needed:
        if counts[step] != 1:
            raise ScheduleError(f"{schedule.name}: rank {rank} {_describe(step)} {counts[step]} times, not once")
    for step in counts:
        if step not in needed:
            raise ScheduleError(f"{schedule.name}: rank {rank} {_describe(step)}, which no operation needs")


def _check_order(schedule: Schedule, rank: int, steps: Sequence[Step]) -> None:
    """Each operation comes after the receive that it needs, each send after the operation that makes what it sends."""
    done: set[Step] = set()
    for step in steps:
        if isinstance(step, Operation):
            needs: Step | None = incoming(schedule, rank, step)
        elif isinstance(step, Send):
            needs = Operation(step.kind, step.micro_batch, schedule.chunk_of(step.source_stage))
        else:
            needs = None
        if needs is not None and needs not in done:
            raise ScheduleError(f"{schedule.name}: rank {rank} {_describe(step)} before it {_describe(needs)}")
        done.add(step)


def _describe(step: Step) -> str:
    if isinstance(step, Operation):
        return f"does the {step.describe()}"
    return f"{'sends to' if isinstance(step, Send) else 'receives from'} rank {step.peer} the {step.describe()}"
