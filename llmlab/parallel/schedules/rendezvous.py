"""Running programs whose sends block until the receiver takes them."""

from __future__ import annotations

from fractions import Fraction

from llmlab.arguments import checked, instance_of
from llmlab.parallel.schedules.communication import Programs, Receive, Send, Step
from llmlab.parallel.schedules.deadlock import waiting
from llmlab.parallel.schedules.schedule import Operation, ScheduleError
from llmlab.parallel.schedules.simulate import UNIT_COSTS, Costs, Span, Timeline, exact


@checked(programs=instance_of(Programs), costs=instance_of(Costs))
def simulate_blocking(programs: Programs, costs: Costs = UNIT_COSTS) -> Timeline:
    """Run programs step by step: a transfer starts when both its ranks have come to it, and keeps both to its end.

    end = max(time of the sender, time of the receiver) + communication, for both. Whether what an operation needs has
    been received is not looked at here, but by ``validate``. Raises ScheduleError for operations that are
    missing, and where no rank can go on; the message has the circle of ranks that wait for each other. Raises
    ValueError for costs of another number of stages.
    """
    schedule, steps = programs.operations(), programs.steps
    schedule.check_operations()
    durations, delay = costs.durations(schedule), exact(costs.communication)
    times, position = [Fraction(0)] * len(steps), [0] * len(steps)
    spans: list[list[Span]] = [[] for _ in steps]

    def head(rank: int) -> Step | None:
        return steps[rank][position[rank]] if 0 <= rank < len(steps) and position[rank] < len(steps[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in range(len(steps)):
            while step := head(rank):
                if isinstance(step, Operation):
                    start = times[rank]
                    times[rank] += durations[step.kind][schedule.stage_of(rank, step.chunk)]
                    spans[rank].append(Span(step, start, times[rank]))
                elif head(step.peer) == _other_end(rank, step):
                    times[rank] = times[step.peer] = max(times[rank], times[step.peer]) + delay
                    position[step.peer] += 1
                else:
                    break
                position[rank] += 1
                moved = True
    waits = {}
    for rank in range(len(steps)):
        step = head(rank)
        if isinstance(step, Send | Receive):
            waits[rank] = (step.peer, f"{'take' if isinstance(step, Send) else 'send'} the {step.describe()}")
    if waits:
        raise ScheduleError(f"{schedule.name}: deadlock where sends block: {waiting(waits)}")
    return Timeline(schedule, tuple(map(tuple, spans)))


def _other_end(rank: int, step: Send | Receive) -> Send | Receive:
    """The step of the peer that a step of ``rank`` meets."""
    other = Receive if isinstance(step, Send) else Send
    return other(rank, step.kind, step.micro_batch, step.stage)
