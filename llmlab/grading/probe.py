"""Finding out what a sandbox is worth here, by trying inside it what must fail."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmlab.grading.cgroup import parents, sweep
from llmlab.grading.sandbox import Level, Limits, Sandbox, SandboxError, has_bubblewrap
from llmlab.grading.wire import Channel, WireError, WorkerGone
from llmlab.grading.zygote import Zygote

SECONDS = 10.0
LIMITS = Limits(seconds=SECONDS, cpu_seconds=5, memory_bytes=256 * 2**20, processes=16, disk_bytes=2**20)

KNOWN_TO_WORK = ("fork past the limit",)  # without a control group, for root; the level's name says so
_libc = ctypes.CDLL(None, use_errno=True)


def _write_host(readable: str, canary: str, port: int) -> bool:
    _libc.mount(None, readable.encode(), None, 32 | 4096, None)  # MS_REMOUNT | MS_BIND: read-write
    return _can_write(Path(readable, "written"), b"")


def _read_host(readable: str, canary: str, port: int) -> bool:
    return Path(canary).exists()


def _reach_port(readable: str, canary: str, port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _make_namespace(readable: str, canary: str, port: int) -> bool:
    return int(_libc.unshare(0x10000000)) == 0  # CLONE_NEWUSER


def _trace(readable: str, canary: str, port: int) -> bool:
    return int(_libc.ptrace(0, 0, 0, 0)) == 0  # PTRACE_TRACEME


def _fill_disk(readable: str, canary: str, port: int) -> bool:
    return any(
        _can_write(Path(folder, "full"), bytes(4 * LIMITS.disk_bytes)) for folder in ("/dev", "/dev/shm", "/tmp", "/")
    )


def _write_settings(readable: str, canary: str, port: int) -> bool:
    setting = Path("/proc/sys/kernel/core_pattern")
    return _can_write(setting, setting.read_bytes())  # root's own, where the user inside is root outside


def _outlive(readable: str, canary: str, port: int) -> bool:
    if os.fork() == 0:
        os.setsid()
        time.sleep(30)
        os._exit(0)
    return False  # seen from outside


def _fork_past_limit(readable: str, canary: str, port: int) -> bool:
    children: list[int] = []
    try:
        while len(children) <= 2 * LIMITS.processes:
            child = os.fork()
            if child == 0:
                time.sleep(5)
                os._exit(0)
            children.append(child)
    except OSError:
        return False
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return True


def _exceed_memory(readable: str, canary: str, port: int) -> bool:
    child = os.fork()
    if child == 0:
        try:
            held = bytearray(LIMITS.memory_bytes + 64 * 2**20)
            held[::4096] = b"x" * len(held[::4096])
            os._exit(7)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def _can_write(file: Path, content: bytes) -> bool:
    try:
        file.write_bytes(content)
    except OSError:
        return False
    return True


# Each is tried inside, and must not work.
ATTEMPTS: dict[str, Callable[[str, str, int], bool]] = {
    "write to the host": _write_host,
    "read the host": _read_host,
    "reach a port of the host": _reach_port,
    "make a user namespace": _make_namespace,
    "trace processes": _trace,
    "fill a file system": _fill_disk,
    "write the kernel's settings": _write_settings,
    "outlive the parent": _outlive,
    "fork past the limit": _fork_past_limit,
    "take more memory than the limit": _exceed_memory,
}
BLAMED = {  # what the operating system must allow for bubblewrap to work, by what it says when it is refused
    "No permissions to create": "this system forbids user namespaces (sysctl kernel.unprivileged_userns_clone=1 allows them)",
    "setting up uid map": (
        "AppArmor forbids user namespaces, as Ubuntu 24.04 does: give bwrap a profile with 'userns,' in /etc/apparmor.d/bwrap, "
        "or sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    ),
    "Creating new namespace failed": "a container forbids namespaces: run it with --security-opt seccomp=unconfined, or on the host",
    "Can't mount proc": "a container masks /proc: run it with --security-opt systempaths=unconfined, or on the host",
}  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """The strongest level that held, and why a stronger one did not."""

    level: Level
    weaknesses: tuple[str, ...]
    seconds: float

    @property
    def is_sandbox(self) -> bool:
        return self.level is not Level.NONE


def probe() -> Probe:
    """Try the levels from the strongest on; the first through which nothing gets counts."""
    start = time.monotonic()
    sweep()
    weaknesses: list[str] = []
    if not has_bubblewrap():
        weaknesses.append("bubblewrap is not installed: sudo apt-get install bubblewrap")
    else:
        for level in (Level.FULL, Level.NO_CGROUP):
            if level is Level.FULL and parents() is None:
                weaknesses.append("no control group may be made here; memory and processes are limited one by one")
                continue
            found = try_level(level)
            if not found:
                return Probe(level, tuple(weaknesses), time.monotonic() - start)
            weaknesses += [f"{level.name}: {weakness}" for weakness in found]
    return Probe(Level.NONE, tuple(weaknesses), time.monotonic() - start)


def refusal(unsandboxed: bool) -> tuple[Level, str]:
    """The level to grade others' work at, and why it is refused ("" where it is not)."""
    if unsandboxed:
        return Level.NONE, ""
    found = probe()
    why = "; ".join(found.weaknesses)
    return found.level, "" if found.is_sandbox else f"there is no sandbox here, so others' work is not run. {why}"


def try_level(level: Level) -> list[str]:
    """What gets through a sandbox of this level, or why there is none; empty where it holds.

    A worker is tried that was forked from a zygote, as graders start them; bubblewrap starts the same sandbox under it.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmlab-probe-")))
        readable, canary = folder / "readable", folder / "canary"
        readable.mkdir()
        canary.touch()
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        zygote = Zygote(_attempt)
        stack.callback(zygote.end)
        try:
            with Sandbox(LIMITS, level, {readable: str(readable)}).worker(theirs.fileno(), zygote):
                theirs.close()
                channel = Channel(ours)
                channel.send([str(readable), str(canary), server.getsockname()[1]])
                worked = list(channel.receive(seconds=SECONDS))
        except (SandboxError, OSError, WireError, WorkerGone) as error:
            said = str(error)
            return [next((mend for mark, mend in BLAMED.items() if mark in said), said)]
        try:
            channel.receive(seconds=1)  # the one that outlives its parent holds the other end open
        except TimeoutError:
            worked.append("outlive the parent")
        except WorkerGone:
            pass
        if (readable / "written").exists() and "write to the host" not in worked:
            worked.append("write to the host")
        return worked if level is Level.FULL else [w for w in worked if w not in KNOWN_TO_WORK]


def _attempt(descriptor: int) -> None:
    """What the worker of a probe does."""
    channel = Channel(socket.socket(fileno=descriptor))
    told = channel.receive()
    channel.send([name for name, attempt in ATTEMPTS.items() if attempt(*told)])
