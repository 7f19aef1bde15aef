"""What a sandbox must not let through, to be tried inside it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llmlab.grading.sandbox import Limits
from llmlab.grading.wire import Channel

LIMITS = Limits(seconds=30, cpu_seconds=5, memory_bytes=256 * 2**20, processes=16, disk_bytes=2**20)

CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435  # system calls
_libc = ctypes.CDLL(None, use_errno=True)


class Host(NamedTuple):
    """What there is outside to get at."""

    readable: str  # a folder that is bound
    canary: str  # a file that only the grader's user may read
    open: str  # one that every user may
    port: int
    socket: str  # an abstract one
    grader: int  # a process
    processes: int  # the number of its pid namespace


def _write_host(host: Host) -> bool:
    _libc.mount(None, host.readable.encode(), None, 32 | 4096, None)  # MS_REMOUNT | MS_BIND: read-write
    return _can_write(Path(host.readable, "written"), b"")


def _read_host(host: Host) -> bool:
    return _can_read(host.canary)


def _read_open(host: Host) -> bool:
    return _can_read(host.open)


def _see_files(host: Host) -> bool:
    try:
        return Path(host.canary).exists()
    except PermissionError:
        return False


def _see_processes(host: Host) -> bool:
    return Path("/proc/self/ns/pid").stat().st_ino == host.processes


def _reach_grader(host: Host) -> bool:
    if not _see_processes(host):
        return False  # the number is another's
    for reach in (lambda: os.kill(host.grader, 0), lambda: resource.prlimit(host.grader, resource.RLIMIT_CORE)):
        with contextlib.suppress(OSError):
            reach()
            return True
    return False


def _reach_port(host: Host) -> bool:
    try:
        socket.create_connection(("127.0.0.1", host.port), 1).close()
    except OSError:
        return False
    return True


def _reach_socket(host: Host) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(host.socket)
    except OSError:
        return False
    return True


def _make_namespace(host: Host) -> bool:
    new_user = 0x10000000  # CLONE_NEWUSER
    told = struct.pack("=8Q", new_user, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    ways: tuple[Callable[[], int], ...] = (
        lambda: _libc.syscall(CLONE[platform.machine()], new_user | signal.SIGCHLD, 0, 0, 0, 0),
        lambda: _libc.syscall(CLONE3, told, ctypes.c_long(len(told))),
    )
    for clone in ways:
        child = clone()
        if child == 0:
            os._exit(0)
        if child > 0:
            os.waitpid(child, 0)
            return True
    return int(_libc.unshare(new_user)) == 0


def _trace(host: Host) -> bool:
    return int(_libc.ptrace(0, 0, 0, 0)) == 0  # PTRACE_TRACEME


def _fill_disk(host: Host) -> bool:
    return any(_can_fill(Path(folder)) for folder in ("/dev", "/dev/shm", "/tmp", "/", os.environ["HOME"]))


def _can_fill(folder: Path) -> bool:
    """Whether several files, each as large as it may be, take more than the limit."""
    files = [folder / f"full-{number}" for number in range(4)]
    try:
        return all(_can_write(file, bytes(LIMITS.disk_bytes)) for file in files)
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                file.unlink()


def _write_settings(host: Host) -> bool:
    setting = Path("/proc/sys/kernel/core_pattern")
    try:
        return _can_write(setting, setting.read_bytes())  # root's own, where the user inside is root outside
    except OSError:
        return False


def _outlive(host: Host) -> bool:
    if os.fork() == 0:
        with contextlib.suppress(OSError):  # it may have to stay in its session
            os.setsid()
        time.sleep(30)
        os._exit(0)
    return False  # seen from outside


def _fork_past_limit(host: Host) -> bool:
    """By threads, which the limit counts too: a fork of a large process takes long."""
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(2 * LIMITS.processes)]
    usual = threading.stack_size(2**18)
    try:
        for thread in threads:
            thread.start()
    except RuntimeError:
        return False
    finally:
        end.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        threading.stack_size(usual)
    return True


def _exceed_memory(host: Host) -> bool:
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


def _can_read(file: str) -> bool:
    try:
        return bool(Path(file).read_bytes())
    except OSError:
        return False


# Each must not work, but for what a level says of itself.
ATTEMPTS: dict[str, Callable[[Host], bool]] = {
    "write to the host": _write_host,
    "read the host": _read_host,
    "read what is open to all users": _read_open,
    "see which files there are": _see_files,
    "see the host's processes": _see_processes,
    "signal or limit the grader": _reach_grader,
    "reach a port of the host": _reach_port,
    "reach a socket of the host": _reach_socket,
    "make a user namespace": _make_namespace,
    "trace processes": _trace,
    "fill a file system": _fill_disk,
    "write the kernel's settings": _write_settings,
    "outlive the parent": _outlive,
    "fork past the limit": _fork_past_limit,
    "take more memory than the limit": _exceed_memory,
}


def main(descriptor: int) -> None:
    """What the worker of a probe does."""
    channel = Channel(socket.socket(fileno=descriptor))
    host = Host(*channel.receive())
    channel.send([name for name, works in ATTEMPTS.items() if works(host)])
