"""A worker that begins with its imports done: a fork of a clean process enters a sandbox that bubblewrap holds open.

Importing torch takes seconds, a fork milliseconds. The process that is forked must know nothing worth hiding: it is
made before the grader learns what it grades, from a server whose environment is empty. The fork joins the namespaces
(setns(2)), and gives up what bubblewrap would have taken before it runs a program: capabilities, new privileges, the
system calls of the filter.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

USER_NAMESPACE = 0x10000000  # CLONE_NEWUSER and its like
NAMESPACES = {
    "cgroup": 0x02000000, "ipc": 0x08000000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000, "mnt": 0x00020000,
}  # fmt: skip
NS_GET_USERNS = 0xB701  # ioctl: the user namespace that owns a namespace
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 22, 24, 38, 47
SECCOMP_MODE_FILTER, PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
CAPABILITY_VERSION_3 = 0x20080522
HIGHEST_CAPABILITY = 63
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Entry:
    """What a fork is told: whose namespaces to join, what to take on."""

    holder: int  # the process that holds the namespaces open
    entrances: tuple[str, ...]  # files of its control groups
    tops: tuple[tuple[int, int], ...]  # resource -> limit
    environment: dict[str, str]
    home: str
    filter: bytes

    def to_bytes(self) -> bytes:
        return json.dumps({**vars(self), "filter": self.filter.hex()}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        told = json.loads(data)
        tops = tuple((int(what), int(most)) for what, most in told["tops"])
        return cls(
            **{**told, "filter": bytes.fromhex(told["filter"]), "tops": tops, "entrances": tuple(told["entrances"])}
        )


class Zygote:
    """A clean process that makes workers; make it before anything secret is in memory."""

    def __init__(self, serve: Callable[[int], None]) -> None:
        """``serve`` is what a worker does with its socket's descriptor."""
        self._near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = os.fork()
        if self._process == 0:
            close_others((far.fileno(),))
            _answer(far, serve)
        far.close()

    def start(self, entry: Entry, descriptor: int) -> None:
        """A new worker on an open socket. Raises OSError where it could not enter."""
        socket.send_fds(self._near, [entry.to_bytes()], [descriptor])
        said = self._near.recv(4096)
        if said != b"entered":
            raise OSError(said.decode(errors="replace") or "the zygote has ended")

    def end(self) -> None:
        self._near.close()
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


def _answer(requests: socket.socket, serve: Callable[[int], None]) -> NoReturn:
    """The zygote's life: fork for each request, until the other end closes."""
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, 65536, 1)
        if not data:
            os._exit(0)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _become_worker(Entry.from_bytes(data), descriptors[0], requests, serve)
        os.close(descriptors[0])


def _become_worker(entry: Entry, descriptor: int, requests: socket.socket, serve: Callable[[int], None]) -> NoReturn:
    """Join the namespaces; the process that is inside all of them is a child of this one."""
    try:
        die_with_parent()
        for entrance in entry.entrances:
            write_group(entrance)
        _join(entry.holder)
        child = os.fork()
    except OSError as error:
        requests.send(str(error).encode()[:4000])
        os._exit(1)
    if child:
        requests.close()
        os.close(descriptor)
        os.waitpid(child, 0)
        os._exit(0)
    try:
        _settle(entry, keep=(descriptor, requests.fileno()))
        requests.send(b"entered")
        requests.close()
    except OSError as error:
        requests.send(str(error).encode()[:4000])
        os._exit(1)
    try:
        serve(descriptor)
    finally:
        os._exit(0)  # whatever ended it, what the zygote was forked from is not for this process to go on with


def _join(holder: int) -> None:
    """Join all namespaces of a process: the user namespace that owns the others first, the innermost last."""

    def handle_of(name: str) -> int:
        return os.open(f"/proc/{holder}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def join(handle: int, kind: int) -> None:
        if _libc.setns(handle, kind) != 0:
            raise OSError(ctypes.get_errno(), f"cannot join a namespace of kind {kind:#x}")
        os.close(handle)

    innermost, others = handle_of("user"), {name: handle_of(name) for name in NAMESPACES}
    join(fcntl.ioctl(others["net"], NS_GET_USERNS), USER_NAMESPACE)
    for name, handle in others.items():
        join(handle, NAMESPACES[name])
    join(innermost, USER_NAMESPACE)


def _settle(entry: Entry, keep: tuple[int, ...]) -> None:
    """Inside: give up every right, take on every limit, forget the environment and every other open file."""
    os.setsid()
    os.chdir(entry.home)
    os.environ.clear()
    os.environ.update(entry.environment)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    close_others(keep)
    for what, most in entry.tops:
        # What the zygote had imported takes addresses, and is not the student's.
        take_limit(what, most + (_addresses() if what == resource.RLIMIT_AS else 0))
    give_up_rights()
    load_filter(entry.filter)


def give_up_rights() -> None:
    """No capability, and no program that would bring one."""
    for capability in range(HIGHEST_CAPABILITY + 1):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails beyond the kernel's last one
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "cannot give up capabilities")
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def load_filter(filtering: bytes) -> None:
    """Have the kernel refuse the system calls of a filter from here on; new privileges must have been given up."""
    program = ctypes.create_string_buffer(filtering, len(filtering))
    fprog = struct.pack("=HxxxxxxQ", len(filtering) // 8, ctypes.addressof(program))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(fprog, len(fprog)))


def close_others(keep: tuple[int, ...]) -> None:
    """Close every file but the standard ones and these."""
    for handle in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208  numbers, no paths
        if handle > 2 and handle not in keep:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(handle)


def die_with_parent(by: int = signal.SIGKILL) -> None:
    """Have the kernel kill this process when the thread that made it ends."""
    prctl(PR_SET_PDEATHSIG, by)


def write_group(entrance: str) -> None:
    """Enter a control group."""
    handle = os.open(entrance, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(handle, b"0")
    finally:
        os.close(handle)


def _addresses() -> int:
    """The bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")


def take_limit(what: int, most: int) -> None:
    """Lower a limit for good; one that is lower already stays."""
    hard = resource.getrlimit(what)[1]
    top = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (top, top))


def prctl(option: int, *arguments: Any) -> None:
    padded = [*arguments, 0, 0, 0, 0][:4]
    values = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in padded]
    if _libc.prctl(option, *values) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option} failed")
