"""One lab's grades in the forms that other systems read; a submission that was not graded has a blank, never a zero."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nbgrader.api import Gradebook, MissingEntry

from llmlab.grading.export import COLUMNS, grade_row, plain
from llmlab.grading.gradebook import Course
from llmlab.grading.graded import UNSAFE, is_unsafe, record_of
from llmlab.grading.results import results_file, summaries
from llmlab.grading.submissions import find_students


@dataclass(frozen=True)
class LabGrade:
    """What is known of a student and the student's grade in one lab; scores by hand and lateness are counted in."""

    student: str
    name: str  # "Last, First", or the id where the gradebook has no name
    email: str
    lms_id: str
    max_score: float
    row: dict[str, Any]
    comment: str

    @property
    def score(self) -> str:
        return number(self.row["score"]) if "score" in self.row else ""

    @property
    def is_unsafe(self) -> bool:
        return is_unsafe(self.row)


def lab_grades(course: Course, assignment: str) -> list[LabGrade]:
    """Every student of the gradebook, and who has handed in. Raises ValueError for a lab that was not released."""
    results = summaries(results_file(course.root, assignment))
    there = {*results, *find_students(course.submitted, assignment)}
    with Gradebook(course.directory.db_url, course.directory.course_id) as gradebook:
        try:
            lab = gradebook.find_assignment(assignment)
        except MissingEntry:
            raise ValueError(
                f"the gradebook does not know {assignment!r}: run nbgrader generate_assignment {assignment}"
            ) from None
        known = {student.id: student for student in gradebook.students}
        return [
            _lab_grade(gradebook, lab, student, known.get(student), results.get(student), student in there)
            for student in sorted(known.keys() | there)
        ]


def plain_csv(grades: Iterable[LabGrade], assignment: str) -> str:
    """The columns of ``nbgrader export``."""
    return _csv([COLUMNS, *([grade.row.get(column, "") for column in COLUMNS] for grade in grades)])


def canvas_csv(grades: Iterable[LabGrade], assignment: str, canvas_id: int | None = None) -> str:
    """A file for Canvas's gradebook import.

    Canvas finds students by ID (its own: the gradebook's ``lms_user_id``), then by SIS Login ID, and the assignment by
    the number behind its title, or by the title alone.
    """
    grades = list(grades)
    title = assignment if canvas_id is None else f"{assignment} ({canvas_id})"
    most = number(grades[0].max_score) if grades else ""
    head = ("Student", "ID", "SIS User ID", "SIS Login ID", "Section", title)
    rows = [(grade.name, grade.lms_id, "", grade.student, "", grade.score) for grade in grades]
    return _csv([head, ("    Points Possible", "", "", "", "", most), *rows])


def moodle_csv(grades: Iterable[LabGrade], assignment: str) -> str:
    """A file for Moodle's gradebook (Import, CSV): map Username, Email address or ID number to the user."""
    head = ("Username", "Email address", "ID number", "Grade", "Feedback comments")
    return _csv([head, *((grade.student, grade.email, grade.lms_id, grade.score, grade.comment) for grade in grades)])


FORMATS: dict[str, Callable[[Iterable[LabGrade], str], str]] = {
    "csv": plain_csv, "canvas": canvas_csv, "moodle": moodle_csv,
}  # fmt: skip


def gradescope_results(result: dict[str, Any]) -> dict[str, Any]:
    """A result as Gradescope's results.json: a test for each property. Of hidden ones the name and no input is in it."""
    notes = [f"Note: {mended}." for mended in result["mended"]]
    if result["score"] is None:
        return gradescope_refusal(" ".join([f"{result['status']}: {result['message']}", *notes]))
    tests = []
    for cell in result["cells"]:
        for outcome in record_of(cell).outcomes if cell["outcomes"] is not None else ():
            tests.append({
                "name": f"{str(cell['grade_id']).removeprefix('test_')}: {outcome.property}",
                "score": outcome.points if outcome.passed else 0.0,
                "max_score": outcome.points,
                "status": "passed" if outcome.passed else "failed",
                "output": outcome.message,
                "visibility": "visible",
            })  # fmt: skip
    said = [f"{number(result['score'])} of {number(result['max_score'])} points."]
    if result["status"] != "ok":
        what = f"{result['status']}: {result['message']}" if result["message"] else result["status"]
        said.append(f"One thing went wrong on the way: {what}.")
    said += notes
    said += [UNSAFE] if is_unsafe(result) else []
    return {
        **_gradescope(said, tests),
        "score": result["score"],
        "execution_time": round(result["seconds"]),
        "extra_data": {key: result[key] for key in ("status", "sandbox", "digest")},
    }


def gradescope_refusal(reason: str) -> dict[str, Any]:
    """The results.json of what was not graded: there is no score in it, so Gradescope shows none."""
    return _gradescope(
        [f"Not graded: {reason}"],
        [{"name": "not graded", "status": "failed", "output": reason, "visibility": "visible"}],
    )


def number(value: float) -> str:
    """A score as text, without the noise of its last bits."""
    return f"{round(value, 4):.15g}"


def _lab_grade(
    gradebook: Gradebook, lab: Any, student: str, known: Any, result: dict[str, Any] | None, is_there: bool
) -> LabGrade:
    row = grade_row(gradebook, lab, student, result, is_there)
    most, comment = float(lab.max_score), _comment(gradebook, row, result)
    if known is None:  # not brought into the gradebook yet
        return LabGrade(student, student, "", "", most, row, comment)
    name = ", ".join(part for part in (known.last_name, known.first_name) if part) or student
    return LabGrade(student, name, known.email or "", known.lms_user_id or "", most, row, comment)


def _comment(gradebook: Gradebook, row: dict[str, Any], result: dict[str, Any] | None) -> str:
    """What a student reads beside the grade."""
    if "score" not in row:
        if row["status"] == "not graded":
            return "Not graded."
        reason = f" ({result['message']})" if result and result["message"] and row["status"] == result["status"] else ""
        return f"Not graded: {row['status']}{reason}."
    submission = gradebook.find_submission(row["assignment"], row["student_id"])
    grades = [grade for notebook in submission.notebooks for grade in notebook.grades]
    parts = [
        f"{grade.name.removeprefix('test_')}: {number(grade.score)} of {number(grade.max_score)}" for grade in grades
    ]
    parts += [f"late: {number(row['late_penalty'])} points less"] if row["late_penalty"] else []
    return "; ".join(parts) + "." + (f" {UNSAFE}" if result and is_unsafe(result) else "")


def _gradescope(said: Sequence[str], tests: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "output": "\n".join(said),
        "output_format": "text",
        "test_output_format": "text",
        "test_name_format": "text",
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": tests,
    }


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([plain(value) for value in row] for row in rows)
    return text.getvalue()
