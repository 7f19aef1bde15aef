"""A sandbox for one submission: bubblewrap with every namespace, no capability, a seccomp filter, limits on everything.

A worker is started in it as a program, or as a fork of a zygote that joins it, which is the same with its imports done.
Where no namespaces can be made, a program confines itself (`llmlab.grading.confine`).
What a level can do is found out by trying (`llmlab.grading.probe`), not by asking for versions.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO

from llmlab.grading import confine
from llmlab.grading.cgroup import Group, group
from llmlab.grading.seccomp import seccomp_filter
from llmlab.grading.zygote import Entry, Zygote, take_limit, write_group

HOME = "/student"
FEW = 4096  # bytes
CLEARING_SECONDS = 10.0
PACKAGE = Path(__file__).resolve().parent.parent
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
START = "import sys; from llmlab.grading.worker import main; main(int(sys.argv[1]))"


class SandboxError(RuntimeError):
    """A sandbox that could not be started; the message is what bubblewrap said."""


class Level(Enum):
    """How a submission is kept apart, the strongest first."""

    FULL = "bubblewrap, seccomp, cgroup"
    NO_CGROUP = (
        "bubblewrap, seccomp; no cgroup: memory and processes are limited one by one; memory that a large grader had mapped "
        "and freed can be filled beyond the limit, which counts new mappings only"
    )
    LANDLOCK = (
        "Landlock, seccomp; no namespaces: which files and processes there are can be seen, files are limited one by one, "
        "without a cgroup memory and processes too"
    )
    CONTAINER = (
        "a container: another user, seccomp; no namespaces: what is open to all users is open to it, which processes there "
        "are can be seen, files are limited one by one, without a cgroup memory too"
    )
    NONE = "NO SANDBOX: the code ran with the rights of the one who graded it"


BUBBLEWRAPPED = (Level.FULL, Level.NO_CGROUP)


@dataclass(frozen=True)
class Limits:
    """What one submission may take; the wall time is of all of it together."""

    seconds: float = 180.0
    cell_seconds: float = 60.0
    property_seconds: float = 10.0
    cpu_seconds: int = 300
    memory_bytes: int = 4 * 2**30
    processes: int = 64
    disk_bytes: int = 256 * 2**20
    open_files: int = 256


@dataclass
class Running:
    """A process in its sandbox."""

    process: subprocess.Popen[bytes]
    said: int  # a pipe: what the sandbox and Python's start said
    group: Group | None
    level: Level

    def end(self) -> None:
        """Kill it and everything that it started."""
        if self.level in (Level.LANDLOCK, Level.CONTAINER):
            self.process.terminate()  # a supervisor, which does so and clears away
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(CLEARING_SECONDS)
        self.process.kill()
        if self.group is not None:
            self.group.end()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def ran_out_of_memory(self) -> bool:
        return self.group is not None and self.group.ran_out_of_memory()

    def last_words(self) -> str:
        """What the sandbox or Python's start said, for the instructor."""
        try:
            return os.read(self.said, FEW).decode(errors="replace").strip()
        except BlockingIOError:
            return ""


@dataclass(frozen=True)
class Sandbox:
    """How to start workers: the limits, the level, what they may read, what they find in the environment.

    readable: host path -> path inside, bound read-only. gpu: bind the NVIDIA devices (and set no limit on addresses).
    """

    limits: Limits
    level: Level
    readable: dict[Path, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    gpu: bool = False

    @contextlib.contextmanager
    def worker(self, descriptor: int, zygote: Zygote | None = None, start: str = START) -> Iterator[Running]:
        """A worker that serves on an open socket; it and all that it started is dead when the block ends.

        start: the program of one that is not forked from the zygote.
        """
        if zygote is None or self.level not in BUBBLEWRAPPED:
            with self.running([sys.executable, "-I", "-c", start, str(descriptor)], (descriptor,)) as started:
                yield started
            return
        ours, theirs = os.pipe()
        with os.fdopen(ours, "rb") as told, self.running(["cat"], (theirs,), holding=theirs) as started:
            os.close(theirs)
            zygote.start(self._entry(started, json.loads(_until_ready(started, told))["child-pid"]), descriptor)
            yield started

    @contextlib.contextmanager
    def running(
        self, command: list[str], descriptors: tuple[int, ...] = (), holding: int | None = None
    ) -> Iterator[Running]:
        """Run a command for the block. holding: where bubblewrap writes who holds the namespaces."""
        with contextlib.ExitStack() as stack:
            # A pipe, not a file: what runs inside can open it by /proc, and would fill the host's disk.
            said, words = os.pipe()
            stack.callback(os.close, said)
            stack.callback(os.close, words)
            os.set_blocking(said, False)
            limited = None
            if self.level not in (Level.NO_CGROUP, Level.NONE):
                name = f"{os.getpid()}-{os.urandom(4).hex()}"
                limited = stack.enter_context(group(name, self.limits.memory_bytes, self.limits.processes))
                if limited is None and self.level is Level.FULL:
                    raise SandboxError("no control group can be made any more")
            environment, folder = {"PATH": os.defpath}, None
            enter: Callable[[], None] | None = _entering(limited, self._tops(limited))
            if self.level in BUBBLEWRAPPED:
                command = [*self._bubblewrap(stack, holding), "--", *command]
                descriptors += (int(command[command.index("--seccomp") + 1]),)
            else:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llmlab-home-"))
                if self.level is Level.NONE:
                    environment = {**self._inside(folder), "PATH": os.environ.get("PATH", os.defpath)}
                else:
                    told = _unnamed(stack, self._confinement(command, folder, limited).to_bytes())
                    command, enter = [sys.executable, "-I", "-c", confine.START, str(told)], None
                    descriptors += (told,)
            pipe = subprocess.DEVNULL if holding is None else subprocess.PIPE
            process = subprocess.Popen(
                command, stdin=pipe, stdout=words if holding is None else pipe, stderr=words, env=environment, cwd=folder,
                pass_fds=descriptors, start_new_session=True, preexec_fn=enter,
            )  # fmt: skip
            started = Running(process, said, limited, self.level)
            try:
                yield started
            finally:
                started.end()

    def _bubblewrap(self, stack: contextlib.ExitStack, holding: int | None) -> list[str]:
        readable = {**python_binds(), **self.readable}
        return [
            "bwrap", *_isolation(self.limits, self.gpu),
            *(part for host, inside in readable.items() for part in ("--ro-bind", str(host), inside)), "--remount-ro", "/",
            *(part for pair in self._inside(HOME).items() for part in ("--setenv", *pair)),
            *(() if holding is None else ("--info-fd", str(holding))),
            "--chdir", HOME, "--seccomp", str(_unnamed(stack, seccomp_filter())),
        ]  # fmt: skip

    def _confinement(self, command: list[str], home: str, limited: Group | None) -> confine.Confinement:
        links = {str(h): str(Path(i).relative_to(HOME)) for h, i in self.readable.items() if i != str(h)}
        reads = [host for host in (*python_binds(), *self.readable) if str(host) not in links]
        if not any(PACKAGE.is_relative_to(host) for host in reads if host != PACKAGE) and command[1:3] == ["-I", "-c"]:
            # Python lists the folder that it imports from, and beside a checkout's package there may be anything.
            links[str(PACKAGE)] = f".packages/{PACKAGE.name}"
            reads.remove(PACKAGE)
            first = f"import sys; sys.path.insert(0, {str(Path(home, '.packages'))!r}); "
            command = [*command[:3], first + command[3], *command[4:]]
        return confine.Confinement(
            os.getpid(), self.level is Level.CONTAINER, command, self._inside(home), home, links, list(map(str, reads)),
            _devices(self.gpu), _entrances(limited), list(self._tops(limited)),
        )  # fmt: skip

    def _inside(self, home: str) -> dict[str, str]:
        """The environment inside."""
        return {
            "PATH": "/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8", "TMPDIR": home, "IPYTHONDIR": f"{home}/.ipython",
            "MPLBACKEND": "agg", "MPLCONFIGDIR": f"{home}/.matplotlib", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0",
            **ONE_THREAD, **self.environment,
        }  # fmt: skip

    def _tops(self, limited: Group | None) -> tuple[tuple[int, int], ...]:
        """Resource limits; what a control group does better is left to it."""
        tops = {
            resource.RLIMIT_CPU: self.limits.cpu_seconds, resource.RLIMIT_FSIZE: self.limits.disk_bytes,
            resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: self.limits.open_files, resource.RLIMIT_MSGQUEUE: 0,
        }  # fmt: skip
        if limited is None and self.level is not Level.NONE:
            own_user = self.level not in BUBBLEWRAPPED and os.geteuid() == 0
            tops[resource.RLIMIT_NPROC] = (0 if own_user else confine.threads_of(os.getuid())) + self.limits.processes
            if not self.gpu:
                tops[resource.RLIMIT_AS] = self.limits.memory_bytes
        return tuple(tops.items())

    def _entry(self, started: Running, holder: int) -> Entry:
        entrances, tops = tuple(_entrances(started.group)), self._tops(started.group)
        return Entry(holder, entrances, tops, self._inside(HOME), HOME, seccomp_filter())


def _until_ready(started: Running, told: IO[bytes]) -> bytes:
    """Wait until the sandbox is whole: what runs in it gives back a line."""
    process = started.process
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"ready\n")
        process.stdin.flush()
        ready = process.stdout.readline()
    except BrokenPipeError:
        ready = b""
    if ready != b"ready\n":
        raise SandboxError(started.last_words() or "bubblewrap ended at once")
    return told.read()


def python_binds() -> dict[Path, str]:
    """This Python, its packages and llmlab, each at its own path; no labs, no tests, no one's work."""
    paths = {Path(sys.base_prefix).resolve(), Path(sys.prefix), PACKAGE}
    return {path: str(path) for path in sorted(paths) if not path.is_relative_to("/usr")}


def has_bubblewrap() -> bool:
    return shutil.which("bwrap", path=os.defpath) is not None


def _devices(gpu: bool) -> list[str]:
    return sorted(map(str, Path("/dev").glob("nvidia*"))) if gpu else []


def _isolation(limits: Limits, gpu: bool) -> list[str]:
    binds = [part for device in _devices(gpu) for part in ("--dev-bind", device, device)]
    disk, shared = str(limits.disk_bytes), str(min(limits.disk_bytes, 64 * 2**20))
    return [
        "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        "--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--clearenv",
        "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/sbin", "/sbin",
        "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64",
        "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
        "--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", *binds, "--size", shared, "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
        "--size", disk, "--tmpfs", "/tmp", "--size", disk, "--tmpfs", HOME,
    ]  # fmt: skip


def _entering(limited: Group | None, tops: tuple[tuple[int, int], ...]) -> Callable[[], None]:
    """What the child does before it becomes the sandbox: enter the group, take on the limits."""

    def enter() -> None:
        for entrance in _entrances(limited):
            write_group(entrance)
        for what, most in tops:
            take_limit(what, most)

    return enter


def _entrances(limited: Group | None) -> list[str]:
    return list(map(str, limited.entrances)) if limited else []


def _unnamed(stack: contextlib.ExitStack, content: bytes) -> int:
    """A file without a name, open at its start."""
    file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file.fileno()
