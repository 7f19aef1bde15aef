"""Attacks on what reads a submission: files that are no notebook, or not quite one."""

import json
import math
import os
import resource
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import nbformat
import pytest
from nbconvert import PythonExporter
from nbformat.reader import NotJSONError
from nbgrader.utils import determine_grade

from attacks.harness import LIMITS, PLAIN_TESTS, TRIPLE_ONLY, WRONG, Attack, code, graded, notebook, submission
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


def read_plainly(text):
    """As nbgrader reads it; that cells of a toy lab have no ids is no matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nbformat.warnings.MissingIDFieldWarning)
        return nbformat.reads(text, 4)


def breaks_nbformat(text, *errors):
    """nbformat, with which nbgrader reads, ends with an error."""

    def bites(ground):
        with pytest.raises(errors):
            read_plainly(text.decode() if isinstance(text, bytes) else text)

    return bites


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


def format_3_bites(ground):
    with pytest.raises(KeyError):
        json.loads(FORMAT_3)["cells"]


def nan_points_bite(ground):
    cells = read_plainly(NAN_POINTS).cells
    assert math.isnan(sum(c.metadata.get("nbgrader", {}).get("points", 0) for c in cells))


def huge_points_bite(ground):
    cells = read_plainly(HUGE_POINTS).cells
    with pytest.raises(OverflowError):
        sum(float(c.metadata.get("nbgrader", {}).get("points", 0)) for c in cells)


def surrogates_bite(ground):
    with pytest.raises(UnicodeEncodeError):
        (ground.folder / "autograded.ipynb").write_text(nbformat.v4.writes(read_plainly(SURROGATES)), encoding="utf-8")


def nul_bites(ground):
    cells = read_plainly(NUL_IN_SOURCE).cells
    with pytest.raises((ValueError, SyntaxError)):
        compile("\n".join(c.source for c in cells), "toy.py", "exec")


def large_bites(ground):
    """A plain reader takes it whole."""
    assert sum(len(c.source) for c in read_plainly(TOO_LARGE).cells) > MOST_BYTES


def grows(text, factor):
    """As a JSON text in a JSON text it is so much larger."""

    def bites(ground):
        shown = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        assert len(json.dumps(json.dumps(shown))) > factor * len(text)

    return bites


def many_cells_bite(ground):
    assert len(read_plainly(TOO_MANY_CELLS).cells) > MOST_CELLS


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


def odd_cells_bite(ground):
    for text in ODD_CELL_TEXTS.values():
        with pytest.raises((AttributeError, TypeError, nbformat.ValidationError)):
            [c.cell_type.strip() for c in read_plainly(text).cells]


ODD_SOURCES = notebook([
    *({**code("x = 1"), "source": ["x = ", "1\n"]} for _ in range(2)), {**code(""), "source": None},
    *json.loads(submission())["cells"],
])  # fmt: skip


def odd_source_bites(ground):
    with pytest.raises(TypeError):
        "\n".join("".join(c["source"]) for c in json.loads(ODD_SOURCES)["cells"])


def odd_metadata(document):
    document["metadata"] = "none"
    document["nbformat_minor"] = {"a": []}
    for number, cell in enumerate(document["cells"]):
        if "nbgrader" not in cell["metadata"]:
            cell["metadata"] = [7, None, "x", [{}]][number % 4]
    document["cells"].append({**code("x = 1"), "metadata": {"nbgrader": ["solution", True]}, "id": {"a": 1}})


def odd_metadata_bites(ground):
    document = json.loads(changed(odd_metadata))
    with pytest.raises((AttributeError, TypeError)):
        [c["metadata"].get("nbgrader", {}).get("grade_id") for c in document["cells"]]


def odd_grade_ids(document):
    for grade_id in (["double"], {"of": "double"}, 1e999, None, True, "\ud800", ""):
        document["cells"].append(code("def double(n): return 2 * n", "double"))
        document["cells"][-1]["metadata"]["nbgrader"]["grade_id"] = grade_id


def odd_grade_ids_bite(ground):
    with pytest.raises(TypeError):
        {c["metadata"].get("nbgrader", {}).get("grade_id"): c for c in json.loads(changed(odd_grade_ids))["cells"]}


def twice(document):
    """A second test cell of the same name, easy and worth much, and the answer once more."""
    easy = code("check = 1", "test_double", grade=True, solution=False, points=100)
    document["cells"] = [*document["cells"], easy, code(WRONG, "double")]


def twice_contained(result, ground):
    graded_as_usual(result, ground)
    assert result["max_score"] == 6
    assert sum("more than once" in note for note in result["mended"]) == 2
    assert sum(cell["grade_id"] == "test_double" for cell in result["cells"]) == 1


def twice_bites(ground):
    """Who keeps cells by their names keeps the student's."""
    kept = {c["metadata"].get("nbgrader", {}).get("grade_id"): c for c in json.loads(changed(twice))["cells"]}
    assert kept["test_double"]["metadata"]["nbgrader"]["points"] == 100


def worth_more(document):
    marks_of(document, "test_triple")["points"] = 1000
    marks_of(document, "double").update(grade=True, points=50)


def worth_more_contained(result, ground):
    graded_as_usual(result, ground)
    assert result["max_score"] == 6


def worth_more_bites(ground):
    cells = read_plainly(changed(worth_more)).cells
    assert sum(c.metadata.get("nbgrader", {}).get("points", 0) for c in cells) > 1000


def no_test(document):
    cell = cell_of(document, "test_double")
    cell["cell_type"], cell["metadata"]["nbgrader"]["solution"] = "markdown", True


def no_test_bites(ground):
    """nbgrader's own scoring leaves it to a person, and the cell does not run."""
    cell = nbformat.from_dict(cell_of(json.loads(changed(no_test)), "test_double"))
    assert determine_grade(cell) == (None, 3)


def no_test_contained(result, ground):
    graded_as_usual(result, ground)
    (cell,) = [c for c in result["cells"] if c["grade_id"] == "test_double"]
    assert [o["passed"] for o in cell["outcomes"]] == [False, False]


# Where cells are joined into one program, the text that begins in the answer swallows the test behind it.
SWALLOWED = submission('def double(n):\n    return 7\n"""', 'def triple(n):\n    return n * 3\n"""')


def as_program(text):
    """The cells joined, as nbconvert joins them, with plain nbgrader's tests."""
    document = json.loads(text)
    for name, test in PLAIN_TESTS.items():
        cell_of(document, f"test_{name}")["source"] = test
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nbformat.warnings.MissingIDFieldWarning)
        return PythonExporter().from_notebook_node(nbformat.from_dict(document))[0]


def swallowed_contained(result, ground):
    assert (result["status"], result["score"]) == ("ok", 0)
    assert sum(cell["error"] is not None and cell["error"]["name"] == "SyntaxError" for cell in result["cells"]) == 2


def swallowed_bites(ground):
    """No test of `double` is left."""
    program = as_program(SWALLOWED)
    with pytest.raises(NameError, match="triple"):
        exec(compile(program, "toy.py", "exec"), {})


# In UTF-7 the comment has a line break, and what follows is no comment.
COOKIE = submission("# coding: utf-7\ndef double(n):\n    return 7\n#+AAo-planted = 1")


def cookie_contained(result, ground):
    graded_as_usual(result, ground)


def cookie_bites(ground):
    names = {}
    exec(compile(cell_of(json.loads(COOKIE), "double")["source"].encode(), "toy.py", "exec"), names)
    assert names["planted"] == 1


# What a cell measured, made by hand: the result holds it as it is.
MEASURED = """
from llmlab.grading.checks import MEASUREMENT_TYPE
measurement = {{"name": "bytes", "predicted": {}, "measured": 1.0, "unit": "bytes"}}
get_ipython().collected.add({{"output_type": "display_data", "data": {{MEASUREMENT_TYPE: measurement}}, "metadata": {{}}}}, 1)
"""
LONG_MEASUREMENT = submission(before=MEASURED.format("1 << 16_000"))
NAN_MEASUREMENT = submission(before=MEASURED.format("float('nan')"))


def long_measurement_bites(ground):
    with pytest.raises(ValueError, match="digits"):
        json.dumps({"predicted": 1 << 16_000})


def nan_measurement_contained(result, ground):
    graded_as_usual(result, ground)
    json.dumps(result, allow_nan=False)


def nan_measurement_bites(ground):
    def refuse(constant):
        raise ValueError(constant)

    with pytest.raises(ValueError, match="NaN"):
        json.loads(json.dumps({"predicted": float("nan")}), parse_constant=refuse)


def handed_in(ground, student="student-01"):
    """The folder in which a student's notebook lies, and the class's."""
    folder = ground.folder / "submitted"
    home = folder / student / "toy"
    home.mkdir(parents=True, exist_ok=True)
    return folder, home / "toy.ipynb"


def others_work(ground):
    """Another student's notebook, in which `double` is right."""
    _, file = handed_in(ground, "student-02")
    file.write_text(submission("def double(n):\n    return n * 2"))
    return file


def link(ground):
    folder, file = handed_in(ground)
    file.symlink_to(others_work(ground))
    return read_submission(folder, "toy", "student-01").text


def nothing_read(result, ground):
    assert (result["status"], result["score"]) == ("missing", None)
    assert read_submission(ground.folder / "submitted", "toy", "student-01").left_aside == ("toy.ipynb",)


def link_bites(ground):
    link(ground)
    text = (ground.folder / "submitted/student-01/toy/toy.ipynb").read_text()
    assert "n * 2" in text


def folder_link(ground):
    others_work(ground)
    folder = ground.folder / "submitted"
    (folder / "student-01").mkdir()
    (folder / "student-01" / "toy").symlink_to(folder / "student-02" / "toy")
    return read_submission(folder, "toy", "student-01").text


def folder_link_contained(result, ground):
    assert find_students(ground.folder / "submitted", "toy") == ["student-02"]
    assert (result["status"], result["score"]) == ("missing", None)


def folder_link_bites(ground):
    folder_link(ground)
    assert "n * 2" in (ground.folder / "submitted/student-01/toy/toy.ipynb").read_text()


def pipe(ground):
    folder, file = handed_in(ground)
    os.mkfifo(file)
    return read_submission(folder, "toy", "student-01").text


def pipe_bites(ground):
    """A plain reader waits until somebody writes."""
    _, file = handed_in(ground)
    os.mkfifo(file)
    reader = threading.Thread(target=file.read_bytes, daemon=True)
    reader.start()
    reader.join(1)
    assert reader.is_alive()
    with file.open("wb"):
        pass
    reader.join(5)
    assert not reader.is_alive()


def device(ground):
    """/dev/zero, of which there is no end: a link to it, since making a device takes rights that students lack."""
    folder, file = handed_in(ground)
    file.symlink_to("/dev/zero")
    return read_submission(folder, "toy", "student-01").text


def device_bites(ground):
    device(ground)
    with (ground.folder / "submitted/student-01/toy/toy.ipynb").open("rb") as handle:
        assert len(handle.read(MOST_BYTES + 2)) == MOST_BYTES + 2


def directory(ground):
    folder, file = handed_in(ground)
    file.mkdir()
    return read_submission(folder, "toy", "student-01").text


def directory_bites(ground):
    _, file = handed_in(ground)
    file.mkdir()
    with pytest.raises(IsADirectoryError):
        nbformat.read(file, 4)


def sparse(ground):
    """A file that takes no disk and says that it has a terabyte."""
    folder, file = handed_in(ground)
    with file.open("wb") as handle:
        handle.truncate(2**40)
    return read_submission(folder, "toy", "student-01").text


READER = "import sys, pathlib; pathlib.Path(sys.argv[1]).read_bytes()"


def sparse_bites(ground):
    """A reader with two gigabytes of memory ends; one with more would take it all."""
    _, file = handed_in(ground)
    with file.open("wb") as handle:
        handle.truncate(2**40)
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER, str(file)], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)),
    )  # fmt: skip
    assert "MemoryError" in done.stderr


def attack(name, text, contained, bites, limits=BRIEF):
    made = text if callable(text) else lambda ground: text
    return Attack("malformed input", name, made, contained, bites, limits)


ATTACKS = [
    attack("a file that is no JSON", NOT_JSON, unreadable, breaks_nbformat(NOT_JSON, NotJSONError)),
    attack("an empty file", "", unreadable, breaks_nbformat("", NotJSONError)),
    attack("lists nested a hundred thousand deep", DEEP, unreadable, breaks_nbformat(DEEP, RecursionError)),
    attack("a number of five thousand digits", MANY_NUMBERS, unreadable, breaks_nbformat(MANY_NUMBERS, ValueError)),
    attack("points larger than any float", HUGE_POINTS, graded_as_usual, huge_points_bite),
    attack("points that are no number", NAN_POINTS, graded_as_usual, nan_points_bite),
    attack("no cells", '{"nbformat": 4}', unreadable, breaks_nbformat('{"nbformat": 4}', AttributeError, nbformat.ValidationError)),
    attack("a notebook of format 3", FORMAT_3, unreadable, format_3_bites),
    attack("cells that are none", ODD_CELL_TEXTS["none"], odd_cells_contained, odd_cells_bite),
    attack("a cell whose source is null", ODD_SOURCES, unreadable, odd_source_bites),
    attack("half a character in the source", SURROGATES, graded_as_usual, surrogates_bite),
    attack("a file in another encoding", NOT_UTF8, unreadable, breaks_nbformat(NOT_UTF8, UnicodeDecodeError)),
    attack("megabytes that are no UTF-8", MUCH_NOT_UTF8, unreadable, grows(MUCH_NOT_UTF8, 5)),
    attack("megabytes of quotation marks", MANY_QUOTES, ends_as("ok", "timeout", score=TRIPLE_ONLY), grows(MANY_QUOTES, 3)),
    attack("a file larger than may be", TOO_LARGE, unreadable, large_bites),
    attack("thousands of cells", TOO_MANY_CELLS, unreadable, many_cells_bite),
    attack("metadata of odd types", changed(odd_metadata), graded_as_usual, odd_metadata_bites),
    attack("grade ids of odd types", changed(odd_grade_ids), graded_as_usual, odd_grade_ids_bite),
    attack("cells of the lab twice", changed(twice), twice_contained, twice_bites),
    attack("points changed", changed(worth_more), worth_more_contained, worth_more_bites),
    attack("a test turned into text", changed(no_test), no_test_contained, no_test_bites),
    attack("a NUL in the source", NUL_IN_SOURCE, graded_as_usual, nul_bites),
    attack("a NUL in the file", NUL_IN_FILE.replace("\\u0000", "\0"), unreadable, breaks_nbformat(NUL_IN_FILE.replace("\\u0000", "\0"), NotJSONError)),
    attack("a string left open before the test", SWALLOWED, swallowed_contained, swallowed_bites),
    attack("an encoding named in a comment", COOKIE, cookie_contained, cookie_bites),
    attack("a measurement of five thousand digits", LONG_MEASUREMENT, ends_as("ok", "crashed", score=TRIPLE_ONLY), long_measurement_bites),
    attack("a measurement that is no number", NAN_MEASUREMENT, nan_measurement_contained, nan_measurement_bites),
    attack("a link in place of the notebook", link, nothing_read, link_bites),
    attack("a link in place of the folder", folder_link, folder_link_contained, folder_link_bites),
    attack("a pipe in place of the notebook", pipe, nothing_read, pipe_bites),
    attack("a link to an endless device", device, nothing_read, device_bites),
    attack("a folder in place of the notebook", directory, nothing_read, directory_bites),
    attack("a file of a terabyte of holes", sparse, unreadable, sparse_bites),
]  # fmt: skip
