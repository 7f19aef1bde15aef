"""A sandbox where no namespaces can be made: a supervisor, and a worker that confines itself before it reads anything.

Where the kernel has Landlock, the worker reaches no files but those that it needs. Started by root it becomes a user whom
nobody else is, if that user can read Python. The filter of system calls leaves it no way to others. The supervisor, a
clean program, ends all that the worker started and removes what it left, when it is told to and when the grader is killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from llmlab.grading.landlock import LEAST_ABI, READ, USE, WRITE, landlock_abi, restrict
from llmlab.grading.seccomp import seccomp_filter
from llmlab.grading.zygote import (
    close_others,
    die_with_parent,
    give_up_rights,
    load_filter,
    prctl,
    take_limit,
    write_group,
)

START = "import sys; from llmlab.grading.confine import main; main(int(sys.argv[1]))"
SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/proc/cpuinfo", "/proc/meminfo", "/dev/zero",
    "/dev/urandom",
)  # fmt: skip
OPEN_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock")  # where every user may write
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
PR_SET_CHILD_SUBREAPER = 36
FEWEST_USERS = 2000
AT_ONCE = 500  # files that one rm removes


@dataclass(frozen=True)
class Confinement:
    """What a supervisor is told: what to run, and what that may do."""

    grader: int  # the process that starts the supervisor; the sandbox ends with it
    as_user: bool  # the worker must become another user
    command: list[str]
    environment: dict[str, str]
    home: str  # an empty folder, which the supervisor removes
    links: dict[str, str]  # host path -> path in the home
    reads: list[str]  # paths
    devices: list[str]
    entrances: list[str]  # files of its control groups
    tops: list[tuple[int, int]]  # resource -> limit

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def in_container() -> bool:
    """Whether this runs in a container of Docker's, Podman's or systemd's kind."""
    try:
        told = Path("/proc/1/environ").read_bytes().split(b"\0")
    except OSError:
        told = []
    return any(Path(mark).exists() for mark in CONTAINER_MARKS) or any(line.startswith(b"container=") for line in told)


def is_reachable(path: Path) -> bool:
    """Whether every user may enter the folders above and read what is there."""
    path = path.resolve()
    return bool(path.stat().st_mode & 0o004) and all(folder.stat().st_mode & 0o001 for folder in path.parents)


def is_open(folder: Path) -> bool:
    """Whether a user who is nobody in particular can get at anything in a folder."""
    folder = folder.resolve()
    return all(place.stat().st_mode & 0o001 for place in folder.parents) and bool(folder.stat().st_mode & 0o007)


def threads_of(*users: int) -> int:
    """Threads that run as these users."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid in users:
                count += len(list((folder / "task").iterdir()))
    return count


def main(descriptor: int) -> None:
    """The supervisor's life: prepare, start the worker, wait for the word that it is over, clear away."""
    with os.fdopen(descriptor, "rb") as file:
        told = Confinement(**json.load(file))
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    die_with_parent(by=signal.SIGTERM)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    user, worker = 0, 0
    try:
        user, lock = _own_user() if _may_be_another(told) else (0, None)
        _furnish(told, user)
        supervisor = os.getpid()
        worker = os.fork()
        if worker == 0:
            _become_worker(told, user, supervisor)
        close_others((lock.fileno(),) if lock else ())
        if os.getppid() == told.grader:
            signal.sigwait((signal.SIGTERM,))
    except OSError as error:
        sys.exit(str(error))
    finally:
        if worker:
            _end(worker, user)
        _clear(told.home, user)


def _become_worker(told: Confinement, user: int, supervisor: int) -> NoReturn:
    try:
        allowed = list(_allowed(told, user))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
        os.setsid()
        os.umask(0o077)
        for entrance in told.entrances:
            write_group(entrance)
        for what, most in told.tops:
            take_limit(what, most)
        if user:
            take_user(user)
        die_with_parent()  # a change of user forgets it
        os.chdir(told.home)
        give_up_rights()
        if (abi := landlock_abi()) >= LEAST_ABI:
            restrict(abi, allowed)
        load_filter(seccomp_filter(alone=True, own=0 if user else os.getpid()))
        if os.getppid() == supervisor:
            os.execve(told.command[0], told.command, told.environment)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def take_user(user: int) -> None:
    """Become a user, in its own group and no other."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _allowed(told: Confinement, user: int) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """What Landlock lets the worker reach."""
    yield from ((Path(path), READ) for path in (*SYSTEM, f"/proc/{os.getpid()}", *told.reads))
    yield from ((Path(host), READ) for host in told.links if not user or is_reachable(Path(host)))
    yield from ((Path(device), USE) for device in told.devices)
    yield Path("/dev/null"), ("READ_FILE", "WRITE_FILE")
    yield Path(told.home), WRITE


def _own_user() -> tuple[int, socket.socket]:
    """The number of a user whom nobody is, and what keeps it from other supervisors while it is open.

    The number behind it is kept free as well: see `_kill_all`.
    """
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text("ascii").splitlines()]
    top = min(2**31, max(inside + count for inside, _, count in ranges)) - 2  # behind them is "nobody"
    few = top // 16
    if few < FEWEST_USERS:
        raise OSError("this container has too few user numbers for one of the worker's own")
    known = {entry.pw_uid for entry in pwd.getpwall()}
    while True:
        user = top - 2 * (1 + int.from_bytes(os.urandom(8), "big") % (few // 2))
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0llmlab-user-{user}")
            if threads_of(user, user + 1) == 0 and not known & {user, user + 1}:
                return user, lock
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        lock.close()


def _may_be_another(told: Confinement) -> bool:
    """Whether the worker can become another user. Raises PermissionError where it must and cannot."""
    root = os.geteuid() == 0
    closed = [path for path in told.reads if root and not is_reachable(Path(path))]
    if told.as_user and closed:
        raise PermissionError(
            f"another user cannot read {closed[0]}: open the folders above it (chmod o+x), or install it elsewhere"
        )
    if told.as_user and not root:
        raise PermissionError("only root can become another user")
    return root and not closed


def _furnish(told: Confinement, user: int) -> None:
    """Put into the home what the worker shall find there; all of it becomes the user's."""
    for host, inside in told.links.items():
        place = Path(told.home, inside)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not user or is_reachable(Path(host)):
            place.symlink_to(host)
        else:
            shutil.copytree(host, place, copy_function=_link)
    for folder, _, _ in os.walk(told.home) if user else ():
        os.chown(folder, user, user)


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy of it where there can be none that others may read."""
    if Path(source).stat().st_mode & 0o004:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
    Path(target).chmod(0o644)


def _end(worker: int, user: int) -> None:
    """Kill all that runs in the sandbox, and wait until it is gone. What lost its parent is a child of this process."""
    os.kill(worker, signal.SIGKILL)  # should it be itself no more than half confined
    while True:
        if user:
            _kill_all(user)
        else:
            with contextlib.suppress(ProcessLookupError):  # not a group yet
                os.killpg(worker, signal.SIGKILL)  # all are in it: the filter allows no other
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _kill_all(user: int) -> None:
    """Kill every process of a user at one stroke, which none of them can outrun, nor strike back at."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            # May signal the user's processes by its effective number; they may not signal it, whose others differ.
            os.setresuid(user + 1, user, user + 1)
            give_up_rights()
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def _clear(home: str, user: int) -> None:
    """Remove the home, and what the user left where everybody may write."""
    if not user:
        os.spawnlp(os.P_WAIT, "chmod", "chmod", "-R", "u+rwx", "--", home)
    left = [home, *(path for folder in OPEN_FOLDERS if user for path in _of_user(folder, user))]
    for start in range(0, len(left), AT_ONCE):
        os.spawnlp(os.P_WAIT, "rm", "rm", "-rf", "--", *left[start : start + AT_ONCE])  # no tree is too deep for it


def _of_user(folder: str, user: int) -> Iterable[str]:
    """What belongs to a user in a folder, and in folders in it where everybody may write."""
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            about = path.lstat()
            if about.st_uid == user:
                yield str(path)
            elif stat.S_ISDIR(about.st_mode) and about.st_mode & 0o003 == 0o003:
                yield from _of_user(str(path), user)
