"""From a schedule to what each rank runs: its operations, with what it sends and receives between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from llmlab.arguments import checked, instance_of
from llmlab.parallel.schedules.schedule import Operation, Schedule
from llmlab.parallel.schedules.simulate import simulate


@dataclass(frozen=True, slots=True)
class Transfer:
    """An activation (kind "F") or a gradient ("B") of one micro-batch, on its way between ranks.

    peer: the rank at the other end. stage: the one of the p·v stages that computes with it.
    """

    peer: int
    kind: str
    micro_batch: int
    stage: int

    @property
    def source_stage(self) -> int:
        """The stage that made it."""
        return self.stage - 1 if self.kind == "F" else self.stage + 1

    def describe(self) -> str:
        """What is transferred in words, for messages."""
        what = {"F": "activation", "B": "gradient"}.get(self.kind, repr(self.kind))
        return f"{what} of micro-batch {self.micro_batch} for stage {self.stage}"


class Send(Transfer):
    """Give a transfer to ``peer``."""

    __slots__ = ()


class Receive(Transfer):
    """Take a transfer from ``peer``: where to post it, if it does not block; it must be there when it is used."""

    __slots__ = ()


Step = Operation | Send | Receive


@dataclass(frozen=True)
class Programs:
    """For each rank of a schedule its steps: operations, sends and receives, in the order in which it starts them.

    Raises TypeError for a step that is none of these; ``validate`` checks the rest.
    """

    schedule: Schedule
    steps: Sequence[Sequence[Step]] = field(repr=False)

    def __post_init__(self) -> None:
        for step in (step for steps in self.steps for step in steps):
            if not isinstance(step, Operation | Send | Receive):
                raise TypeError(f"steps: expected operations, sends and receives, got {type(step).__name__} {step!r}")
        object.__setattr__(self, "steps", tuple(map(tuple, self.steps)))

    def operations(self) -> Schedule:
        """The schedule that the steps make without their transfers."""
        return Schedule(
            self.schedule.name, self.schedule.p, self.schedule.m, self.schedule.v,
            [[step for step in steps if isinstance(step, Operation)] for steps in self.steps],
            self.schedule.kinds, self.schedule.placement,
        )  # fmt: skip


def outgoing(schedule: Schedule, rank: int, operation: Operation) -> Send | None:
    """What ``rank`` sends when an operation is done; None where its result is used nowhere, or on the same rank."""
    output = schedule.output(rank, operation)
    if output is None or output[0] == rank:
        return None
    peer, needs = output
    return Send(peer, needs.kind, needs.micro_batch, schedule.stage_of(peer, needs.chunk))


def incoming(schedule: Schedule, rank: int, operation: Operation) -> Receive | None:
    """What ``rank`` receives before an operation; None where its inputs are its own."""
    for peer, source in schedule.inputs(rank, operation):
        if peer != rank:
            return Receive(peer, source.kind, source.micro_batch, schedule.stage_of(rank, operation.chunk))
    return None


@checked(schedule=instance_of(Schedule))
def lower(schedule: Schedule) -> Programs:
    """Put the transfers into each rank's order so that sends may block until the receiver takes them.

    There is one order of all operations and transfers in which a transfer is a single event of both its ranks, after
    what makes it and before what uses it; each rank's program is its part of that order. What is first in it can always
    be done: so ranks never wait in a circle, and two ranks see the transfers between them in one order, as NCCL needs.
    The order is that of a run in which F, B and W take a unit each: a transfer comes when what makes it has ended, an
    operation when it starts. Chunks on the same rank transfer nothing.

    A rank need not block: it may post a receive where it stands, and wait for it where it is used. Where it does,
    ``simulate_blocking`` has the times. Raises ScheduleError for a schedule that cannot run, and TypeError.
    """
    events: list[tuple[Fraction, int, int, Operation | Send]] = []
    for rank, spans in enumerate(simulate(schedule).spans):
        for operation, start, end in spans:
            events.append((start, 1, rank, operation))
            if send := outgoing(schedule, rank, operation):
                events.append((end, 0, rank, send))  # before the operations that start then: they may need it
    steps: list[list[Step]] = [[] for _ in range(schedule.p)]
    for _, _, rank, event in sorted(events, key=lambda event: event[:3]):
        steps[rank].append(event)
        if isinstance(event, Send):
            steps[event.peer].append(Receive(rank, event.kind, event.micro_batch, event.stage))
    return Programs(schedule, steps)


@checked(schedule=instance_of(Schedule))
def lower_naively(schedule: Schedule) -> Programs:
    """Receive what an operation needs just before it, and send what it made just after it.

    Right where sends do not block. Where they do, two ranks that send to each other wait for ever: in 1F1B a rank's
    activation goes out as its neighbour's gradient does. It is here to show that: ``validate`` names the circle.
    """
    steps = []
    for rank, order in enumerate(schedule.orders):
        around = [
            (incoming(schedule, rank, operation), operation, outgoing(schedule, rank, operation)) for operation in order
        ]
        steps.append([step for three in around for step in three if step is not None])
    return Programs(schedule, steps)
