"""Checking one's own notebook with its visible tests, by the machinery that grades it."""

from __future__ import annotations

from typing import Any

import nbformat
from nbformat.notebooknode import NotebookNode
from nbformat.v4 import new_output

from llmlab.grading.batch import Failure, Local
from llmlab.grading.classroom import model_cache
from llmlab.grading.grade import Bundle
from llmlab.grading.graded import record_of
from llmlab.grading.notebooks import Unreadable, read_cells
from llmlab.grading.probe import Probe, probe
from llmlab.grading.results import GradingError
from llmlab.grading.sandbox import Limits


class NotChecked(GradingError):
    """The check itself went wrong."""


def check_text(text: str, found: Probe, limits: Limits | None = None) -> dict[str, Any]:
    """The result of a notebook's own visible tests; one's own code runs without a sandbox where there is none."""
    try:
        marked = [cell for cell in read_cells(text.encode("utf-8", "surrogateescape")) if cell.grade_id]
    except Unreadable as error:
        raise NotChecked(f"this cannot be checked: {error}") from None
    if not marked:
        raise NotChecked("this notebook has lost the marks of its cells: put your answers into a fresh copy of the lab")
    bundle = Bundle("check", "", text, text, "practice", limits or Limits(), found.level, model_cache(), own=True)
    outcome = next(Local(1).run([bundle]))
    if isinstance(outcome, Failure):
        raise NotChecked(outcome.reason)
    return outcome


def check_notebook(notebook: NotebookNode) -> NotebookNode:
    """The notebook with outputs as nbgrader's validator reads them: an error in each test cell that did not hold."""
    result = check_text(nbformat.writes(notebook), probe())
    graded = {cell["grade_id"]: cell for cell in result["cells"] if cell["outcomes"] is not None}
    for cell in notebook.cells:
        found = graded.get(cell.metadata.get("nbgrader", {}).get("grade_id"))
        if found is None:
            continue
        record = record_of(found)
        lines = [line for o, line in zip(record.outcomes, record.lines(), strict=True) if not o.passed]
        cell.outputs = [new_output("stream", name="stdout", text="\n".join(record.lines()))]
        if lines:
            failed = f"{len(lines)} of {len(record.outcomes)} properties failed"
            cell.outputs.append(new_output("error", ename="ChecksFailed", evalue=failed, traceback=lines))
    return notebook
