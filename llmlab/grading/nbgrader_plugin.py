"""What nbgrader runs on a submission, through its own plug-in points; ``labs/nbgrader_config.py`` names these classes.

nbgrader reads a score off a cell's outputs: any stderr is 0, no output at all is full marks. Here the outputs of a
test cell are rewritten from the record that its checks leave, so a warning costs nothing and a skipped test earns
nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from nbclient.exceptions import DeadKernelError
from nbformat.notebooknode import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from nbgrader import utils
from nbgrader.api import Gradebook
from nbgrader.preprocessors import Execute, NbGraderPreprocessor

from llmlab.grading.checks import MEASUREMENT_TYPE, RECORD_TYPE, SEED_VARIABLE, STUDENT_VARIABLE, Record, seed_of

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
        nb.metadata["llmlab"] = {"status": "running", "pid": os.getpid()}
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
    """Run a submission with random inputs of its own."""

    def preprocess(self, nb: NotebookNode, resources: Any, km: Any = None) -> Result:
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


class CheckOutputs(NbGraderPreprocessor):
    """After the run: warnings are no errors, and a test cell without a record is one."""

    def preprocess_cell(self, cell: NotebookNode, resources: Any, index: int) -> Result:
        if cell.cell_type != "code" or not utils.is_grade(cell):
            return cell, resources
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                output.name = "stdout"
        if find_record(cell) is None:
            cell.outputs.append(_error("NoRecord", "the checks of this cell did not run to their end"))
        return cell, resources


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


def forget_unfinished(course: Path) -> list[str]:
    """Remove autograded folders whose run was killed, so that the next ``nbgrader autograde`` runs them again.

    nbgrader takes any folder there for a finished one, and exports the missing scores as 0.
    """
    forgotten = []
    for folder in sorted(course.glob("autograded/*/*/")):
        notebooks = list(folder.glob("*.ipynb"))
        if not notebooks or any(_was_killed(notebook) for notebook in notebooks):
            shutil.rmtree(folder)
            forgotten.append(str(folder.relative_to(course)))
    return forgotten


def _was_killed(notebook: Path) -> bool:
    try:
        state = json.loads(notebook.read_text(encoding="utf-8"))["metadata"].get("llmlab", {})
    except (ValueError, KeyError):
        return True
    return state.get("status") == "running" and not Path(f"/proc/{state.get('pid')}").exists()


def _measurements(nb: NotebookNode) -> list[Any]:
    outputs = [o for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs]
    return [o.data[MEASUREMENT_TYPE] for o in outputs if MEASUREMENT_TYPE in o.get("data", {})]


def _error(name: str, message: str) -> NotebookNode:
    return new_output("error", ename=name, evalue=message, traceback=[f"{name}: {message}"])
