"""Grading all submissions of a lab: find them, grade what changed, keep each result, bring it into the gradebook."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmlab.cache import cache_folder
from llmlab.grading.batch import Failure, Local, Outcome, Scheduler
from llmlab.grading.grade import Bundle
from llmlab.grading.gradebook import Course, GradebookWriter, replace_file
from llmlab.grading.late import Lateness
from llmlab.grading.notebooks import is_of_lab, read_cells
from llmlab.grading.results import ResultLog, digests, read_results, results_file
from llmlab.grading.sandbox import HOME, Level, Limits
from llmlab.grading.secret import course_secret
from llmlab.grading.submissions import Submitted, find_misplaced, find_students, read_stamp, read_submission


@dataclass(frozen=True)
class Plan:
    """What is to be graded, and how."""

    course: Course
    assignment: str
    level: Level
    limits: Limits = field(default_factory=Limits)
    readable: tuple[tuple[str, str], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    force: bool = False
    gpu: bool = False
    chosen: frozenset[str] | None = None  # the students that it is about; None for all

    @property
    def log_file(self) -> Path:
        return results_file(self.course.root, self.assignment)

    def instructor(self) -> str:
        file = self.course.instructor_notebook(self.assignment)
        if not file.exists():
            raise FileNotFoundError(f"no notebook {file}: build the lab first (llmlab labs build)")
        return file.read_text(encoding="utf-8")

    def students(self) -> list[str]:
        found = find_students(self.course.submitted, self.assignment)
        return found if self.chosen is None else [student for student in found if student in self.chosen]

    def misplaced(self) -> dict[str, str]:
        return find_misplaced(self.course.submitted, self.assignment)

    def submission(self, student: str) -> Submitted:
        def is_lab(data: bytes) -> bool:
            return is_of_lab(read_cells(self.instructor().encode()), data)

        return read_submission(self.course.submitted, self.assignment, student, is_lab)

    def bundle(self, student: str, instructor: str, submission: str | None, notes: tuple[str, ...] = ()) -> Bundle:
        """What grading this text as the student's takes; notes: what is to be said of how it was found."""
        return Bundle(
            self.assignment, student, instructor, submission, course_secret(self.course.root), self.limits, self.level,
            self.readable, self.environment, self.gpu, notes=notes,
        )  # fmt: skip


@dataclass(frozen=True)
class Rehearsal:
    """The instructor's own answers, graded as a student's: what they earn, and which modules they load."""

    score: float
    max_score: float
    modules: tuple[str, ...]


REFERENCE = "student-00"  # whose id the released notebook has


def rehearse(plan: Plan) -> Rehearsal:
    """Grade the instructor's notebook; kept until it, or what it is graded with, changes. Raises RuntimeError if it cannot be."""
    instructor = plan.instructor()
    bundle = replace(plan.bundle(REFERENCE, instructor, instructor), rehearsal=True)
    file = plan.log_file.with_name(f"{plan.assignment}-rehearsal.json")
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if kept.get("digest") != bundle.digest:
        outcome = next(Local(1).run([bundle]))
        if isinstance(outcome, Failure):
            raise RuntimeError(
                f"the instructor's own answers to {plan.assignment!r} cannot be graded: {outcome.reason}"
            )
        kept = {key: outcome[key] for key in ("digest", "score", "max_score", "modules")}
        replace_file(file, json.dumps(kept))
    return Rehearsal(kept["score"], kept["max_score"], tuple(kept["modules"]))


@dataclass
class Tally:
    """How a run went."""

    unchanged: int = 0
    graded: int = 0
    failures: list[Failure] = field(default_factory=list)
    late: dict[str, Lateness] = field(default_factory=dict)  # of each student whose submission is there and was graded


def grade_class(plan: Plan, scheduler: Scheduler, progress: Callable[[str], None] = lambda student: None) -> Tally:
    """Grade every submission that has changed since its last result; ``progress`` is called with each that is done.

    A result is on the disk before the gradebook hears of it; what a kill kept from the gradebook comes in first.
    """
    instructor, tally = plan.instructor(), Tally()
    with ResultLog(plan.log_file) as log:
        writer = GradebookWriter(plan.course, plan.assignment, instructor)
        try:
            known = {} if plan.force else digests(plan.log_file)
            _catch_up(plan, writer, known, tally)
            for outcome in scheduler.run(_changed(plan, instructor, known, tally, progress)):
                _take(outcome, plan, log, writer, tally)
                progress(outcome.student if isinstance(outcome, Failure) else outcome["student"])
            for student in plan.students():
                _note_lateness(plan, writer, student, tally)
        finally:
            writer.close()
    tally.failures += [Failure(name, where) for name, where in plan.misplaced().items()]
    return tally


def _catch_up(plan: Plan, writer: GradebookWriter, known: dict[str, str], tally: Tally) -> None:
    """Write the results that are in the log and not in the gradebook, or there with another lateness than that of now."""
    there = known.keys() & set(plan.students())
    behind = {student for student in there if not writer.is_written(student, known[student], _timestamp(plan, student))}
    for result in read_results(plan.log_file) if behind else ():
        if result["student"] in behind and known[result["student"]] == result["digest"]:
            _bring_in(result, plan, writer, tally)
            behind.discard(result["student"])


def _bring_in(result: dict[str, Any], plan: Plan, writer: GradebookWriter, tally: Tally) -> bool:
    """Write a result; what keeps one from the gradebook must not keep the others, too."""
    try:
        writer.write(result, _timestamp(plan, result["student"]))
    except (OSError, ValueError) as error:
        tally.failures.append(Failure(result["student"], f"graded, and not brought into the gradebook: {error}"))
        return False
    return True


def _note_lateness(plan: Plan, writer: GradebookWriter, student: str, tally: Tally) -> None:
    with contextlib.suppress(OSError, ValueError):  # one that is named among the failures
        tally.late[student] = writer.lateness(student, _timestamp(plan, student))


def _changed(
    plan: Plan, instructor: str, known: dict[str, str], tally: Tally, progress: Callable[[str], None]
) -> Iterator[Bundle]:
    for student in plan.students():
        try:
            submitted = plan.submission(student)
        except OSError as error:
            tally.failures.append(Failure(student, f"cannot be read: {error}"))
            progress(student)
            continue
        bundle = plan.bundle(student, instructor, submitted.text, submitted.notes)
        if known.get(student) == bundle.digest:
            tally.unchanged += 1
            progress(student)
        else:
            yield bundle


def _take(outcome: Outcome, plan: Plan, log: ResultLog, writer: GradebookWriter, tally: Tally) -> None:
    if isinstance(outcome, Failure):
        tally.failures.append(outcome)
        return
    log.append(outcome)
    tally.graded += _bring_in(outcome, plan, writer, tally)


def _timestamp(plan: Plan, student: str) -> str | None:
    return read_stamp(plan.course.submitted, plan.assignment, student)


def model_cache() -> tuple[tuple[str, str], ...]:
    """What submissions may read beside the package: the models and texts of the cache, where llmlab looks for them."""
    folders = (cache_folder() / name for name in ("models", "text"))
    return tuple((str(f), f"{HOME}/.cache/llmlab/{f.name}") for f in folders if f.is_dir())
