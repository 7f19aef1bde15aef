"""Finding out what a sandbox is worth here, by trying inside it what must fail."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from llmlab.grading.attempts import LIMITS, Host
from llmlab.grading.attempts import main as attempt_all
from llmlab.grading.cgroup import parents, sweep
from llmlab.grading.confine import in_container, is_open
from llmlab.grading.landlock import LEAST_ABI, landlock_abi
from llmlab.grading.sandbox import BUBBLEWRAPPED, Level, Sandbox, SandboxError, has_bubblewrap
from llmlab.grading.wire import Channel, WireError, WorkerGone
from llmlab.grading.zygote import Zygote

SECONDS = 30.0  # an attempt takes milliseconds; on a busy machine, in a large process, seconds
# What a level does not keep from working; its own words say so.
KNOWN_TO_WORK: dict[Level, tuple[str, ...]] = {
    Level.FULL: (),
    Level.NO_CGROUP: ("fork past the limit",),  # for root
    Level.LANDLOCK: ("see which files there are", "see the host's processes", "fill a file system"),
    Level.CONTAINER: ("read what is open to all users", "see the host's processes", "fill a file system"),
}
START = "import sys; from llmlab.grading.attempts import main; main(int(sys.argv[1]))"
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
    for level in KNOWN_TO_WORK:
        if lacking := what_lacks(level):
            found = [lacking]
        elif found := try_level(level):
            found = [f"{level.name}: {weakness}" for weakness in found]
        else:
            return Probe(level, tuple(weaknesses), time.monotonic() - start)
        weaknesses += [weakness for weakness in found if weakness not in weaknesses]
    return Probe(Level.NONE, tuple(weaknesses), time.monotonic() - start)


def what_lacks(level: Level) -> str:
    """What a level needs that is not here, so that it need not be tried; "" where all is."""
    if level in BUBBLEWRAPPED and not has_bubblewrap():
        return "bubblewrap is not installed: sudo apt-get install bubblewrap"
    if level is Level.FULL and parents() is None:
        return "no control group may be made here; memory and processes are limited one by one"
    if level is Level.LANDLOCK and (abi := landlock_abi()) < LEAST_ABI:
        return (
            f"the kernel's Landlock is too old (ABI {abi}; Linux 6.2 has {LEAST_ABI})"
            if abi
            else "no Landlock in the kernel"
        )
    if level is Level.CONTAINER and not (in_container() and os.geteuid() == 0):
        return "this is no container with root as the grader"
    return ""


def refusal(unsandboxed: bool, course: Path | None = None) -> tuple[Level, str]:
    """The level to grade others' work at, and why it is refused ("" where it is not).

    course: a folder with others' work and hidden tests in it.
    """
    if unsandboxed:
        return Level.NONE, ""
    found = probe()
    why = "; ".join(found.weaknesses)
    if not found.is_sandbox:
        return found.level, f"there is no sandbox here, so others' work is not run. {why}"
    if found.level is Level.CONTAINER and course is not None and is_open(course):
        open_to = f"{course.resolve()} is open to all users, and so to the work that is run here: chmod o-rwx {course.resolve()}"
        return found.level, f"{open_to}. A stronger sandbox needs no such thing: {why}"
    return found.level, ""


def try_level(level: Level) -> list[str]:
    """What gets through a sandbox of this level, or why there is none; empty where it holds.

    A worker is tried that was forked from a zygote, as graders start them; bubblewrap starts the same sandbox under it.
    Where there is no bubblewrap it is a program.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmlab-probe-")))
        readable, canary, open_to_all = folder / "readable", folder / "closed" / "canary", folder / "open"
        readable.mkdir()
        canary.parent.mkdir(mode=0o700)
        canary.write_text("canary", encoding="ascii")
        open_to_all.write_text("open", encoding="ascii")
        open_to_all.chmod(0o644)
        for place in (folder, readable):
            place.chmod(0o755)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0{folder}")
        abstract.listen()
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        zygote = None
        if level in BUBBLEWRAPPED:
            zygote = Zygote(attempt_all)
            stack.callback(zygote.end)
        host = Host(
            str(readable), str(canary), str(open_to_all), server.getsockname()[1], f"\0{folder}", os.getpid(),
            Path("/proc/self/ns/pid").stat().st_ino,
        )  # fmt: skip
        last_words = ""
        try:
            with Sandbox(LIMITS, level, {readable: str(readable)}).worker(theirs.fileno(), zygote, START) as started:
                theirs.close()
                channel = Channel(ours)
                try:
                    channel.send(list(host))
                    worked = list(channel.receive(seconds=SECONDS))
                finally:
                    last_words = started.last_words()
        except (SandboxError, OSError, WireError, WorkerGone) as error:
            said = last_words or str(error)
            return [next((mend for mark, mend in BLAMED.items() if mark in said), said)]
        try:
            channel.receive(seconds=1)  # the one that outlives its parent holds the other end open
        except TimeoutError:
            worked.append("outlive the parent")
        except WorkerGone:
            pass
        if (readable / "written").exists() and "write to the host" not in worked:
            worked.append("write to the host")
        return [attempt for attempt in worked if attempt not in KNOWN_TO_WORK[level]]
