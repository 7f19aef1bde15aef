"""When the operations of a schedule run, for given costs, and how long its ranks are idle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from llmlab.arguments import checked, instance_of, number, one_of
from llmlab.parallel.schedules.activations import Held, activations_in_flight
from llmlab.parallel.schedules.deadlock import waiting
from llmlab.parallel.schedules.schedule import Operation, Schedule, ScheduleError

Cost = float | Fraction | Sequence[float | Fraction]


@dataclass(frozen=True)
class Costs:
    """What the operations on one micro-batch take, in any unit of time.

    forward, backward, weight: of all layers of a rank, so that a chunk takes 1/v of it; or a sequence with a number for
    each of the p·v stages. A backward that is not split takes backward + weight. communication: from the end of an
    operation until its result is there on another rank.

    Raises TypeError, or ValueError for a number below 0.
    """

    forward: Cost = 1.0
    backward: Cost = 1.0
    weight: Cost = 1.0
    communication: float | Fraction = 0.0

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "weight"):
            cost: Any = getattr(self, name)
            if isinstance(cost, Sequence) and not isinstance(cost, str):
                object.__setattr__(self, name, tuple(cost))
                for stage, of_stage in enumerate(cost):
                    number(at_least=0)(f"{name}[{stage}]", of_stage)
            else:
                number(at_least=0)(name, cost)
        number(at_least=0)("communication", self.communication)

    def durations(self, schedule: Schedule) -> dict[str, list[Fraction]]:
        """What each kind of operation takes on each stage. Raises ValueError for costs of another number of stages."""
        by_kind: dict[str, list[Fraction]] = {}
        for kind, name in (("F", "forward"), ("B", "backward"), ("W", "weight")):
            cost: Any = getattr(self, name)
            if not isinstance(cost, tuple):
                by_kind[kind] = [exact(cost) / schedule.v] * schedule.num_stages
            elif len(cost) == schedule.num_stages:
                by_kind[kind] = [exact(of_stage) for of_stage in cost]
            else:
                raise ValueError(
                    f"{name}: expected a cost for each of the {schedule.num_stages} stages, got {len(cost)} costs"
                )
        if not schedule.splits_backward:
            by_kind["B"] = [b + w for b, w in zip(by_kind["B"], by_kind["W"], strict=True)]
        return by_kind


UNIT_COSTS = Costs()


def exact(value: float | Fraction) -> Fraction:
    """The number itself, as a fraction: sums of them are not rounded."""
    return Fraction(value) if isinstance(value, int | Fraction) else Fraction(float(value))


class Span(NamedTuple):
    """An operation, and when it ran, in the unit of the costs."""

    operation: Operation
    start: Fraction
    end: Fraction


@dataclass(frozen=True)
class Timeline:
    """A run of a schedule, from time 0 on: for each rank the spans of its operations, in order. All times are exact."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...] = field(repr=False)

    @property
    def makespan(self) -> Fraction:
        """When the last operation ends."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def busy(self) -> tuple[Fraction, ...]:
        """How long each rank computes."""
        return tuple(sum((span.end - span.start for span in spans), Fraction(0)) for spans in self.spans)

    @property
    def idle(self) -> tuple[Fraction, ...]:
        """makespan - busy, for each rank."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def lengths(self) -> tuple[Fraction, ...]:
        """For each rank the time from the start of its first operation to the end of its last."""
        return tuple(spans[-1].end - spans[0].start for spans in self.spans)

    @property
    def activations(self) -> tuple[Held, ...]:
        """The most activations that each rank holds at a time."""
        return activations_in_flight(self.schedule)

    @checked(of=one_of(["total", "ideal"]), steady=instance_of(bool))
    def bubble(self, of: str = "total", steady: bool = False) -> Fraction:
        """(T - I) / T for "total", (T - I) / I for "ideal", as ``bubble_fraction`` but exact.

        I is ``max(busy)``; T is the makespan or, steady, ``max(lengths)``. Raises ValueError where nothing takes time,
        or for another name.
        """
        ideal = max(self.busy)
        if not ideal:
            raise ValueError("costs: expected an operation that takes time, got none")
        time = max(self.lengths) if steady else self.makespan
        return (time - ideal) / (time if of == "total" else ideal)


@checked(schedule=instance_of(Schedule), costs=instance_of(Costs))
def simulate(schedule: Schedule, costs: Costs = UNIT_COSTS) -> Timeline:
    """Run a schedule: each rank does its operations in order, each as soon as its inputs are there.

    start = max(end of the rank's operation before, end of each input + communication if it comes from another rank).
    Sending takes a rank no time and never blocks it; ``simulate_blocking`` has the opposite. Raises ScheduleError for a
    schedule that is incomplete or cannot run to its end: the message has the circle. Raises ValueError for costs of
    another number of stages.
    """
    schedule.check_operations()
    durations, delay = costs.durations(schedule), exact(costs.communication)
    spans: list[list[Span]] = [[] for _ in range(schedule.p)]
    ended: dict[tuple[int, Operation], Fraction] = {}
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            while len(spans[rank]) < len(order):
                operation = order[len(spans[rank])]
                inputs = schedule.inputs(rank, operation)
                if any(source not in ended for source in inputs):
                    break
                start = spans[rank][-1].end if spans[rank] else Fraction(0)
                for source in inputs:
                    start = max(start, ended[source] + (delay if source[0] != rank else 0))
                end = start + durations[operation.kind][schedule.stage_of(rank, operation.chunk)]
                spans[rank].append(Span(operation, start, end))
                ended[rank, operation] = end
                moved = True
    if len(ended) < sum(map(len, schedule.orders)):
        waits = {}
        for rank, order in enumerate(schedule.orders):
            if len(spans[rank]) < len(order):
                operation = order[len(spans[rank])]
                peer, what = next(source for source in schedule.inputs(rank, operation) if source not in ended)
                waits[rank] = (peer, f"do the {what.describe()}, which its own {operation.describe()} needs")
        raise ScheduleError(f"{schedule.name}: no rank can go on: {waiting(waits)}")
    return Timeline(schedule, tuple(map(tuple, spans)))


@checked(
    schedule=instance_of(Schedule), of=one_of(["total", "ideal"]), steady=instance_of(bool), costs=instance_of(Costs)
)
def bubble_fraction(schedule: Schedule, of: str = "total", steady: bool = False, costs: Costs = UNIT_COSTS) -> float:
    """How long the busiest rank is idle: (T - I) / T for ``of="total"``, (T - I) / I for "ideal".

    I, the ideal: what the busiest rank computes. T, of one flushed iteration: the makespan, from the first operation of
    any rank to the last of any. T, steady: the longest time that a rank takes from its own first operation to its own
    last. Iterations can follow each other at that pace, if no rank waits for another between them.

    The fraction is exact before it is rounded to a float, so that it equals a closed form of whole numbers. Raises
    TypeError, ValueError, and ScheduleError as ``simulate``. Sources: Narayanan et al. 2021 (Megatron-LM), section 2.2,
    for the flushed one over the ideal; Qi et al. 2024 (Pipeline Parallelism with Controllable Memory,
    arXiv:2405.15362) for the steady one, of the total.
    """
    return float(simulate(schedule, costs).bubble(of, steady))
