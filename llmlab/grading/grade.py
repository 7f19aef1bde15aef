"""Grading one submission: from what was handed in to a result, without a database and without a shared path."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmlab.grading.checks import (
    LATE,
    LATE_HIDDEN,
    MEASUREMENT_TYPE,
    SECONDS_VARIABLE,
    SEED_VARIABLE,
    STUDENT_VARIABLE,
    Record,
)
from llmlab.grading.notebooks import Aligned, Unreadable, WrongStructure, align, read_cells
from llmlab.grading.sandbox import Level, Limits, Sandbox
from llmlab.grading.secret import keyed_seed
from llmlab.grading.session import Worker
from llmlab.grading.split import STUDENT, PartResult, run_split
from llmlab.grading.zygote import Zygote

STATUSES = ("ok", "timeout", "out of memory", "crashed", "unreadable", "wrong structure", "missing")
UNGRADED = ("unreadable", "wrong structure", "missing")  # no code was run, so there is no score


@dataclass(frozen=True)
class Bundle:
    """All that grading one submission takes; it can be sent to another machine as JSON."""

    assignment: str
    student: str
    instructor: str  # the instructor's notebook, hidden tests and all
    submission: str | None  # the submitted file; None where there is none
    secret: str
    limits: Limits = field(default_factory=Limits)
    level: Level = Level.FULL
    readable: tuple[tuple[str, str], ...] = ()  # host path -> path inside, read-only
    environment: tuple[tuple[str, str], ...] = ()
    gpu: bool = False  # the sandbox has the NVIDIA devices in it
    own: bool = False  # a student checks the own notebook: its visible tests are all that there is
    notes: tuple[str, ...] = ()  # how the submission was found, where that is to be said
    rehearsal: bool = False  # of the instructor's own answers: the result then names the modules that they load

    @property
    def digest(self) -> str:
        """What the result depends on; the same digest has the same result."""
        parts = [
            self.assignment, self.student, self.instructor, self.submission or "\0", self.secret, repr(self.limits),
            self.level.name, repr(self.gpu), version("llmlab"), platform.python_version(), *self.notes,
        ]  # fmt: skip
        return hashlib.sha256("\x1e".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def to_json(self) -> str:
        """The bundle as text; it holds the instructor's secret and the hidden tests."""
        return json.dumps({**dataclasses.asdict(self), "level": self.level.name})

    @classmethod
    def from_json(cls, text: str) -> Bundle:
        told = json.loads(text)
        pairs = {name: tuple((a, b) for a, b in told[name]) for name in ("readable", "environment")}
        return cls(
            **{
                **told,
                **pairs,
                "notes": tuple(told["notes"]),
                "limits": Limits(**told["limits"]),
                "level": Level[told["level"]],
            }
        )


def grade_one(bundle: Bundle, zygote: Zygote | None = None) -> dict[str, Any]:
    """Grade one submission. The result is JSON; its fields: see `_result`. A zygote makes its workers start at once."""
    start = time.monotonic()
    instructor = read_cells(bundle.instructor.encode("utf-8", "surrogatepass"))
    most = round(sum(cell.points for cell in instructor if cell.grade), 6)
    if bundle.submission is None:
        return _result(bundle, start, most, "missing", "; ".join(bundle.notes) or "nothing was handed in")
    try:
        aligned = align(instructor, read_cells(bundle.submission.encode("utf-8", "surrogatepass")))
    except Unreadable as error:
        return _result(bundle, start, most, "unreadable", str(error))
    except WrongStructure as error:
        return _result(bundle, start, most, "wrong structure", str(error))
    os.environ.update({
        SEED_VARIABLE: keyed_seed(bundle.secret, bundle.assignment, bundle.student),
        SECONDS_VARIABLE: str(bundle.limits.property_seconds),
    })  # fmt: skip
    # Nobody's, where a student checks the own work.
    named = {STUDENT_VARIABLE: bundle.student} if bundle.student else {}
    os.environ.update(named)
    environment = {**dict(bundle.environment), **named}
    readable = {Path(host): inside for host, inside in bundle.readable}
    worker = Worker(Sandbox(bundle.limits, bundle.level, readable, environment, bundle.gpu), zygote)
    try:
        results = run_split(aligned.parts, worker, whole=not bundle.own)
        modules = worker.modules() if bundle.rehearsal else []
    finally:
        worker.end()
    status = next((s for s in ("out of memory", "timeout", "crashed") if s in worker.troubles), "ok")
    result = _result(bundle, start, most, status, "", aligned, results)
    return {**result, "modules": modules} if bundle.rehearsal else result


def _result(
    bundle: Bundle,
    start: float,
    most: float,
    status: str,
    message: str,
    aligned: Aligned | None = None,
    results: list[PartResult] | None = None,
) -> dict[str, Any]:
    """Fields: who and what; status and message; score (None where no code was run) of max_score; each exercise's
    outcomes; measurements; the cells with the student's outputs; what was mended; how it was kept apart; seconds."""
    by_part = iter(results or ())
    cells: list[dict[str, Any]] = []
    for cell in aligned.cells if aligned else ():
        part = next(by_part) if cell.kind == "code" else PartResult()
        shown = cell.source if cell.role == STUDENT else cell.released()
        cells.append({
            "kind": cell.kind, "role": cell.role, "grade_id": cell.grade_id, "points": cell.points, "source": shown,
            "outputs": list(part.outputs), "error": part.error,
            "outcomes": None if part.record is None else part.record.to_json()["outcomes"],
        })  # fmt: skip
    records = [Record.from_json({"exercise": "", "outcomes": cell["outcomes"]}) for cell in cells if cell["outcomes"]]
    outputs = [output for cell in cells for output in cell["outputs"]]
    return {
        "assignment": bundle.assignment,
        "student": bundle.student,
        "digest": bundle.digest,
        "status": status,
        "message": message or ("" if status == "ok" else what_happened(cells)),
        "score": None if status in UNGRADED else round(sum(record.score for record in records), 6),
        "max_score": round(sum(record.points for record in records), 6) if bundle.own and records else most,
        "mended": [*(bundle.notes if status != "missing" else ()), *(aligned.mended if aligned else ())],
        "measurements": [o["data"][MEASUREMENT_TYPE] for o in outputs if MEASUREMENT_TYPE in o.get("data", {})],
        "cells": cells,
        "sandbox": bundle.level.value + ("; GPU" if bundle.gpu else "") if aligned else None,
        "limits": dataclasses.asdict(bundle.limits),
        "seconds": round(time.monotonic() - start, 3),
    }


STOPPED = {"Timeout": "took too long", "ProcessEnded": "ended the process", "WorkerError": "gave no answer"}
MOST_TOLD = 3


def what_happened(cells: list[dict[str, Any]]) -> str:
    """Which cells and properties were stopped or ended the process, the first few of them."""
    told = []
    for number, cell in enumerate(cells, 1):
        if cell["error"] is not None and cell["error"]["name"] in STOPPED:
            name = repr(cell["grade_id"]) if cell["grade_id"] else f"number {number}"
            told.append(f"the cell {name} {STOPPED[cell['error']['name']]}")
        for outcome in cell["outcomes"] or ():
            if outcome["message"].startswith((LATE, LATE_HIDDEN)):
                told.append(f"the property {outcome['property']!r} of {cell['grade_id']!r} took too long")
    more = f", and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
    return ", ".join(told[:MOST_TOLD]) + more


def to_json(result: dict[str, Any]) -> str:
    """The result as one line of JSON."""
    return json.dumps(result, ensure_ascii=True, separators=(",", ":"))
