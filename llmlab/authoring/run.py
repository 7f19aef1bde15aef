"""Running one exercise of a lab in this process: the author's own answers, to try the grader with.

Students' work is never run this way.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llmlab.authoring.lab import Exercise, Lab
from llmlab.grading.checks import SEED_VARIABLE, STUDENT_VARIABLE, Outcome, Record, seed_of
from llmlab.grading.withhold import restored_behind

Replace = Callable[[dict[str, Any]], None]


def run_exercise(
    lab: Lab,
    exercise: Exercise,
    answer: str,
    student: str,
    replace: Replace | None = None,
    earlier: Mapping[str, str] | None = None,
) -> Record:
    """Run the lab's given cells, the answers before this exercise, then ``answer`` and the exercise's checks.

    replace: may change the namespace between answer and checks. An answer that raises leaves its name undefined.
    earlier: sources of the answers to earlier exercises; the reference's where there is none. What the given cells
    withhold is withheld for the run, as from a student.
    """
    namespace: dict[str, Any] = {"__name__": "__lab__"}
    with _as_submission(lab.name, student), contextlib.redirect_stdout(io.StringIO()), restored_behind():
        for source in _before(lab, exercise, earlier or {}):
            exec(compile(source, lab.path.name, "exec"), namespace)
            if "student_id" in namespace:
                namespace["student_id"] = student
        try:
            exec(compile(answer, lab.path.name, "exec"), namespace)
        except Exception as error:  # the answer's own failure: the checks then find its name missing
            namespace["answer_error"] = error
        if replace is not None:
            replace(namespace)
        try:
            exec(compile(exercise.tests, lab.path.name, "exec"), namespace)
        except Exception as error:
            if "check" not in namespace or not namespace["check"].record.outcomes:
                return Record(exercise.name, (Outcome("runs", exercise.points, False, False, repr(error)),))
    record = namespace["check"].record
    assert isinstance(record, Record)
    return record


def hidden_score(record: Record) -> float:
    """Points earned on the properties that a student cannot see."""
    return sum(o.points for o in record.outcomes if o.passed and o.hidden)


def _before(lab: Lab, exercise: Exercise, earlier: Mapping[str, str]) -> Iterator[str]:
    """Sources of the cells that the exercise stands on: what names the student, the given cells, earlier answers."""
    locked_seen = False
    for cell in lab.cells:
        metadata = cell.metadata.get("nbgrader", {})
        if metadata.get("grade_id") == exercise.name:
            return
        locked = metadata.get("locked") and not metadata.get("grade")
        locked_seen = locked_seen or bool(locked)
        if cell.cell_type == "code" and (locked or metadata.get("solution") or (not metadata and not locked_seen)):
            yield earlier.get(metadata.get("grade_id"), cell.source)


@contextlib.contextmanager
def _as_submission(lab: str, student: str) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in (SEED_VARIABLE, STUDENT_VARIABLE)}
    os.environ.update({SEED_VARIABLE: seed_of(lab, student), STUDENT_VARIABLE: student})
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
