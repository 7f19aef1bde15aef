"""Ranks as threads of one process: the same functions and the same log, where no process may be started.

For a page, a lab or a test. Nothing is faster for it: threads of one Python take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from llmlab.arguments import checked, integer, number
from llmlab.parallel.communicator import Kind, Message, split


class ThreadRanks:
    """What a Communicator is between processes: collectives that leave their input alone, and a log."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank, self.size = rank, meeting.size
        self.log: list[Message] = []
        self._meeting = meeting
        self._neighbours: dict[int, ThreadRanks] = {}

    def neighbours(self, size: int) -> ThreadRanks:
        """The ``size`` consecutive ranks among which this one is. All of them must ask."""
        if size not in self._neighbours:
            self._neighbours[size] = ThreadRanks(self.rank % size, self._meeting.part(self.rank // size, size))
        return self._neighbours[size]

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """The sum (or largest) over the ranks of x [...], the same on all of them."""
        if self.size == 1:
            return x.clone()
        self._note("all_reduce", x.numel() * x.element_size())
        every = torch.stack(self._meeting.exchange(self.rank, x))
        return every.sum(0) if op == "sum" else every.amax(0)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """The ranks' x side by side along ``dim``, in the order of the ranks."""
        if self.size == 1:
            return x.clone()
        self._note("all_gather", self.size * x.numel() * x.element_size())
        return torch.cat(self._meeting.exchange(self.rank, x), dim)

    def reduce_scatter(self, x: Tensor, dim: int = -1) -> Tensor:
        """This rank's part along ``dim`` of the sum over the ranks of x. Raises ValueError where t does not divide it."""
        if self.size == 1:
            return x.clone()
        split(x, self.size, dim)
        self._note("reduce_scatter", x.numel() * x.element_size())
        return split(torch.stack(self._meeting.exchange(self.rank, x)).sum(0), self.size, dim)[self.rank].clone()

    def _note(self, kind: Kind, num_bytes: int) -> None:
        self.log.append(Message(kind, num_bytes, self.size))


class _Meeting:
    """Where so many threads lay down a tensor each, and take all of them."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self._timeout = size, timeout
        self._barrier = threading.Barrier(size, timeout=timeout)
        self._laid: list[Any] = [None] * size
        self._parts: dict[tuple[int, int], _Meeting] = {}
        self._lock = threading.Lock()

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self._laid[rank] = x.detach().clone()
        self._barrier.wait()
        every = list(self._laid)
        self._barrier.wait()  # nobody lays down the next before all have taken this
        return every

    def part(self, number_: int, size: int) -> _Meeting:
        with self._lock:
            return self._parts.setdefault((number_, size), _Meeting(size, self._timeout))

    def end(self) -> None:
        self._barrier.abort()
        for part in self._parts.values():
            part.end()


@checked(size=integer(at_least=1), timeout=number(above=0))
def in_threads(fn: Callable[..., Any], size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run ``fn(ranks, *args)`` in ``size`` threads; what each returned, by rank.

    ranks: a ThreadRanks, which layers take in place of a mesh. timeout: seconds that a rank waits for the others.
    Raises what the first rank to fail raised; the others then stop at their next collective.
    """
    meeting = _Meeting(size, timeout)

    def run(rank: int) -> Any:
        try:
            return fn(ThreadRanks(rank, meeting), *args)
        except BaseException:
            meeting.end()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise TimeoutError(f"a rank waited {timeout} s for the others: they have ended, or call other collectives")
    return [future.result() for future in futures]
