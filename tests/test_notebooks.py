"""Broken notebooks: what can be mended safely is mended and reported, what cannot be read is named."""

import json

import pytest
from attacks.harness import GOOD, code, instructor, markdown, notebook, submission

from llmlab.grading.notebooks import Unreadable, WrongStructure, align, is_of_lab, read_cells


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return read_cells(instructor(tmp_path_factory.mktemp("lab")).encode())


def cells_of(text):
    return json.loads(text)["cells"]


def order(aligned):
    return [part.grade_id for part in aligned.parts if part.grade_id]


IN_ORDER = ["given", "double", "test_double", "triple", "test_triple"]


def test_an_honest_notebook_needs_no_mending(lab):
    aligned = align(lab, read_cells(submission(GOOD["double"]).encode()))
    assert aligned.mended == ()
    assert order(aligned) == IN_ORDER
    sources = {part.grade_id: part.source for part in aligned.parts}
    assert sources["double"] == GOOD["double"]
    assert "HIDDEN TESTS" in sources["test_double"]


def test_metadata_that_another_editor_stripped_is_found_again(lab):
    stripped = [{**cell, "metadata": {}} for cell in cells_of(submission(GOOD["double"]))]
    aligned = align(lab, read_cells(notebook(stripped).encode()))
    assert order(aligned) == IN_ORDER
    assert {part.grade_id: part.source for part in aligned.parts}["double"] == GOOD["double"]
    assert len(aligned.mended) == 5
    assert all("had lost its mark" in note for note in aligned.mended)


def test_the_last_of_several_copies_counts(lab):
    cells = cells_of(submission("first = 1"))
    position = next(i for i, c in enumerate(cells) if c["source"] == "first = 1")
    cells.insert(position + 1, {**cells[position], "source": GOOD["double"]})
    aligned = align(lab, read_cells(notebook(cells).encode()))
    sources = [part.source for part in aligned.parts]
    assert sources.index("first = 1") < sources.index(GOOD["double"])
    assert {part.grade_id: part.source for part in aligned.parts if part.grade_id}["double"] == GOOD["double"]
    assert aligned.mended == ("cell 'double' stood more than once; the last copy counts",)


@pytest.mark.parametrize("missing", IN_ORDER)
def test_a_missing_cell_comes_back_in_its_place(lab, missing):
    kept = [
        c for c in cells_of(submission(GOOD["double"])) if c["metadata"].get("nbgrader", {}).get("grade_id") != missing
    ]
    aligned = align(lab, read_cells(notebook(kept).encode()))
    assert order(aligned) == IN_ORDER
    source = {part.grade_id: part.source for part in aligned.parts}[missing]
    assert (source == "") == (missing in ("double", "triple"))
    assert len(aligned.mended) == 1


def test_edited_tests_and_points_give_way_to_the_instructors(lab):
    cells = cells_of(submission())
    for cell in cells:
        marks = cell["metadata"].get("nbgrader", {})
        if marks.get("grade"):
            cell["source"], marks["points"], marks["solution"] = "check = None", 1000, True
    aligned = align(lab, read_cells(notebook(cells).encode()))
    tests = [part for part in aligned.parts if part.kind == "test"]
    assert [part.points for part in tests] == [3, 3]
    assert all("@check" in part.source for part in tests)
    for name in ("test_double", "test_triple"):
        assert f"cell '{name}', which is not the student's, had been changed; the lab's own counts" in aligned.mended


@pytest.mark.parametrize("name", ["given", "test_double"])
def test_a_changed_cell_that_is_not_the_students_is_named(lab, name):
    cells = cells_of(submission(GOOD["double"]))
    changed = next(c for c in cells if c["metadata"].get("nbgrader", {}).get("grade_id") == name)
    changed["source"] += "\nmore = 1"
    aligned = align(lab, read_cells(notebook(cells).encode()))
    assert aligned.mended == (f"cell '{name}', which is not the student's, had been changed; the lab's own counts",)
    changed["source"] = changed["source"].removesuffix("more = 1") + "\n\n"  # an editor's blank lines are no change
    assert align(lab, read_cells(notebook(cells).encode())).mended == ()


def test_points_of_a_students_own_are_named_even_where_the_test_is_the_labs(lab):
    cells = cells_of(submission(GOOD["double"]))
    next(c for c in cells if c["metadata"].get("nbgrader", {}).get("grade"))["metadata"]["nbgrader"]["points"] = 1000
    assert len(align(lab, read_cells(notebook(cells).encode())).mended) == 1


def test_a_notebook_is_clearly_of_the_lab_where_most_answers_are_in_it(lab):
    cells = cells_of(submission(GOOD["double"]))
    marked = notebook(cells).encode()
    assert is_of_lab(lab, marked)
    assert is_of_lab(lab, notebook([{**cell, "metadata": {}} for cell in cells]).encode())
    assert not is_of_lab(lab, notebook([code("import random", "given"), code(GOOD["double"], "double")]).encode())
    assert not is_of_lab(lab, b"no notebook")


def test_a_notebook_of_something_else_is_told_apart(lab):
    with pytest.raises(WrongStructure):
        align(lab, read_cells(notebook([code("print(1)"), markdown("# Another lab")]).encode()))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"x", b"[]", b"null", b'{"cells": {}}', b'{"worksheets": []}', b"\xff\xfe", b"[" * 200_000,
        b'{"cells": [1]}', b'{"cells": [{"cell_type": "code", "source": 5}]}', b'{"cells": [{"cell_type": "magic"}]}',
        json.dumps({"cells": [{"cell_type": "raw", "source": ""}] * 2001}).encode(), b" " * (20 * 2**20 + 1),
    ],
    ids=lambda data: f"{data[:30]!r} of {len(data)}",
)  # fmt: skip
def test_what_is_no_notebook_is_named(data):
    with pytest.raises(Unreadable):
        read_cells(data)
