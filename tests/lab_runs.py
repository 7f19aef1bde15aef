"""Ways to run a lab that the tests of the labs share."""

import contextlib
import copy
import io
import re
from pathlib import Path

import nbformat

from llmlab.authoring.lab import find_labs
from llmlab.authoring.run import run_exercise
from llmlab.grading.batch import Local
from llmlab.grading.grade import Bundle
from llmlab.grading.withhold import restored_behind

LABS = {lab.name: lab for lab in find_labs(Path(__file__).parent.parent / "labs")}


def exercise_of(lab, name):
    return next(exercise for exercise in lab.exercises if exercise.name == name)


def ways_in(source):
    """The functions of a text that are named as ways through the package."""
    return re.findall(r"^def (by_\w+)", source, flags=re.MULTILINE)


def run_reference(lab, student):
    """The names that the lab's own cells leave behind for a student, the tests' left out; ``counted`` is what was measured."""
    names = {"__name__": "__lab__"}
    with restored_behind(), contextlib.redirect_stdout(io.StringIO()):
        for cell in lab.cells:
            if cell.cell_type == "code" and not cell.metadata.get("nbgrader", {}).get("grade"):
                exec(cell.source.replace('"student-00"', repr(student)), names)
                names["measured"] = lambda _, predicted, counted, *unit: names.update(counted=counted)
    return names


def refuses(lab, name, answer):
    """The answer earns nothing in this process, and the student is told why."""
    record = run_exercise(lab, exercise_of(lab, name), answer, "student-01")
    assert [o.property for o in record.outcomes if o.passed] == []
    assert any("answers this exercise" in o.message for o in record.outcomes)


def graded_in_worker(lab, answers, first=None):
    """The result of grading the reference with some answers replaced by these: sources by their cells' names.

    first: the source of a cell before all others.
    """
    notebook = copy.deepcopy(lab.notebook())
    instructor = nbformat.writes(notebook)
    for cell in notebook.cells:
        metadata = cell.metadata.get("nbgrader", {})
        if metadata.get("solution") and metadata["grade_id"] in answers:
            cell.source = answers[metadata["grade_id"]]
        elif cell.source.startswith("student_id = "):
            cell.source = 'student_id = "student-01"'
    if first is not None:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first, id="before-all-others"))
    (result,) = Local(1).run([Bundle(lab.name, "student-01", instructor, nbformat.writes(notebook), "secret")])
    assert result["status"] == "ok"
    return result


def cells_of(result):
    """A result's cells by their names."""
    return {cell["grade_id"]: cell for cell in result["cells"]}
