"""What a process that is one rank does: join the others, run the function, hand over what came of it."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

SHOW_STACK = signal.SIGUSR1
TIMED_OUT = "timed out in a collective"
COLLECTIVES = "distributed_c10d.py"  # where a rank is that waits for others


def device_for(device: str | None, world_size: int) -> str:
    """The kind of device for so many ranks; raises ValueError where there are too few GPUs."""
    gpus = torch.cuda.device_count()
    if device == "cuda" and world_size > gpus:
        raise ValueError(f"world_size: {world_size} ranks need {world_size} GPUs, and {gpus} are here")
    return device or ("cuda" if gpus >= world_size else "cpu")


@contextlib.contextmanager
def joined(device: str | None = None, timeout: float = 300.0) -> Iterator[DeviceMesh]:
    """The mesh of all ranks, in a process that `torchrun` started; the group is left at the end of the block.

    device, timeout: as for ``launch``. Raises ValueError where no torchrun has set RANK and WORLD_SIZE.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"{', '.join(missing)} not set: start this with torchrun, or use launch")
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    with _group(local, int(os.environ["WORLD_SIZE"]), device_for(device, here), timeout, {}) as mesh:
        yield mesh


@contextlib.contextmanager
def _group(local: int, world_size: int, device: str, timeout: float, how: dict[str, Any]) -> Iterator[DeviceMesh]:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout), **how)
    mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("ranks",))
    try:
        yield mesh
    finally:
        dist.destroy_process_group()
        # torch 2.13's mesh keeps the group; one that lives to the interpreter's end may abort the process there.
        getattr(mesh, "_pg_registry", {}).clear()


def run(pipe: Connection, rank: int, world_size: int, device: str, timeout: float, store: Path, stacks: Path) -> None:
    """The life of one rank that ``launch`` started."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if loopback:
            os.environ.setdefault(variable, loopback)
    payload = pipe.recv_bytes()
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    lock = threading.Lock()

    def say(kind: str, content: Any) -> None:
        with lock:
            pipe.send_bytes(pickle.dumps((kind, content)))

    with stacks.open("w", encoding="utf-8") as written:
        faulthandler.register(SHOW_STACK, written, all_threads=False)
        sys.stdout = sys.stderr = _Printed(pipe, lock)
        try:
            fn, args = pickle.loads(payload)
            how = {"store": dist.FileStore(str(store), world_size), "rank": rank, "world_size": world_size}  # type: ignore[attr-defined]
            with _group(rank, world_size, device, timeout, how) as mesh:
                try:
                    result = fn(mesh, *args)
                    dist.barrier()  # no rank leaves while another still needs it
                    said = ("result", cloudpickle.dumps(result))
                except BaseException as error:
                    say("failure", _failure(error))
                    raise
                say(*said)  # now: to leave a group may take ranks that will not come, or a CUDA graph that holds it
        except BaseException as error:  # noqa: BLE001  # whatever it was, the one who launched this must learn of it
            say("failure", _failure(error))


def _failure(error: BaseException) -> tuple[float, str, str]:
    text = "".join(traceback.format_exception(error))
    reason = f"raised {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    noticed = "Connection closed by peer" in text or "Connection reset by peer" in text
    if "Timed out waiting" in text or (
        "timed out" in text.lower() and isinstance(error, dist.DistError | RuntimeError)
    ):
        reason = f"{TIMED_OUT}: {reason}"
    return (time.monotonic() + (1e6 if noticed else 0), reason, text)


def _end_with_parent(pipe: Connection) -> None:
    """Whoever launched this rank is gone when nothing more can be read from it."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv_bytes()
    os._exit(1)


class _Printed(io.TextIOBase):
    """What a rank prints, sent line by line."""

    def __init__(self, pipe: Connection, lock: threading.Lock) -> None:
        self._pipe, self._lock, self._line = pipe, lock, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            with self._lock:
                self._pipe.send_bytes(pickle.dumps(("print", "\n".join(lines) + "\n")))
        return len(text)
