"""A pipeline schedule as data: which rank does which operation on which micro-batch, in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llmlab.arguments import integer, one_of

KIND_NAMES = {"F": "forward", "B": "backward", "W": "weight step"}


class ScheduleError(ValueError):
    """A schedule, or a program made from one, that is incomplete or cannot run to its end."""


class Operation(NamedTuple):
    """One computation of a rank: for one micro-batch, on one of the chunks of layers that the rank holds.

    kind: "F" forward; "B" backward for the input, or the whole backward where a schedule does not split it; "W"
    backward for the weights. micro_batch: 0 to m - 1. chunk: 0 to v - 1.
    """

    kind: str
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")

    def describe(self) -> str:
        """The operation in words, for messages."""
        words = f"{KIND_NAMES.get(self.kind, repr(self.kind))} of micro-batch {self.micro_batch}"
        return words + (f" on chunk {self.chunk}" if self.chunk else "")


@dataclass(frozen=True)
class Schedule:
    """What each of p ranks does, in order; when it does so is for ``simulate`` to say.

    p, m, v: ranks, micro-batches, and chunks of layers that each rank holds. orders: for each rank its operations in
    order. kinds: of operations that each stage does on each micro-batch: "F" for inference, "FB", or "FBW" where the
    backward is split. placement: which of the p·v stages, counted in the order of the layers, a chunk is. "loop": chunk
    c of rank r is stage c·p + r. "v", for v = 2: chunk 0 is stage r, and chunk 1 is stage 2p - 1 - r, so that the first
    and the last stage are on one rank.

    What is given is checked for its types, and put into tuples; ``validate`` checks the orders. Raises TypeError, or
    ValueError.
    """

    name: str
    p: int
    m: int
    v: int
    orders: Sequence[Sequence[Operation]] = field(repr=False)
    kinds: str = "FB"
    placement: str = "loop"

    def __post_init__(self) -> None:
        for letter in "pmv":
            integer(at_least=1)(letter, getattr(self, letter))
        one_of(["F", "FB", "FBW"])("kinds", self.kinds)
        one_of(["loop", "v"])("placement", self.placement)
        if self.placement == "v" and self.v != 2:
            raise ValueError(f"v: the placement 'v' needs 2 chunks a rank, got {self.v}")
        try:
            orders = tuple(tuple(Operation(*operation) for operation in order) for order in self.orders)
        except TypeError as error:
            raise TypeError(
                f"orders: expected (kind, micro_batch, chunk) in a sequence for each rank: {error}"
            ) from None
        object.__setattr__(self, "orders", orders)

    @property
    def splits_backward(self) -> bool:
        """Whether the weights' part of the backward is an operation of its own."""
        return "W" in self.kinds

    @property
    def num_stages(self) -> int:
        """p·v, the stages of all ranks together."""
        return self.p * self.v

    def stage_of(self, rank: int, chunk: int) -> int:
        """The stage that a rank holds as its chunk ``chunk``."""
        return 2 * self.p - 1 - rank if self.placement == "v" and chunk else chunk * self.p + rank

    def rank_of(self, stage: int) -> int:
        """The rank that holds a stage."""
        return 2 * self.p - 1 - stage if self.placement == "v" and stage >= self.p else stage % self.p

    def chunk_of(self, stage: int) -> int:
        """Which of its rank's chunks a stage is."""
        return stage // self.p

    def inputs(self, rank: int, operation: Operation) -> list[tuple[int, Operation]]:
        """What must be done before an operation of ``rank``, each as (rank, operation).

        F needs F of the stage before; B its own F, and B of the stage after; W its own B.
        """
        kind, micro_batch, chunk = operation
        stage = self.stage_of(rank, chunk)
        if kind == "W":
            return [(rank, Operation("B", micro_batch, chunk))]
        own = [(rank, Operation("F", micro_batch, chunk))] if kind == "B" else []
        source = stage - 1 if kind == "F" else stage + 1
        if not 0 <= source < self.num_stages:
            return own
        return [*own, (self.rank_of(source), Operation(kind, micro_batch, self.chunk_of(source)))]

    def output(self, rank: int, operation: Operation) -> tuple[int, Operation] | None:
        """The operation of the next stage, or in the backward of the one before, that an operation's result goes to."""
        kind, micro_batch, chunk = operation
        stage = self.stage_of(rank, chunk) + (1 if kind == "F" else -1)
        if kind == "W" or not 0 <= stage < self.num_stages:
            return None
        return self.rank_of(stage), Operation(kind, micro_batch, self.chunk_of(stage))

    def check_operations(self) -> None:
        """Raise ScheduleError unless each rank does each kind once for each of its chunks and each micro-batch."""
        if len(self.orders) != self.p:
            raise ScheduleError(f"{self.name}: expected an order for each of {self.p} ranks, got {len(self.orders)}")
        chunks, micro_batches = range(self.v), range(self.m)
        expected = {Operation(kind, j, c): 1 for kind in self.kinds for j in micro_batches for c in chunks}
        for rank, order in enumerate(self.orders):
            counts = Counter(order)
            for operation, times in counts.items():
                if operation not in expected:
                    raise ScheduleError(
                        f"{self.name}: rank {rank} does the {operation.describe()}, "
                        f"which is none of kinds {self.kinds}, {self.m} micro-batches and {self.v} chunks"
                    )
                if times > 1:
                    raise ScheduleError(f"{self.name}: rank {rank} does the {operation.describe()} {times} times")
            for operation in expected:
                if operation not in counts:
                    raise ScheduleError(f"{self.name}: the {operation.describe()} is missing on rank {rank}")

    def __str__(self) -> str:
        cells = [[str(operation) for operation in order] for order in self.orders]
        width = max((len(cell) for row in cells for cell in row), default=0)
        lines = [f"rank {r}: " + " ".join(cell.ljust(width) for cell in row) for r, row in enumerate(cells)]
        return "\n".join([f"{self.name}, p = {self.p}, m = {self.m}, v = {self.v}", *(line.rstrip() for line in lines)])
