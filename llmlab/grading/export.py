"""Exporting scores so that a submission that was never graded is not mistaken for one that earned nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from nbgrader.api import Gradebook, MissingEntry
from nbgrader.plugins import ExportPlugin

from llmlab.grading.grade import UNGRADED
from llmlab.grading.gradebook import Course
from llmlab.grading.results import results_file, summaries
from llmlab.grading.submissions import find_students

COLUMNS = (
    "assignment",
    "student_id",
    "status",
    "score",
    "max_score",
    "raw_score",
    "late_penalty",
    "timestamp",
    "duedate",
    "sandbox",
)


class CheckedCsvExport(ExportPlugin):
    """``nbgrader export``: one row a student and lab, with a status; only a graded submission has a score."""

    def export(self, gradebook: Gradebook) -> None:
        target, directory = self.to or "grades.csv", self.parent.coursedir
        course, students = Course(Path(directory.root), directory), {str(student) for student in self.student}
        assignments = {str(assignment) for assignment in self.assignment}
        with Path(target).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for assignment in gradebook.assignments:
                results = summaries(results_file(course.root, assignment.name))
                handed_in = find_students(course.submitted, assignment.name)
                for student in dict.fromkeys([*(known.id for known in gradebook.students), *results, *handed_in]):
                    if (not assignments or assignment.name in assignments) and (not students or student in students):
                        is_there = student in results or student in handed_in
                        row = grade_row(gradebook, assignment, student, results.get(student), is_there)
                        writer.writerow({k: plain(v) for k, v in row.items()})
        self.log.info("Exported grades to %s", target)


def grade_row(
    gradebook: Gradebook, assignment: Any, student: str, result: dict[str, Any] | None, is_there: bool
) -> dict[str, Any]:
    """One student's row of the export; it has a score just if the submission was graded.

    is_there: whether something was handed in, be it that the gradebook does not know of it yet.
    """
    row = {"assignment": assignment.name, "student_id": student, "max_score": assignment.max_score}
    row["duedate"] = assignment.duedate or ""
    try:
        submission = gradebook.find_submission(assignment.name, student)
    except MissingEntry:
        return row | {"status": "not graded" if is_there else "missing"}
    row["timestamp"] = submission.timestamp or ""
    grades = [grade for notebook in submission.notebooks for grade in notebook.grades]
    if any(grade.auto_score is None and grade.manual_score is None for grade in grades):
        ungraded = result is not None and result["status"] in UNGRADED
        return row | {"status": result["status"] if result and ungraded else "not graded"}
    status = result["status"] if result else "graded by hand"
    sandbox = (result["sandbox"] or "") if result else ""
    penalty = submission.late_submission_penalty or 0.0
    score = max(0.0, submission.score - penalty)
    return row | {
        "status": status,
        "sandbox": sandbox,
        "raw_score": submission.score,
        "late_penalty": penalty,
        "score": score,
    }


def plain(value: Any) -> str:
    """Text that a spreadsheet does not take for a formula."""
    text = str(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
