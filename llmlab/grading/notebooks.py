"""Reading what a student handed in: a notebook that may be broken, and mending what can be mended safely.

The instructor's notebook says which cells there are. Cells are found by their grade id, then by their cell id, then by
their content; what is nowhere to be found is put back, and everything that was done is reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmlab.grading.split import GIVEN, STUDENT, TEST, Part

MOST_BYTES = 20 * 2**20
MOST_CELLS = 2000
MOST_POINTS = 10**6
HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS[^\n]*\n?", re.MULTILINE | re.DOTALL)


class Unreadable(ValueError):
    """A submission that is no notebook."""


class WrongStructure(ValueError):
    """A notebook in which no cell of the lab can be found."""


@dataclass(frozen=True)
class Cell:
    """A cell as far as grading needs it."""

    kind: str  # "code", "markdown" or "raw"
    source: str
    cell_id: str = ""
    grade_id: str | None = None
    grade: bool = False
    solution: bool = False
    points: float = 0.0

    @property
    def role(self) -> str:
        """TEST or GIVEN, which a student leaves as it is, or STUDENT."""
        if self.grade and not self.solution:
            return TEST
        return GIVEN if self.grade_id is not None and not self.solution else STUDENT

    def released(self) -> str:
        """The source without hidden tests."""
        return HIDDEN.sub("", self.source)


@dataclass(frozen=True)
class Aligned:
    """A submission brought into the instructor's form."""

    cells: tuple[Cell, ...]
    mended: tuple[str, ...]

    @property
    def parts(self) -> list[Part]:
        """The code cells in the order in which they run."""
        return [_part(cell) for cell in self.cells if cell.kind == "code"]


def read_cells(data: bytes) -> list[Cell]:
    """The cells of a notebook file. Raises Unreadable for anything that is not one."""
    if len(data) > MOST_BYTES:
        raise Unreadable(f"{len(data):,} bytes; a notebook may have {MOST_BYTES:,}")
    try:
        notebook = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise Unreadable("not a notebook: no JSON, or cut off") from None
    if type(notebook) is not dict or type(notebook.get("cells")) is not list:
        raise Unreadable("not a notebook of format 4: it has no list of cells")
    if len(notebook["cells"]) > MOST_CELLS:
        raise Unreadable(f"{len(notebook['cells']):,} cells; a notebook may have {MOST_CELLS:,}")
    return [_read_cell(cell, number) for number, cell in enumerate(notebook["cells"])]


def align(instructor: list[Cell], submitted: list[Cell]) -> Aligned:
    """Bring a submission into the instructor's form; WrongStructure where none of the lab's cells is found."""
    wanted = {cell.grade_id: cell for cell in instructor if cell.grade_id is not None}
    mended: list[str] = []
    found: dict[str, int] = {}  # grade id -> position in the submission
    for position, cell in enumerate(submitted):
        if cell.grade_id in wanted:
            assert cell.grade_id is not None
            if cell.grade_id in found:
                mended.append(f"cell {cell.grade_id!r} stood more than once; the last copy counts")
            found[cell.grade_id] = position
    for how, matches in _WAYS.items():
        taken = set(found.values())
        for grade_id, model in wanted.items():
            if grade_id in found:
                continue
            at = [p for p, cell in enumerate(submitted) if p not in taken and matches(model, cell)]
            if at:
                found[grade_id] = at[-1]
                taken.add(at[-1])
                mended.append(f"cell {grade_id!r} had lost its mark; found by its {how}")
    if wanted and not found:
        raise WrongStructure("none of the lab's cells is in this notebook")
    mended += [
        f"cell {grade_id!r}, which is not the student's, had been changed; the lab's own counts"
        for grade_id, position in found.items()
        if _is_changed(wanted[grade_id], submitted[position])
    ]
    marks = {position: grade_id for grade_id, position in found.items()}
    cells = [
        _filled(wanted[marks[p]], cell) if p in marks else Cell(cell.kind, cell.source)
        for p, cell in enumerate(submitted)
    ]
    for previous, model in zip([None, *list(wanted.values())[:-1]], wanted.values(), strict=True):
        if model.grade_id not in found:
            mended.append(f"cell {model.grade_id!r} was missing; it is put back" + (" empty" if model.solution else ""))
            behind = -1 if previous is None else [c.grade_id for c in cells].index(previous.grade_id)
            cells.insert(behind + 1, _filled(model, Cell(model.kind, "")))
    return Aligned(tuple(cells), tuple(mended))


def is_of_lab(instructor: list[Cell], data: bytes) -> bool:
    """Whether the content of a file is clearly a notebook of this lab: most of the lab's answers are in it."""
    try:
        submitted = read_cells(data)
    except Unreadable:
        return False
    answers = [cell for cell in instructor if cell.solution and cell.grade_id is not None]
    found = [model for model in answers if any(_is_same(model, cell) for cell in submitted)]
    return 2 * len(found) > len(answers)


def _is_same(model: Cell, cell: Cell) -> bool:
    return cell.grade_id == model.grade_id or any(matches(model, cell) for matches in _WAYS.values())


def _read_cell(cell: Any, number: int) -> Cell:
    if type(cell) is not dict or cell.get("cell_type") not in ("code", "markdown", "raw"):
        raise Unreadable(f"cell {number} is none")
    source = cell.get("source", "")
    if type(source) is list and all(type(line) is str for line in source):
        source = "".join(source)
    if type(source) is not str:
        raise Unreadable(f"cell {number} has no text")
    source = source.encode("utf-8", "replace").decode()  # a lone surrogate is no text that a file can hold
    metadata = cell.get("metadata")
    marks = metadata.get("nbgrader") if type(metadata) is dict else None
    marks = marks if type(marks) is dict else {}
    grade_id = marks.get("grade_id")
    points = marks.get("points")
    cell_id = cell.get("id")
    return Cell(
        cell["cell_type"], source, cell_id if type(cell_id) is str else "", grade_id if type(grade_id) is str else None,
        marks.get("grade") is True, marks.get("solution") is True,
        float(points) if isinstance(points, int | float) and 0 <= points <= MOST_POINTS else 0.0,
    )  # fmt: skip


def _filled(model: Cell, cell: Cell) -> Cell:
    """The instructor's cell; an answer has the student's source in it."""
    source = cell.source if model.solution else model.source
    return Cell(model.kind, source, model.cell_id, model.grade_id, model.grade, model.solution, model.points)


def _is_changed(model: Cell, cell: Cell) -> bool:
    """Whether a test or a given cell came back with another text, or with points of its own."""
    if model.kind != "code" or model.role == STUDENT:
        return False
    points = cell.points if cell.grade_id == model.grade_id else model.points
    return points != model.points or _bare(cell.source) not in (_bare(model.released()), _bare(model.source))


def _part(cell: Cell) -> Part:
    return Part(cell.role, cell.released() if cell.role == GIVEN else cell.source, cell.grade_id, cell.points)


def _same_text(model: Cell, cell: Cell) -> bool:
    return cell.kind == model.kind and not model.solution and _bare(cell.source) == _bare(model.released())


def _same_name(model: Cell, cell: Cell) -> bool:
    """Whether a code cell defines the name that a solution cell is named after."""
    name = re.escape(model.grade_id or "")
    defines = rf"^(?:async def|def|class)\s+{name}\b|^{name}\s*(?::[^=\n]+)?=[^=]"
    return model.solution and cell.kind == "code" and re.search(defines, cell.source, re.MULTILINE) is not None


def _same_cell_id(model: Cell, cell: Cell) -> bool:
    return bool(model.cell_id) and cell.cell_id == model.cell_id and cell.kind == model.kind


def _bare(source: str) -> str:
    return "\n".join(line.strip() for line in source.splitlines() if line.strip())


_WAYS: dict[str, Callable[[Cell, Cell], bool]] = {
    "cell id": _same_cell_id, "text": _same_text, "name": _same_name,
}  # fmt: skip
