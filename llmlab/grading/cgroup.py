"""A control group for one submission: what its processes may take together, and a sure way to end them all."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "llmlab-"


@dataclass(frozen=True)
class Group:
    """Folders of one group: one in the unified hierarchy (v2), or one for each controller (v1)."""

    folders: tuple[Path, ...]

    @property
    def entrances(self) -> list[Path]:
        """The files into which a process writes its id to be in the group."""
        return [folder / "cgroup.procs" for folder in self.folders]

    def processes(self) -> set[int]:
        return {int(line) for entrance in self.entrances for line in _read(entrance).split()}

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel ended a process of the group because the group had taken all its memory."""
        texts = [_read(folder / name) for folder in self.folders for name in ("memory.events", "memory.oom_control")]
        counts = [line.split() for text in texts for line in text.splitlines()]
        return any(key == "oom_kill" and int(count) > 0 for key, count in counts)

    def end(self, seconds: float = 5) -> None:
        """Kill every process of the group and remove it."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.002)
        for folder in self.folders:
            while folder.exists() and time.monotonic() < deadline:
                try:
                    folder.rmdir()
                except OSError:  # the last process is still being taken down
                    time.sleep(0.002)


def parents() -> tuple[Path, ...] | None:
    """The folders in which this process may make groups for memory and processes; None where it may not."""
    lines = [line.split(":", 2) for line in _read(Path("/proc/self/cgroup")).splitlines()]
    unified = next((ROOT / path.lstrip("/") for number, _, path in lines if number == "0"), None)
    if unified is not None and {"memory", "pids"} <= set(_read(unified / "cgroup.subtree_control").split()):
        return (unified,) if os.access(unified, os.W_OK) else None
    found = [
        ROOT / controller / path.lstrip("/")
        for _, controllers, path in lines
        for controller in controllers.split(",")
        if controller in ("memory", "pids")
    ]
    return tuple(found) if len(found) == 2 and all(os.access(f, os.W_OK) for f in found) else None


@contextlib.contextmanager
def group(name: str, memory_bytes: int, processes: int) -> Iterator[Group | None]:
    """A group with these limits for the block; None where none can be made."""
    made: list[Path] = []
    try:
        for parent in parents() or ():
            folder = parent / f"{PREFIX}{name}"
            folder.mkdir()
            made.append(folder)
        for folder in made:
            for file, value in _limits(memory_bytes, processes).items():
                if (folder / file).exists():
                    (folder / file).write_text(value)
    except OSError:
        for folder in made:
            folder.rmdir()
        made = []
    if not made:
        yield None
        return
    limited = Group(tuple(made))
    try:
        yield limited
    finally:
        limited.end()


def _limits(memory_bytes: int, processes: int) -> dict[str, str]:
    """File and value for both versions; a folder has those of its own."""
    return {
        "memory.max": str(memory_bytes), "memory.swap.max": "0",
        "memory.limit_in_bytes": str(memory_bytes), "memory.memsw.limit_in_bytes": str(memory_bytes),
        "pids.max": str(processes),
    }  # fmt: skip


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def sweep() -> None:
    """Remove the groups of graders that were killed: those without a process whose maker is gone."""
    for parent in parents() or ():
        for folder in parent.glob(f"{PREFIX}*-*"):
            maker = folder.name.removeprefix(PREFIX).partition("-")[0]
            if not Path(f"/proc/{maker}").exists():
                Group((folder,)).end(1)
