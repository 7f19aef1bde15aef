"""A lab as its author writes it, a py:percent file, and as nbgrader takes it, a notebook.

Cells say what they are by nbgrader's own metadata, of which the author writes only what matters::

    # %% nbgrader={"grade_id": "given", "locked": true}
    # %% nbgrader={"grade_id": "kv_cache_bytes", "solution": true}
    # %% nbgrader={"grade_id": "test_kv_cache_bytes", "grade": true}

The points of a test cell are the sum of its properties' points. A solution between its markers is either written in
place or lifted from the package: ``### BEGIN SOLUTION llmlab.memory.kv_cache_bytes``. The same source gives the same
notebook, byte for byte.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jupytext
import nbformat
from nbformat.notebooknode import NotebookNode

from llmlab.authoring.lift import defined_names, lift_body
from llmlab.cache import write_atomically

BEGIN = re.compile(r"^(?P<indent>[ \t]*)### BEGIN SOLUTION(?: (?P<dotted>[\w.]+))?[ \t]*$")
END = "### END SOLUTION"
HIDDEN = re.compile(r"^### BEGIN HIDDEN TESTS$.*?^### END HIDDEN TESTS$\n?", re.MULTILINE | re.DOTALL)
STUB = "# YOUR CODE HERE\nraise NotImplementedError()"
TEST_PREFIX = "test_"


class LabError(ValueError):
    """A lab's source that cannot become a notebook; the message names the lab and the cell."""


@dataclass(frozen=True)
class Exercise:
    """One solution cell and the test cell that grades it."""

    name: str
    answer: str  # source of the solution cell with the reference answer in it
    stub: str  # the same cell as it is released
    tests: str
    points: float
    lifted_from: str | None


@dataclass(frozen=True)
class Lab:
    """A lab read from its source file."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def cells(self) -> list[NotebookNode]:
        """The cells with complete nbgrader metadata and the reference answers filled in."""
        given: set[str] = set()
        withheld = list(self._lifted.values())
        cells = []
        for index, cell in enumerate(self._written):
            short = cell.metadata.get("nbgrader")
            metadata = _full_metadata(short, cell, self._where(index)) if short else None
            source = cell.source
            if metadata and metadata["solution"]:
                source = self._fill(source, given)
            elif cell.cell_type == "code":
                source = source.replace("WITHHELD", repr(withheld))
                given |= defined_names(source)
            cells.append(_cell(cell.cell_type, source, metadata, index))
        return cells

    @cached_property
    def exercises(self) -> list[Exercise]:
        """The lab's exercises in order; each solution cell has a test cell ``test_<its id>``."""
        tests = {c.metadata.nbgrader.grade_id: c for c in self.cells if _is(c, "grade")}
        found = []
        for cell in self.cells:
            if _is(cell, "solution"):
                name = cell.metadata.nbgrader.grade_id
                test = tests.pop(TEST_PREFIX + name, None)
                if test is None:
                    raise LabError(f"{self.path.name}: the solution {name!r} has no test cell {TEST_PREFIX + name!r}")
                lifted = self._lifted.get(name)
                points = test.metadata.nbgrader.points
                found.append(Exercise(name, cell.source, release_source(cell.source), test.source, points, lifted))
        if tests:
            raise LabError(f"{self.path.name}: test cells without a solution: {', '.join(tests)}")
        return found

    @property
    def points(self) -> float:
        return sum(exercise.points for exercise in self.exercises)

    def notebook(self) -> NotebookNode:
        """The instructor's notebook: solutions and hidden tests in place."""
        if not self.exercises:
            raise LabError(f"{self.path.name}: no exercise")
        notebook = nbformat.v4.new_notebook(cells=self.cells)
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.validate(notebook)
        return notebook

    def build(self, source_folder: Path) -> Path:
        """Write the instructor's notebook where nbgrader looks for it; an unchanged one is left alone."""
        file = source_folder / self.name / f"{self.name}.ipynb"
        text = nbformat.writes(self.notebook()) + "\n"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_atomically(file, text)
        return file

    @cached_property
    def _written(self) -> list[NotebookNode]:
        """The cells as the author wrote them."""
        return list(jupytext.read(self.path, fmt="py:percent").cells)

    @cached_property
    def _lifted(self) -> dict[str, str]:
        """The package's name that each exercise's answer is lifted from."""
        marks = ((c, re.search(r"### BEGIN SOLUTION ([\w.]+)", c.source)) for c in self._written)
        return {c.metadata["nbgrader"]["grade_id"]: mark.group(1) for c, mark in marks if mark}

    def _fill(self, source: str, given: set[str]) -> str:
        lines = source.split("\n")
        for number, line in enumerate(lines):
            mark = BEGIN.match(line)
            if mark and mark["dotted"]:
                body = lift_body(mark["dotted"], _stub(source), given, mark["indent"])
                return "\n".join([*lines[:number], f"{mark['indent']}### BEGIN SOLUTION", body, *lines[number + 1 :]])
        return source

    def _where(self, index: int) -> str:
        return f"{self.path.name}, cell {index}"


def find_labs(folder: Path) -> list[Lab]:
    """The labs of a folder: its py files that hold an exercise, by name."""
    return [Lab(f) for f in sorted(folder.glob("*.py")) if "### BEGIN SOLUTION" in f.read_text(encoding="utf-8")]


def release_source(source: str) -> str:
    """A solution cell as students get it: what stands between the markers gives way to a stub."""
    lines: list[str] = []
    inside = False
    for line in source.split("\n"):
        mark = BEGIN.match(line)
        if mark:
            inside = True
            lines += [mark["indent"] + stub for stub in STUB.split("\n")]
        elif END in line:
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines)


def visible_tests(tests: str) -> str:
    """A test cell as students get it: without the hidden regions."""
    return HIDDEN.sub("", tests)


def _stub(source: str) -> str:
    """The cell with ``pass`` for its solution, so that it parses."""
    return re.sub(r"### BEGIN SOLUTION.*?### END SOLUTION", "pass", source, flags=re.DOTALL)


def _full_metadata(short: dict[str, object], cell: NotebookNode, where: str) -> dict[str, object]:
    unknown = set(short) - {"grade_id", "solution", "grade", "locked"}
    if unknown or "grade_id" not in short:
        raise LabError(f"{where}: nbgrader metadata takes grade_id, solution, grade and locked; got {short}")
    grade, solution = bool(short.get("grade")), bool(short.get("solution"))
    full: dict[str, object] = {
        "grade": grade, "grade_id": short["grade_id"], "locked": grade or bool(short.get("locked")),
        "schema_version": 3, "solution": solution, "task": False,
    }  # fmt: skip
    if grade:
        full["points"] = _points(cell.source, where)
    return full


def _points(tests: str, where: str) -> float:
    """The sum of the points of a test cell's properties; checks that the hidden ones stand in hidden regions."""
    hidden_lines = {
        line
        for m in HIDDEN.finditer(tests)
        for line in range(tests[: m.start()].count("\n") + 1, tests[: m.end()].count("\n") + 1)
    }
    total = 0.0
    for node in ast.walk(ast.parse(tests)):
        for decorator in getattr(node, "decorator_list", []):
            hidden = isinstance(decorator.func, ast.Attribute) and decorator.func.attr == "hidden"
            if hidden != (decorator.lineno in hidden_lines):
                raise LabError(
                    f"{where}: {ast.unparse(decorator)} must stand inside a hidden region just if it is hidden"
                )
            total += next(ast.literal_eval(k.value) for k in decorator.keywords if k.arg == "points")
    if not total:
        raise LabError(f"{where}: the test cell has no property with points")
    return total


def _cell(kind: str, source: str, metadata: dict[str, object] | None, index: int) -> NotebookNode:
    make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
    cell = make(source)
    cell["id"] = str(metadata["grade_id"]) if metadata else f"cell-{index:02d}"
    cell["metadata"] = NotebookNode(nbgrader=NotebookNode(metadata)) if metadata else NotebookNode()
    return cell


def _is(cell: NotebookNode, kind: str) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get(kind))
