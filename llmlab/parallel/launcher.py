"""Ranks as processes of this machine: one function, run by each of them, from a script or a notebook.

A small server process is started once and imports torch; ranks are forked from it, so that each is there in a fraction
of a second, whatever the notebook has done with threads or a GPU. `torchrun` starts ranks too: see ``joined``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cloudpickle

from llmlab.arguments import checked, integer, number, one_of
from llmlab.parallel import rank as rank_process

GRACE_SECONDS = 0.5  # between the first rank's end and the verdict, for what really happened to arrive
STACK_SECONDS = 1.0  # for ranks that hang to write down where
WITHOUT_CUDA = "PYTORCH_NVML_BASED_CUDA_CHECK"  # torch then counts GPUs without starting CUDA


class RankError(RuntimeError):
    """A rank failed, and the others were ended.

    rank: which one. reason: in one line. details: its traceback, or where it hung.
    """

    def __init__(self, rank: int, reason: str, details: str = "") -> None:
        super().__init__(f"rank {rank} {reason}" + (f"\n\n{details.rstrip()}" if details else ""))
        self.rank = rank
        self.reason = reason


@dataclass
class _Rank:
    number: int
    process: BaseProcess
    pipe: Connection
    stacks: Path
    result: bytes | None = None
    failure: tuple[float, str, str] | None = None  # when, in one line, the traceback


@checked(world_size=integer(at_least=1), timeout=number(above=0), device=one_of((None, "cpu", "cuda")))
def launch(
    fn: Callable[..., Any], world_size: int, *args: Any, device: str | None = None, timeout: float = 300.0
) -> list[Any]:
    """Run ``fn(mesh, *args)`` on ``world_size`` processes of this machine; what each returned, by rank.

    mesh: a one-dimensional ``torch.distributed`` DeviceMesh of all ranks. ``fn`` may be defined in a notebook: it
    travels by value. What ranks print is printed here, behind their number.
    device: "cuda" takes one GPU a rank and NCCL, "cpu" gloo; None takes GPUs where there are enough. CPU ranks share the
    cores. timeout: seconds for the whole run and for each collective.
    Raises RankError where a rank raises, dies or hangs: with its traceback, after the others were ended. Raises
    ValueError for more ranks than GPUs. A script calls it under ``if __name__ == "__main__":``.
    """
    payload = cloudpickle.dumps((fn, args))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmlab.parallel.rank", *_slow_imports()])
    _start_server()
    device = rank_process.device_for(device, world_size)
    with tempfile.TemporaryDirectory(prefix="llmlab-ranks-") as folder, contextlib.ExitStack() as stack:
        ranks: list[_Rank] = []
        stack.callback(_end, ranks)
        for number_ in range(world_size):
            ours, theirs = context.Pipe()
            stack.callback(ours.close)
            stacks = Path(folder, f"stack-{number_}")
            process = context.Process(
                target=rank_process.run,
                args=(theirs, number_, world_size, device, timeout, Path(folder, "store"), stacks),
                name=f"rank-{number_}",
                daemon=True,
            )
            process.start()
            theirs.close()
            ranks.append(_Rank(number_, process, ours, stacks))
        for one in ranks:
            with contextlib.suppress(BrokenPipeError):  # it has died already; its end says so below
                one.pipe.send_bytes(payload)
        _follow(ranks, time.monotonic() + timeout)
        return [pickle.loads(one.result) for one in ranks if one.result is not None]


def _start_server() -> None:
    """Start what ranks are forked from; had it started CUDA, for an import that asks for GPUs, no rank could."""
    before = os.environ.get(WITHOUT_CUDA)
    os.environ[WITHOUT_CUDA] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            os.environ.pop(WITHOUT_CUDA, None)
        else:
            os.environ[WITHOUT_CUDA] = before


def _slow_imports() -> list[str]:
    """What is imported here already and takes seconds: ranks forked from a server that has it too start at once."""
    return [name for name in sys.modules if name.startswith(("transformers.models.", "transformers.generation."))]


def _follow(ranks: list[_Rank], deadline: float) -> None:
    """Wait until all ranks have a result; raise RankError for the first that fails."""
    until = deadline
    while running := [one for one in ranks if one.result is None and one.failure is None]:
        ready = wait([end for one in running for end in (one.pipe, one.process.sentinel)], until - time.monotonic())
        for one in running:
            if one.pipe.poll():
                _hear(one)
            elif one.process.sentinel in ready:
                _note_death(one)
        if until == deadline and any(one.failure for one in ranks):
            until = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() >= until:
            break
    _judge(ranks, timed_out=time.monotonic() >= deadline)


def _hear(one: _Rank) -> None:
    """Take one message of a rank, or note its end."""
    try:
        kind, content = pickle.loads(one.pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        _note_death(one)
        return
    if kind == "print":
        print("".join(f"[rank {one.number}] {line}\n" for line in content.splitlines()), end="")
    elif kind == "result":
        one.result = content
    else:
        one.failure = content


def _note_death(one: _Rank) -> None:
    one.process.join()
    code = one.process.exitcode or 0
    said = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code} and no result"
    one.failure = (0.0, said, "")  # a death comes before what it makes others raise


def _judge(ranks: list[_Rank], timed_out: bool) -> None:
    """Raise for the rank that failed first: not for those that only noticed."""
    failed = [one for one in ranks if one.failure is not None]
    waited = [one for one in failed if one.failure and rank_process.TIMED_OUT in one.failure[1]]
    hanging = [one for one in ranks if one.result is None and one.failure is None]
    if hanging and (timed_out or len(waited) == len(failed) > 0):
        stacks = {one.number: _stack(one) for one in hanging}
        waiting = [number for number, stack in stacks.items() if rank_process.COLLECTIVES in stack]
        stuck = [number for number in stacks if number not in waiting] or waiting
        others = f", and so {'does rank' if len(stuck) == 2 else 'do ranks'} {_listed(stuck[1:])}" if stuck[1:] else ""
        raise RankError(stuck[0], f"hangs{others}", "\n".join(stacks[number] for number in stuck))
    if failed:
        first = min(failed, key=lambda one: one.failure or ())
        assert first.failure is not None
        raise RankError(first.number, *first.failure[1:])


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _stack(one: _Rank) -> str:
    """Where a rank is at this moment, line by line."""
    assert one.process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(one.process.pid, rank_process.SHOW_STACK)
    deadline = time.monotonic() + STACK_SECONDS
    while not one.stacks.exists() or not one.stacks.stat().st_size:
        if time.monotonic() > deadline:
            return f"rank {one.number} does not say where it is"
        time.sleep(0.01)
    time.sleep(0.05)  # the rest of what it writes
    return f"rank {one.number} is here:\n{one.stacks.read_text(encoding='utf-8', errors='replace')}"


def _end(ranks: list[_Rank]) -> None:
    for one in ranks:
        if one.result is None:
            one.process.kill()
    for one in ranks:
        one.process.join(5)
        if one.process.is_alive():
            one.process.kill()
            one.process.join()
