"""The one writer: it brings results into nbgrader's gradebook and folders, so that its own tools see them.

What is written is decided by the result alone, so that writing it again changes nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbgrader.api import Gradebook, MissingEntry
from nbgrader.apps import NbGrader
from nbgrader.coursedir import CourseDirectory
from nbgrader.preprocessors import AssignLatePenalties
from sqlalchemy.exc import SQLAlchemyError

from llmlab.grading.feedback import feedback_page
from llmlab.grading.grade import UNGRADED
from llmlab.grading.graded import graded_notebook, record_of
from llmlab.grading.late import Lateness, read_timestamp
from llmlab.grading.notebooks import read_cells
from llmlab.grading.results import GradingError


class NotReleased(GradingError):
    """A lab that the gradebook does not know."""


@dataclass(frozen=True)
class Course:
    """A course as nbgrader's configuration describes it."""

    root: Path
    directory: CourseDirectory

    @classmethod
    def at(cls, folder: Path) -> Course:
        """The course whose ``nbgrader_config.py`` is in a folder."""
        app = NbGrader()
        app.log_level = "WARN"
        before = Path.cwd()
        os.chdir(folder)
        try:
            app.initialize([])
            app.load_config_file()
        finally:
            os.chdir(before)
        directory = CourseDirectory(config=app.config)
        return cls(Path(directory.root), directory)

    def folder(self, stage: str, student: str, assignment: str) -> Path:
        """The folder of one stage: "source_directory", "submitted_directory" and so on."""
        return Path(self.directory.format_path(getattr(self.directory, stage), student, assignment))

    def instructor_notebook(self, assignment: str) -> Path:
        return self.folder("source_directory", ".", assignment) / f"{assignment}.ipynb"

    @property
    def submitted(self) -> Path:
        return self.root / str(self.directory.submitted_directory)


class GradebookWriter:
    """Writes results; one at a time, each whole or not at all."""

    def __init__(self, course: Course, assignment: str, instructor: str) -> None:
        self._course, self._assignment = course, assignment
        self._instructor = read_cells(instructor.encode())
        self._gradebook = Gradebook(course.directory.db_url, course.directory.course_id)
        try:
            known = self._gradebook.find_notebook(assignment, assignment)
        except MissingEntry:
            raise NotReleased(
                f"the gradebook does not know {assignment!r}: run nbgrader generate_assignment {assignment} --force"
            ) from None
        if {cell.name for cell in known.grade_cells} != {cell.grade_id for cell in self._instructor if cell.grade}:
            raise NotReleased(
                f"the tests of {assignment!r} have changed since its release: run nbgrader generate_assignment {assignment} --force"
            )

    def is_written(self, student: str, digest: str, timestamp: str | None) -> bool:
        """Whether the student's result of this digest has been written to its end, and costs for lateness what it must."""
        file = self._autograded(student)
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))["metadata"]["llmlab"]
            if kept["digest"] != digest:
                return False
            return bool(kept["late"] == self.lateness(student, timestamp).to_json())
        except (OSError, ValueError, KeyError, TypeError, MissingEntry):
            return False

    def write(self, result: dict[str, Any], timestamp: str | None) -> None:
        """Scores to the gradebook, then the feedback, then the notebook; the last says that all is written.

        Raises ValueError or OSError for what the gradebook or the disk does not take.
        """
        try:
            late = self._score(result, timestamp)
        except SQLAlchemyError as error:
            self._gradebook.db.rollback()
            raise ValueError(f"the gradebook does not take it: {error}") from error
        feedback = self._course.folder("feedback_directory", result["student"], self._assignment)
        replace_file(feedback / f"{self._assignment}.html", feedback_page(result, late.note()))
        autograded = self._autograded(result["student"])
        notebook = graded_notebook(result, self._instructor)
        notebook.metadata["llmlab"]["late"] = late.to_json()
        stamp = autograded.with_name("timestamp.txt")
        if timestamp and not late.problem:
            replace_file(stamp, timestamp)
        else:
            stamp.unlink(missing_ok=True)
        replace_file(autograded, json.dumps(notebook, indent=1))

    def lateness(self, student: str, timestamp: str | None) -> Lateness:
        """What a submission of this time costs by the due date, the policy and the score of now. Raises MissingEntry for one
        that the gradebook does not know."""
        submission = self._gradebook.find_submission(self._assignment, student)
        when, problem = read_timestamp(timestamp)
        if when is None or submission.assignment.duedate is None:
            return Lateness(problem=problem)
        seconds = max(0.0, (when - submission.duedate).total_seconds())
        return Lateness(seconds, self._penalty(self._notebook(submission), student, seconds) or 0.0)

    def close(self) -> None:
        self._gradebook.close()

    def _autograded(self, student: str) -> Path:
        folder = self._course.folder("autograded_directory", student, self._assignment)
        return folder / f"{self._assignment}.ipynb"

    def _notebook(self, submission: Any) -> Any:
        return next(notebook for notebook in submission.notebooks if notebook.name == self._assignment)

    def _score(self, result: dict[str, Any], timestamp: str | None) -> Lateness:
        student, scores = result["student"], scores_of(result)
        self._gradebook.update_or_create_student(student)
        # nbgrader makes a submission object by object, and reads in between: what is half made must not be written then.
        with self._gradebook.db.no_autoflush:
            submission = self._gradebook.update_or_create_submission(self._assignment, student)
        submission.timestamp, _ = read_timestamp(timestamp)
        notebook = self._notebook(submission)
        for grade in notebook.grades:
            grade.auto_score = scores.get(grade.cell.name)
            grade.needs_manual_grade = grade.auto_score is None or grade.manual_score is not None
        self._gradebook.db.commit()
        late = self.lateness(student, timestamp)
        notebook.late_submission_penalty = late.penalty or None
        self._gradebook.db.commit()
        return late

    def _penalty(self, notebook: Any, student: str, seconds: float) -> float | None:
        if seconds <= 0:
            return None
        late = AssignLatePenalties(config=self._course.directory.config)
        late.init_plugin()
        penalty = late.plugin_inst.late_submission_penalty(student, notebook.score, seconds)
        return None if penalty is None else float(late._check_late_penalty(notebook, penalty))


def scores_of(result: dict[str, Any]) -> dict[str, float | None]:
    """The score of each test cell; none of a submission whose code was not run."""
    if result["status"] in UNGRADED:
        return {}
    return {cell["grade_id"]: record_of(cell).score for cell in result["cells"] if cell["outcomes"] is not None}


def replace_file(file: Path, text: str) -> None:
    """Write a file whole or not at all. Links in its place are replaced, not followed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    Path(name).chmod(0o644)
    Path(name).replace(file)
