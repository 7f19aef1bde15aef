"""A result as a notebook, for nbgrader's own tools: the formgrader shows it, feedback and scores are read off it."""

from __future__ import annotations

from typing import Any

from nbformat.notebooknode import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from llmlab.grading.checks import Record
from llmlab.grading.markup import harmless_markdown, plain_text, png_address
from llmlab.grading.notebooks import Cell
from llmlab.grading.sandbox import Level
from llmlab.grading.split import STUDENT, TEST

UNSAFE = "This was graded without a sandbox."

LEFT_OUT = ("cells", "assignment", "student", "limits", "modules")


def graded_notebook(result: dict[str, Any], instructor: list[Cell]) -> NotebookNode:
    """The graded notebook: hidden tests in place, what the student wrote and drew made harmless."""
    models = {cell.grade_id: cell for cell in instructor if cell.grade_id}
    given_text = {cell.source for cell in instructor if cell.kind == "markdown"}
    cells = [
        _cell(cell, models.get(cell["grade_id"]), given_text, number) for number, cell in enumerate(result["cells"])
    ]
    if result["score"] is None:
        why = f"Not graded: {result['status']}. {result['message']}"
        cells.insert(0, new_markdown_cell(harmless_markdown(why), id="not-graded"))
    if is_unsafe(result):
        cells.insert(0, new_markdown_cell(f"**{UNSAFE}**", id="no-sandbox"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(
        cells=cells,
        metadata={"llmlab": {k: v for k, v in result.items() if k not in LEFT_OUT}, "kernelspec": kernel},
    )


def is_unsafe(result: dict[str, Any]) -> bool:
    """Whether a result, or a row of the export, comes from a run without a sandbox."""
    return str(result.get("sandbox")).startswith(Level.NONE.value)


def record_of(cell: dict[str, Any]) -> Record:
    """The record of a graded test cell."""
    return Record.from_json({"exercise": cell["grade_id"] or "", "outcomes": cell["outcomes"]})


def _cell(graded: dict[str, Any], model: Cell | None, given_text: set[str], number: int) -> NotebookNode:
    common = {"metadata": {"nbgrader": _marks(model)} if model else {}, "id": f"cell-{number}"}
    if graded["kind"] == "markdown":
        known = graded["source"] in given_text
        return new_markdown_cell(graded["source"] if known else harmless_markdown(graded["source"]), **common)
    if graded["kind"] == "raw":
        return new_markdown_cell(harmless_markdown(graded["source"]), **common)
    source = model.source if model is not None and graded["role"] == TEST else graded["source"]
    return new_code_cell(plain_text(source), outputs=_outputs(graded), **common)


def _marks(model: Cell) -> dict[str, Any]:
    marks = {
        "grade": model.grade, "grade_id": model.grade_id, "locked": model.role != STUDENT, "schema_version": 3,
        "solution": model.solution, "task": False, "cell_type": model.kind,
    }  # fmt: skip
    return marks | ({"points": model.points} if model.grade else {})


def _outputs(graded: dict[str, Any]) -> list[NotebookNode]:
    """What the student's cell said, as text and pictures; of a test cell its outcomes and its score."""
    if graded["outcomes"] is not None:
        record = record_of(graded)
        text = plain_text("\n".join(record.lines())) + f"\n{record.score:g} of {graded['points']:g} points\n"
        return [
            new_output("stream", name="stdout", text=text),
            new_output("execute_result", data={"text/plain": str(record.score)}, execution_count=None),
        ]
    outputs = [output for output in map(_output, graded["outputs"]) if output is not None]
    if graded["error"] is not None:
        name, message = plain_text(graded["error"]["name"]), plain_text(graded["error"]["message"])
        outputs.append(new_output("error", ename=name, evalue=message, traceback=[f"{name}: {message}"]))
    return outputs


def _output(output: dict[str, Any]) -> NotebookNode | None:
    if output["output_type"] == "stream":
        return new_output("stream", name=output["name"], text=plain_text(output["text"]))
    data = {"text/plain": plain_text(output["data"]["text/plain"])} if "text/plain" in output["data"] else {}
    if address := png_address(output["data"].get("image/png")):
        data["image/png"] = address.partition(",")[2]
    return new_output("display_data", data=data) if data else None
