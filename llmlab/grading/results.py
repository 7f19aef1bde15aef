"""The results of a lab's submissions: a log that a kill cannot harm, one line of JSON each, the last of a student counts."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


class GradingError(RuntimeError):
    """What an instructor or a student can mend; the message says how."""


class Busy(GradingError):
    """Another process is writing this log."""


class ResultLog:
    """Append results; each is on the disk when ``append`` returns. Opening it cuts off a line that a kill tore.

    Raises Busy where another process has it open.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._handle = file.open("a+b")
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._handle.close()
            raise Busy(f"another run is grading into {file}") from None
        self._cut_torn_line()

    def append(self, result: dict[str, Any]) -> None:
        self._handle.write(json.dumps(result, separators=(",", ":")).encode() + b"\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def _cut_torn_line(self) -> None:
        end = self._handle.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            start = max(0, keep - 65536)
            self._handle.seek(start)
            chunk = self._handle.read(keep - start)
            newline = chunk.rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < end:
            self._handle.truncate(keep)
            os.fsync(self._handle.fileno())

    def __enter__(self) -> ResultLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()


def results_file(course: Path, assignment: str) -> Path:
    """Where a lab's results are."""
    return course / "results" / f"{assignment}.jsonl"


def read_results(file: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a log, oldest first; one at a time, so that a long log takes little memory."""
    if not file.exists():
        return
    with file.open("rb") as handle:
        for line in handle:
            if line.endswith(b"\n"):
                yield json.loads(line)


def digests(file: Path) -> dict[str, str]:
    """Of each student's last result, what it depended on."""
    return {result["student"]: result["digest"] for result in read_results(file)}


def summaries(file: Path) -> dict[str, dict[str, Any]]:
    """Of each student's last result everything but the cells."""
    return {r["student"]: {k: v for k, v in r.items() if k != "cells"} for r in read_results(file)}
