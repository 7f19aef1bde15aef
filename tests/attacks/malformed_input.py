"""Attacks on what reads a submission: files that are no notebook, or not quite one."""

import json
import math
import os
from dataclasses import replace

from attacks.harness import LIMITS, TRIPLE_ONLY, WRONG, Attack, Fault, Plain, code, graded, notebook, submission
from llmlab.grading.notebooks import MOST_BYTES, MOST_CELLS
from llmlab.grading.submissions import find_students, read_submission

BRIEF = replace(LIMITS, seconds=15)


def changed(change, text=None):
    """A student's notebook, with a change made to the document."""
    document = json.loads(text or submission())
    change(document)
    return json.dumps(document)


def cell_of(document, grade_id):
    return next(c for c in document["cells"] if c["metadata"].get("nbgrader", {}).get("grade_id") == grade_id)


def marks_of(document, grade_id):
    return cell_of(document, grade_id)["metadata"]["nbgrader"]


def ends_as(*statuses, score=None):
    def contained(result, ground):
        assert result["status"] in statuses
        assert result["score"] == score

    return contained


unreadable = ends_as("unreadable")
graded_as_usual = ends_as("ok", score=TRIPLE_ONLY)


def is_given_up(graded, ground):
    """nbgrader ends with an error, and in the gradebook there is nothing, which it counts as 0."""
    assert graded.score is None
    assert not list(graded.folder.glob("*.ipynb"))


def ends_the_class(graded, ground):
    """And nobody behind it is graded."""
    is_given_up(graded, ground)
    assert "nbgrader update ." in graded.log


def has_a_zero(graded, ground):
    """That nobody can have earned, since nothing of it was read as it was meant."""
    assert graded.score == 0


GIVEN_UP = Plain(is_given_up)


def first_cell_is(cell):
    return lambda document: document["cells"].insert(0, cell)


def mark_is(name, value, grade_id="test_double"):
    return lambda document: marks_of(document, grade_id).update({name: value})


DEEP = '{"cells": ' + "[" * 100_000 + "]" * 100_000 + "}"
NOT_JSON = "double = lambda n: n * 2\n"
FORMAT_3 = json.dumps({"worksheets": [{"cells": json.loads(submission())["cells"]}], "metadata": {}, "nbformat": 3, "nbformat_minor": 0})  # fmt: skip
NOT_UTF8 = submission(before="x = 'caf\u00e9'").replace("\\u00e9", "\u00e9").encode("latin-1")
# Within the size that a notebook may have; each byte grows several times where it is passed on as text.
MUCH_NOT_UTF8 = b'{"cells": "' + b"\xff" * (12 * 2**20) + b'"}'
MANY_QUOTES = submission(before="# " + '"' * (9 * 2**20))
TOO_LARGE = submission(before="#" + "x" * MOST_BYTES)
TOO_MANY_CELLS = notebook([*(code("") for _ in range(MOST_CELLS)), *json.loads(submission())["cells"]])
MANY_NUMBERS = submission().replace('"points": 3', f'"points": {"9" * 5000}', 1)
HUGE_POINTS = submission().replace('"points": 3', f'"points": 1{"0" * 400}', 1)
NAN_POINTS = changed(mark_is("points", math.nan))
SURROGATES = submission(before="print('\ud800')", double="def double(n):\n    return '\udfff'")
NUL_IN_SOURCE = submission("def double(n):\n    return 7\n\0")
NUL_IN_FILE = submission().replace("return 7", "return 7\0")


ODD_CELLS = {
    "none": None,
    "a number": 7,
    "a list": [1],
    "without a type": {},
    "of a kind that is a list": {"cell_type": []},
}
ODD_CELL_TEXTS = {name: changed(first_cell_is(cell)) for name, cell in ODD_CELLS.items()}


def odd_cells_contained(result, ground):
    """All of them: the one that was handed in, and the others read by hand."""
    unreadable(result, ground)
    others = graded([ground.bundle(t, student=f"student-{n:02d}") for n, t in enumerate(ODD_CELL_TEXTS.values())])
    assert {r["status"] for r in others} == {"unreadable"}


ODD_SOURCES = notebook([
    *({**code("x = 1"), "source": ["x = ", "1\n"]} for _ in range(2)), {**code(""), "source": None},
    *json.loads(submission())["cells"],
])  # fmt: skip


def odd_metadata(document):
    document["metadata"] = "none"
    document["nbformat_minor"] = {"a": []}
    for number, cell in enumerate(document["cells"]):
        if "nbgrader" not in cell["metadata"]:
            cell["metadata"] = [7, None, "x", [{}]][number % 4]
    document["cells"].append({**code("x = 1"), "metadata": {"nbgrader": ["solution", True]}, "id": {"a": 1}})


def odd_grade_ids(document):
    for grade_id in (["double"], {"of": "double"}, 1e999, None, True, "\ud800", ""):
        document["cells"].append(code("def double(n): return 2 * n", "double"))
        document["cells"][-1]["metadata"]["nbgrader"]["grade_id"] = grade_id


def twice(document):
    """A second test cell of the same name, easy and worth much, and the answer once more."""
    easy = code("check = 1", "test_double", grade=True, solution=False, points=100)
    document["cells"] = [*document["cells"], easy, code(WRONG, "double")]


def twice_contained(result, ground):
    graded_as_usual(result, ground)
    assert result["max_score"] == 6
    assert sum("more than once" in note for note in result["mended"]) == 2
    assert sum(cell["grade_id"] == "test_double" for cell in result["cells"]) == 1


def worth_more(document):
    marks_of(document, "test_triple")["points"] = 1000
    marks_of(document, "double").update(grade=True, points=50)


def worth_more_contained(result, ground):
    graded_as_usual(result, ground)
    assert result["max_score"] == 6


def no_test(document):
    cell = cell_of(document, "test_double")
    cell["cell_type"], cell["metadata"]["nbgrader"]["solution"] = "markdown", True


def no_test_contained(result, ground):
    graded_as_usual(result, ground)
    (cell,) = [c for c in result["cells"] if c["grade_id"] == "test_double"]
    assert [o["passed"] for o in cell["outcomes"]] == [False, False]


# Where cells are joined into one program, the text that begins in the answer swallows the test behind it.
SWALLOWED = submission('def double(n):\n    return 7\n"""', 'def triple(n):\n    return n * 3\n"""')


def swallowed_contained(result, ground):
    assert (result["status"], result["score"]) == ("ok", 0)
    assert sum(cell["error"] is not None and cell["error"]["name"] == "SyntaxError" for cell in result["cells"]) == 2


# In UTF-7 the comment has a line break, and what follows is no comment.
COOKIE = submission("# coding: utf-7\ndef double(n):\n    return 7\n#+AAo-planted = 1")


# What a cell measured, made by hand: the result holds it as it is.
MEASURED = """
from llmlab.grading.checks import MEASUREMENT_TYPE
measurement = {{"name": "bytes", "predicted": {}, "measured": 1.0, "unit": "bytes"}}
get_ipython().collected.add({{"output_type": "display_data", "data": {{MEASUREMENT_TYPE: measurement}}, "metadata": {{}}}}, 1)
"""
LONG_MEASUREMENT = submission(before=MEASURED.format("1 << 16_000"))
NAN_MEASUREMENT = submission(before=MEASURED.format("float('nan')"))


def nan_measurement_contained(result, ground):
    graded_as_usual(result, ground)
    json.dumps(result, allow_nan=False)


def others_work(home):
    """The notebook of another student of the class, in which `double` is right."""
    file = home.parent.parent / "other" / home.name / f"{home.name}.ipynb"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(submission("def double(n):\n    return n * 2"))
    return file


def notebook_in(home):
    home.mkdir(parents=True, exist_ok=True)
    return home / f"{home.name}.ipynb"


def link(home):
    notebook_in(home).symlink_to(others_work(home))


def folder_link(home):
    home.parent.mkdir(parents=True, exist_ok=True)
    home.symlink_to(others_work(home).parent)


def pipe(home):
    os.mkfifo(notebook_in(home))


def device(home):
    """/dev/zero, of which there is no end: a link to it, since making a device takes rights that students lack."""
    notebook_in(home).symlink_to("/dev/zero")


def directory(home):
    notebook_in(home).mkdir()


def sparse(home):
    """A file that takes no disk and says that it has a terabyte."""
    with notebook_in(home).open("wb") as handle:
        handle.truncate(2**40)


def nothing_read(result, ground):
    assert (result["status"], result["score"]) == ("missing", None)
    assert read_submission(ground.folder / "submitted", "toy", "student-01").left_aside == ("toy.ipynb",)


def folder_link_contained(result, ground):
    assert find_students(ground.folder / "submitted", "toy") == ["other"]
    assert (result["status"], result["score"]) == ("missing", None)


def is_others_score(graded, ground):
    assert graded.score > TRIPLE_ONLY


def never_ends(graded, ground):
    assert graded.seconds is None


def takes_all_memory(graded, ground):
    """What the command may have, which would be all that there is."""
    assert "MemoryError" in graded.log


def attack(name, text, contained, control=GIVEN_UP, limits=BRIEF):
    return Attack("malformed input", name, lambda ground: text, contained, control, limits)


def laid_out(name, lay_out, contained, control):
    """An attack by what lies in the student's folder."""

    def text(ground):
        lay_out(ground.folder / "submitted" / "student-01" / "toy")
        return read_submission(ground.folder / "submitted", "toy", "student-01").text

    return Attack("malformed input", name, text, contained, control, BRIEF, lay_out)


def fault(name, text, contained):
    return Fault(name, lambda ground: text, contained, BRIEF)


LITTLE_MEMORY = 3 * 2**30  # for the command, most of it for what it has mapped when it starts

ATTACKS = [
    attack("a file that is no JSON", NOT_JSON, unreadable),
    attack("lists nested a hundred thousand deep", DEEP, unreadable),
    attack("a number of five thousand digits", MANY_NUMBERS, unreadable),
    attack("points larger than any float", HUGE_POINTS, graded_as_usual),
    attack("no cells", '{"nbformat": 4}', unreadable),
    attack("a notebook of format 3", FORMAT_3, unreadable, Plain(has_a_zero)),
    attack("cells that are none", ODD_CELL_TEXTS["none"], odd_cells_contained),
    attack("a cell whose source is null", ODD_SOURCES, unreadable),
    attack("half a character in the source", SURROGATES, graded_as_usual),
    attack("a file in another encoding", NOT_UTF8, unreadable),
    attack("metadata of odd types", changed(odd_metadata), graded_as_usual),
    attack("grade ids of odd types", changed(odd_grade_ids), graded_as_usual),
    attack("cells of the lab twice", changed(twice), twice_contained, Plain(ends_the_class, alone=True)),
    attack("points changed", changed(worth_more), worth_more_contained),
    attack("a test turned into text", changed(no_test), no_test_contained),
    laid_out("a link in place of the notebook", link, nothing_read, Plain(is_others_score)),
    laid_out("a link in place of the folder", folder_link, folder_link_contained, Plain(is_others_score)),
    laid_out("a pipe in place of the notebook", pipe, nothing_read, Plain(never_ends, alone=True, seconds=8)),
    laid_out(
        "a link to an endless device", device, nothing_read, Plain(takes_all_memory, alone=True, memory=LITTLE_MEMORY)
    ),
    laid_out("a folder in place of the notebook", directory, nothing_read, GIVEN_UP),
    laid_out(
        "a file of a terabyte of holes", sparse, unreadable, Plain(takes_all_memory, alone=True, memory=LITTLE_MEMORY)
    ),
]  # fmt: skip
FAULTS = [
    fault("an empty file", "", unreadable),
    fault("points that are no number", NAN_POINTS, graded_as_usual),
    fault("megabytes that are no UTF-8", MUCH_NOT_UTF8, unreadable),
    fault("megabytes of quotation marks", MANY_QUOTES, ends_as("ok", "timeout", score=TRIPLE_ONLY)),
    fault("a file larger than may be", TOO_LARGE, unreadable),
    fault("thousands of cells", TOO_MANY_CELLS, unreadable),
    fault("a NUL in the source", NUL_IN_SOURCE, graded_as_usual),
    fault("a NUL in the file", NUL_IN_FILE.replace("\\u0000", "\0"), unreadable),
    fault("a string left open before the test", SWALLOWED, swallowed_contained),
    fault("an encoding named in a comment", COOKIE, graded_as_usual),
    fault("a measurement of five thousand digits", LONG_MEASUREMENT, ends_as("ok", "crashed", score=TRIPLE_ONLY)),
    fault("a measurement that is no number", NAN_MEASUREMENT, nan_measurement_contained),
]  # fmt: skip
