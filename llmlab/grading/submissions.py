"""Finding submissions on disk, and reading them without following anybody's tricks."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from llmlab.grading.notebooks import MOST_BYTES


@dataclass(frozen=True)
class Submitted:
    """What one student handed in: the notebook's text (None: missing), when, and what was left aside."""

    student: str
    text: str | None
    timestamp: str | None
    left_aside: tuple[str, ...] = ()


def find_students(folder: Path, assignment: str) -> list[str]:
    """The students with a folder for the assignment in ``submitted/<student>/<assignment>``."""
    if not folder.is_dir():
        return []
    return sorted(e.name for e in os.scandir(folder) if e.is_dir(follow_symlinks=False) and _has(e.path, assignment))


def read_submission(folder: Path, assignment: str, student: str) -> Submitted:
    """Read a student's notebook; links, devices and files beside it are left aside and named."""
    home = folder / student / assignment
    if not (_is_folder(folder / student) and _is_folder(home)):  # a link to another's folder, for one
        return Submitted(student, None, None)
    left = tuple(sorted(e.name for e in os.scandir(home) if not _is_wanted(e, assignment)))
    data = _read(home / f"{assignment}.ipynb", MOST_BYTES + 1)
    when = _read(home / "timestamp.txt", 200)
    return Submitted(
        student,
        None if data is None else data.decode("utf-8", "surrogateescape"),
        None if when is None else when.decode("ascii", "replace").strip(),
        left,
    )


def _has(student: str, assignment: str) -> bool:
    return _is_folder(Path(student, assignment))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _is_wanted(entry: os.DirEntry[str], assignment: str) -> bool:
    return entry.is_file(follow_symlinks=False) and entry.name in (f"{assignment}.ipynb", "timestamp.txt")


def _read(file: Path, most: int) -> bytes | None:
    """The first bytes of a plain file; None for anything else. A pipe is not waited for."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with os.fdopen(descriptor, "rb", closefd=False) as handle:
            return handle.read(most)
    finally:
        os.close(descriptor)
