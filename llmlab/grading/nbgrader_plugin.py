"""What nbgrader runs on a submission, through its own plug-in points; ``labs/nbgrader_config.py`` names these classes.

nbgrader reads a score off a cell's outputs: any stderr is 0, no output at all is full marks. Here the outputs of a
test cell are rewritten from the record that its checks leave, so a warning costs nothing and a skipped test earns
nothing.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from pathlib import Path
from typing import Any

from nbclient.exceptions import DeadKernelError
from nbconvert.exporters import NotebookExporter
from nbformat.notebooknode import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from nbgrader import utils
from nbgrader.api import Gradebook
from nbgrader.preprocessors import Execute, NbGraderPreprocessor

from llmlab.grading.checks import (
    MEASUREMENT_TYPE,
    RECORD_TYPE,
    SEED_VARIABLE,
    STUDENT_VARIABLE,
    Record,
    check_seconds,
    seed_of,
)

Result = tuple[NotebookNode, Any]


class MendStructure(NbGraderPreprocessor):
    """Give a submission the cells it must have, before nbgrader looks at them.

    Of cells that were copied together with their grade id the last keeps it (it is the one that counts when the
    notebook runs); the others become ordinary cells. A cell that was deleted comes back, an answer empty.
    """

    def preprocess(self, nb: NotebookNode, resources: Any) -> Result:
        seen: set[str] = set()
        for cell in reversed(nb.cells):
            grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
            if grade_id is not None and grade_id in seen:
                self.log.warning("Cell %r stands more than once; the last copy counts", grade_id)
                del cell.metadata["nbgrader"]
            elif grade_id is not None:
                seen.add(grade_id)
        names = resources["nbgrader"]
        with Gradebook(names["db_url"]) as gradebook:
            source = gradebook.find_notebook(names["notebook"], names["assignment"])
            self._restore(nb, source)
            submitted = gradebook.find_submission_notebook(names["notebook"], names["assignment"], names["student"])
            for grade in submitted.grades:
                grade.auto_score = None  # an old score must not pass for this run's, should it be killed
            gradebook.db.commit()
        nb.metadata["llmlab"] = {"status": "running"}
        return nb, resources

    def _restore(self, nb: NotebookNode, source: Any) -> None:
        """Put back what is missing, each cell behind the one that it follows in the instructor's notebook."""
        solutions = {cell.name for cell in source.solution_cells}
        points = {cell.name: cell.max_score for cell in source.grade_cells}
        position = -1
        for cell in source.source_cells:
            ids = [c.metadata.get("nbgrader", {}).get("grade_id") for c in nb.cells]
            if cell.name in ids:
                position = ids.index(cell.name)
                continue
            self.log.warning("Cell %r is missing; it comes back", cell.name)
            position += 1
            nb.cells.insert(position, _missing_cell(cell, cell.name in solutions, points.get(cell.name)))


def _missing_cell(cell: Any, solution: bool, points: float | None) -> NotebookNode:
    metadata = {
        "grade": points is not None, "grade_id": cell.name, "locked": cell.locked, "schema_version": 3,
        "solution": solution, "task": False, "checksum": cell.checksum, "cell_type": cell.cell_type,
    }  # fmt: skip
    if points is not None:
        metadata["points"] = points
    make = new_code_cell if cell.cell_type == "code" else new_markdown_cell
    return make(cell.source, id=f"restored-{cell.name}"[:64], metadata=NotebookNode(nbgrader=NotebookNode(metadata)))


class SeededExecute(Execute):
    """Run a submission with random inputs of its own; a test cell has the time that its properties may take."""

    def preprocess(self, nb: NotebookNode, resources: Any, km: Any = None) -> Result:
        self.timeout_func = self._seconds
        names = resources["nbgrader"]
        seed = seed_of(names["assignment"], names["student"])
        environment = {SEED_VARIABLE: seed, STUDENT_VARIABLE: names["student"]}
        with utils.setenv(**environment):
            try:
                nb, resources = super().preprocess(nb, resources, km)
                return nb, resources
            except DeadKernelError:
                self.log.error("The kernel died; the cells that did not run earn nothing")
                return self.nb, self.resources


    def _seconds(self, cell: NotebookNode) -> float:
        properties = len(re.findall(r"^@check\b", cell.source, re.MULTILINE)) if utils.is_grade(cell) else 0
        return float(self.timeout + properties * check_seconds())


class RecordScores(NbGraderPreprocessor):
    """Replace the outputs of each test cell by its outcome and its score, which nbgrader then reads."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> Result:
        nb, resources = super().preprocess(nb, resources)
        nb.metadata["llmlab"] = {"status": "graded", "measurements": _measurements(nb)}
        return nb, resources

    def preprocess_cell(self, cell: NotebookNode, resources: Any, index: int) -> Result:
        if cell.cell_type != "code" or not utils.is_grade(cell):
            return cell, resources
        record = find_record(cell)
        points = float(cell.metadata.nbgrader["points"])
        if record is None or record.points != points:
            reasons = [o for o in cell.outputs if o.output_type == "error"]
            said = f"{reasons[0].ename}: {reasons[0].evalue}" if reasons else "no outcome"
            cell.outputs = [_error("NotGraded", f"the checks did not run to their end ({said})")]
            return cell, resources
        text = "\n".join(record.lines()) + f"\n{record.score:g} of {points:g} points\n"
        cell.outputs = [
            new_output("stream", name="stdout", text=text),
            new_output("execute_result", data={"text/plain": str(record.score)}, execution_count=cell.execution_count),
        ]
        return cell, resources


def find_record(cell: NotebookNode) -> Record | None:
    """The record among a test cell's outputs; None where there is none that can be read, or more than one."""
    found = [o.data[RECORD_TYPE] for o in cell.outputs if RECORD_TYPE in o.get("data", {})]
    if len(found) != 1:
        return None
    try:
        return Record.from_json(found[0])
    except (KeyError, TypeError):
        return None


class ResumingExporter(NotebookExporter):
    """What ``nbgrader autograde`` makes before it looks for work: here it forgets the work that a kill left half done.

    nbgrader takes any folder in ``autograded`` for a finished one, and exports the missing scores as 0. The lock says
    whether the run that marked a folder is still at work; the system releases it when that run ends, however it ends.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        course = self.parent.coursedir
        assignment = course.assignment_id
        self._lock = Path(course.root, f".autograde-{assignment}.lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.log.warning("Another run is grading %r; what it has begun is left to it", assignment)
            return
        for forgotten in forget_unfinished(Path(course.root), assignment):
            self.log.warning("%s was begun by a run that was killed; it is graded again", forgotten)


def forget_unfinished(course: Path, assignment: str) -> list[str]:
    """Remove the autograded folders of an assignment that a killed run left unfinished; says which."""
    forgotten = []
    for folder in sorted(course.glob(f"autograded/*/{assignment}/")):
        notebooks = list(folder.glob("*.ipynb"))
        if not notebooks or any(_is_unfinished(notebook) for notebook in notebooks):
            shutil.rmtree(folder)
            forgotten.append(str(folder.relative_to(course)))
    return forgotten


def _is_unfinished(notebook: Path) -> bool:
    try:
        state = json.loads(notebook.read_text(encoding="utf-8"))["metadata"].get("llmlab", {})
    except (ValueError, KeyError):
        return True
    return bool(state.get("status") == "running")


def _measurements(nb: NotebookNode) -> list[Any]:
    outputs = [o for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs]
    return [o.data[MEASUREMENT_TYPE] for o in outputs if MEASUREMENT_TYPE in o.get("data", {})]


def _error(name: str, message: str) -> NotebookNode:
    return new_output("error", ename=name, evalue=message, traceback=[f"{name}: {message}"])
