"""A small made-up class for any lab: each student hands in one kind of notebook that a grader meets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat.notebooknode import NotebookNode

from llmlab.authoring.answers import Answers, read_answers
from llmlab.authoring.lab import TEST_PREFIX, Exercise, Lab
from llmlab.authoring.run import run_exercise
from llmlab.cache import write_atomically

TIMESTAMP = "2026-01-15 12:00:00 UTC"
OF_THE_LAB = ("perfect", "empty", "partly right", "plausible but wrong", "other right answers")


@dataclass(frozen=True)
class Submission:
    """What one student hands in, and what it must score."""

    student: str
    kind: str
    notebook: NotebookNode
    score: float
    status: str = "ok"


def example_class(lab: Lab, released: NotebookNode, whole: bool = True) -> list[Submission]:
    """The class's submissions, made from the released notebook by filling in answers and spoiling some.

    whole: False leaves out those who show how the grader takes a spoiled notebook, which is the same in every lab.
    """
    answers = read_answers(lab)
    exercises = lab.exercises
    right = {e.name: e.answer for e in exercises}
    points = {e.name: e.points for e in exercises}
    full, half = lab.points, len(exercises) // 2
    spoiled = _callable_exercises(lab)[-1]
    others = full - points[spoiled]
    # The plausible class-mate: the first named wrong answer to each exercise but the last, which builds on them.
    wrong = {e.name: answers.wrong(e.name)[0].source for e in exercises[:-1]} | {
        exercises[-1].name: right[exercises[-1].name]
    }

    def make(
        number: int, kind: str, filled: dict[str, str], score: float, *edits: Edit, status: str = "ok"
    ) -> Submission:
        student = f"student-{number:02d}"
        notebook = _fill(released, filled, student)
        for edit in edits:
            edit(notebook, exercises)
        return Submission(student, kind, notebook, score, status)

    first_half = {e.name: e.answer for e in exercises[:half]}
    submissions = [
        make(1, "perfect", right, full),
        make(2, "empty", {}, 0.0),
        make(3, "partly right", first_half, sum(points[name] for name in first_half)),
        make(4, "plausible but wrong", wrong, _score(lab, answers, wrong, "student-04")),
        make(5, "syntax error in one answer", right | {spoiled: "def broken(:\n    return 1"}, others),
        make(6, "infinite loop in one answer", right | {spoiled: _looping(spoiled)}, others, status="timeout"),
        make(7, "deleted test cell", right, full, _delete_test),
        make(8, "warning on stderr", right, full, _warn_everywhere),
        make(9, "copied answer cell", right, full, _copy_answer),
        make(10, "kernel killed in the last answer", right | {exercises[-1].name: "import os\nos._exit(1)"},
             full - points[exercises[-1].name], status="crashed"),
        make(11, "other right answers", {e.name: answers.right(e.name)[0].source for e in exercises}, full),
    ]  # fmt: skip
    return [s for s in submissions if whole or s.kind in OF_THE_LAB]


def write_class(submissions: list[Submission], lab: Lab, course: Path) -> None:
    """Put the submissions where ``nbgrader autograde`` looks for them."""
    for submission in submissions:
        folder = course / "submitted" / submission.student / lab.name
        write_atomically(folder / f"{lab.name}.ipynb", nbformat.writes(submission.notebook) + "\n")
        write_atomically(folder / "timestamp.txt", TIMESTAMP)


Edit = Callable[[NotebookNode, list[Exercise]], None]


def _score(lab: Lab, answers: Answers, filled: dict[str, str], student: str) -> float:
    """What the answers earn, one exercise at a time; each builds on the answers before it."""
    total = 0.0
    for exercise in lab.exercises:
        total += run_exercise(lab, exercise, filled[exercise.name], student, earlier=filled).score
    return total


def _fill(released: NotebookNode, answers: dict[str, str], student: str) -> NotebookNode:
    notebook = copy.deepcopy(released)
    for cell in notebook.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
        if grade_id in answers:
            cell.source = answers[grade_id]
        elif cell.source.startswith("student_id = "):
            cell.source = f'student_id = "{student}"'
    return notebook


def _callable_exercises(lab: Lab) -> list[str]:
    return [e.name for e in lab.exercises if e.answer.lstrip().startswith(("def ", "class ")) and not _is_used(lab, e)]


def _is_used(lab: Lab, exercise: Exercise) -> bool:
    return any(exercise.name in other.answer for other in lab.exercises if other is not exercise)


def _looping(name: str) -> str:
    return f"def {name}(*arguments, **named):\n    while True:\n        pass"


def _cell(notebook: NotebookNode, grade_id: str) -> int:
    ids = [cell.metadata.get("nbgrader", {}).get("grade_id") for cell in notebook.cells]
    return ids.index(grade_id)


def _delete_test(notebook: NotebookNode, exercises: list[Exercise]) -> None:
    del notebook.cells[_cell(notebook, TEST_PREFIX + exercises[0].name)]


def _copy_answer(notebook: NotebookNode, exercises: list[Exercise]) -> None:
    position = _cell(notebook, exercises[0].name)
    first_try = copy.deepcopy(notebook.cells[position])
    first_try.source, first_try.id = exercises[0].stub, "copied"
    notebook.cells.insert(position, first_try)


def _warn_everywhere(notebook: NotebookNode, exercises: list[Exercise]) -> None:
    for exercise in exercises:
        cell = notebook.cells[_cell(notebook, exercise.name)]
        lines = cell.source.split("\n")
        noise = ["import sys, warnings", 'warnings.warn("this is fine")', 'print("noise", file=sys.stderr)']
        if lines[0].startswith("def "):
            noise += [*lines, f"_quiet_{exercise.name} = {exercise.name}",
                      f"def {exercise.name}(*a, **k):", '    print("noise", file=sys.stderr)',
                      f"    return _quiet_{exercise.name}(*a, **k)"]  # fmt: skip
            cell.source = "\n".join(noise)
        else:
            cell.source = "\n".join(noise + lines)
