"""Finding submissions on disk, and reading them without following anybody's tricks."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmlab.grading.notebooks import MOST_BYTES

MOST_TRIED = 5  # notebooks of another name that are looked into
MOST_NAMED = 5


@dataclass(frozen=True)
class Submitted:
    """What one student handed in: the notebook's text (None: missing), what is to be said of it, and what was left aside."""

    student: str
    text: str | None
    notes: tuple[str, ...] = ()
    left_aside: tuple[str, ...] = ()


def find_students(folder: Path, assignment: str) -> list[str]:
    """The students with a folder for the assignment in ``submitted/<student>/<assignment>``."""
    if not folder.is_dir():
        return []
    return sorted(e.name for e in os.scandir(folder) if e.is_dir(follow_symlinks=False) and _has(e.path, assignment))


def find_misplaced(folder: Path, assignment: str) -> dict[str, str]:
    """Work that lies where it is not looked for: whose it seems to be, and where it is."""
    found = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            lies = "" if not entry.is_symlink() and _has(str(entry), assignment) else _where_else(entry, assignment)
        except OSError as error:
            lies = f"cannot be read: {error}"
        if lies:
            found[entry.name] = lies
    return found


def read_submission(
    folder: Path, assignment: str, student: str, is_lab: Callable[[bytes], bool] = lambda data: False
) -> Submitted:
    """Read a student's notebook; links, devices and files beside it are left aside and named.

    is_lab: whether the content of a notebook of another name is clearly one of this lab; where just one is, it is taken.
    """
    home = folder / student / assignment
    if not (_is_folder(folder / student) and _is_folder(home)):  # a link to another's folder, for one
        return Submitted(student, None)
    entries = sorted(os.scandir(home), key=lambda entry: entry.name)
    left = tuple(e.name for e in entries if not _is_wanted(e, assignment))
    odd = [e.name for e in entries if not _is_plain(e) and not e.is_dir(follow_symlinks=False)]
    notes = [f"{name!r} is a link or a device and was not followed" for name in odd[:MOST_NAMED]]
    data = _read(home / f"{assignment}.ipynb", MOST_BYTES + 1)
    if data is None:
        others = [e.name for e in entries if _is_plain(e) and e.name.endswith(".ipynb")]
        contents = {name: _read(home / name, MOST_BYTES + 1) or b"" for name in others[:MOST_TRIED]}
        fitting = [name for name, content in contents.items() if is_lab(content)]
        if len(others) <= MOST_TRIED and len(fitting) == 1:
            data = contents[fitting[0]]
            notes.insert(0, f"there was no {assignment}.ipynb; {fitting[0]!r} was taken")
        elif left:
            more = f" and {len(left) - MOST_NAMED} more" if len(left) > MOST_NAMED else ""
            found = ", ".join(map(repr, left[:MOST_NAMED]))
            notes.insert(0, f"there is no plain file {assignment}.ipynb; found: {found}{more}")
    return Submitted(student, None if data is None else data.decode("utf-8", "surrogateescape"), tuple(notes), left)


def read_stamp(folder: Path, assignment: str, student: str) -> str | None:
    """What a student's timestamp.txt says; None where there is none."""
    home = folder / student / assignment
    when = _read(home / "timestamp.txt", 200) if _is_folder(folder / student) and _is_folder(home) else None
    return None if when is None else when.decode("ascii", "replace").strip()


def _where_else(student: Path, assignment: str) -> str:
    """Where work lies that seems to be of the assignment; "" where there is nothing like it."""
    path, expected = f"{student.parent.name}/{student.name}", f"{student.parent.name}/<student>/{assignment}/"
    if not student.is_dir():
        return f"it is not in a folder {expected}" if _is_like(student.name, assignment) else ""
    if (student / assignment).is_dir():
        return f"{path if student.is_symlink() else f'{path}/{assignment}'} is a link, and links are not followed"
    inside = sorted(student.iterdir())
    if student.name == assignment and any(there.is_dir() for there in inside):
        return f"{path}/ holds folders; expected is {expected}"
    like = [there.name for there in inside if _is_like(there.name, assignment)]
    return f"{path}/{like[0]} is not in a folder {expected}" if like else ""


def _is_like(name: str, assignment: str) -> bool:
    return name.casefold().startswith(assignment.casefold())


def _has(student: str, assignment: str) -> bool:
    return _is_folder(Path(student, assignment))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _is_plain(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False)


def _is_wanted(entry: os.DirEntry[str], assignment: str) -> bool:
    return _is_plain(entry) and entry.name in (f"{assignment}.ipynb", "timestamp.txt")


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
