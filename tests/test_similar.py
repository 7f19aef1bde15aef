"""Likeness of answers: what stays alike under disguise, what is left out, and that independent work is not listed."""

import re

import nbformat
import pytest
from toy_course import GOOD, ToyCourse, nothing
from typer.testing import CliRunner

from llmlab.authoring.answers import read_answers
from llmlab.authoring.lab import Lab
from llmlab.cli import app
from llmlab.grading.notebooks import read_cells
from llmlab.grading.outward import _sources
from llmlab.grading.similar import (
    ALIKE,
    OWN_CELLS,
    copies_of_package,
    fingerprint,
    reaches_for,
    released_sources,
    similar_pairs,
    withheld_names,
    written_cells,
)
from llmlab.grading.withhold import names_withheld_by

LONG = """def total(config, tokens):
    # rows first
    rows = config.vocab_size + config.position_rows
    size = config.hidden_size * rows
    for layer in range(config.num_layers):
        if config.qkv_bias:
            size += 3 * config.hidden_size
        size += tokens * config.num_heads // 2
    return size, {"rows": rows, "layers": [layer for layer in range(7)]}
"""
DISGUISED = '''def total(cfg,n):
    """My own work."""
    a = (cfg.vocab_size
         + cfg.position_rows)


    b = cfg.hidden_size*a
    for i in range(cfg.num_layers):   # each
        if cfg.qkv_bias:
            b += 4 * cfg.hidden_size
        b += n * cfg.num_heads // 16
    return b, {'x': a, 'y': [i for i in range(8)]}
'''
OTHER = """def total(config, tokens):
    parts = [sum(shape) for shape in shapes_of(config)]
    while parts and parts[-1] is None:
        parts.pop()
    assert all(part >= 0 for part in parts), "negative"
    return sum(parts), dict(rows=len(parts), layers=sorted(parts, key=lambda part: -part)[: tokens or None])
"""


def test_names_literals_comments_and_layout_do_not_matter():
    assert fingerprint("x = 1 + f(y, 'a') * 2  # one") == fingerprint('total=3+g(\n    z, "b") * 4')
    assert fingerprint(LONG) != fingerprint(OTHER)
    assert len(fingerprint(LONG) & fingerprint(DISGUISED)) / len(fingerprint(LONG)) > 0.8


@pytest.mark.parametrize(
    "source",
    ["", "\n", "def broken(:\n    return 1", "'''never closed", "x = (1,", "%matplotlib inline\n!ls", "\x00\x01", "  dedent\n x\ny",
     "ü = 'ß' + \"\\ud800\"", "0x 1__2 3abc $ ? §", "f'{x!r:>{w}}'"],
)  # fmt: skip
def test_whatever_a_student_writes_has_fingerprints(source):
    assert isinstance(fingerprint(source), frozenset)
    assert fingerprint(source) == fingerprint(source)


def test_an_answer_that_does_not_parse_is_still_found():
    broken = "def total(:\n'''\n" + LONG
    pairs = similar_pairs({"a": {"e": broken}, "b": {"e": "def total(:\n'''\n" + re.sub(r"\bsize\b", "s", LONG)}}, [])
    assert [pair.share for pair in pairs] == [1.0]
    assert similar_pairs({"a": {"e": LONG}, "b": {"e": LONG + "\nprint('never"}}, [])


def test_a_disguised_copy_is_listed_and_other_work_is_not():
    cells = {"ann": {"e": LONG}, "bob": {"e": DISGUISED}, "cem": {"e": OTHER}, "dee": {"other": LONG}}
    pairs = similar_pairs(cells, [])
    assert [(pair.student, pair.other, pair.exercise) for pair in pairs] == [("ann", "bob", "e")]
    assert pairs[0].share > 0.8


def test_what_was_released_and_what_is_short_say_nothing():
    assert similar_pairs({"a": {"e": LONG}, "b": {"e": LONG}}, [LONG]) == []
    assert similar_pairs({"a": {"e": GOOD}, "b": {"e": GOOD}}, []) == []
    mine = LONG + "\n" + OTHER
    assert [p.share for p in similar_pairs({"a": {"e": mine}, "b": {"e": mine}}, [LONG])] == [1.0]


def test_a_copy_inside_more_code_is_listed():
    assert [p.share > 0.8 for p in similar_pairs({"a": {"e": LONG}, "b": {"e": OTHER + "\n" + DISGUISED}}, [])] == [
        True
    ]


@pytest.fixture(scope="module")
def memory(pytestconfig):
    lab = Lab(pytestconfig.rootpath / "labs" / "memory.py")
    return lab, read_cells(nbformat.writes(lab.notebook()).encode())


@pytest.fixture(scope="module")
def package(memory):
    return _sources(withheld_names(memory[1]))


def test_the_names_are_read_from_the_given_cell(memory, package):
    assert {e.lifted_from for e in memory[0].exercises} - {None} <= package.keys()
    assert "llmlab.memory.estimate" in package


WITHHELD = ["llmlab.memory.kv_cache_bytes", "llmlab.parallel.communicator.split"]


@pytest.mark.parametrize(
    ("source", "other"),
    [
        ("from llmlab.memory import kv_cache_bytes", "llmlab.memory.kv_cache_bytes"),
        ("from llmlab.memory import *", "llmlab.memory.*"),
        ("import llmlab.memory as m\nkv_cache_bytes = m.kv_cache_bytes", "m.kv_cache_bytes"),
        ("import llmlab\nf = llmlab.parallel.communicator.split", "llmlab.parallel.communicator.split"),
        ("import llmlab.memory as m\nf = getattr(m, 'kv_cache_bytes')", "getattr(m, 'kv_cache_bytes')"),
        ("!python -c 'import llmlab.memory as m; m.kv_cache_bytes(1)'", None),
        ("import importlib", "importlib"),
        ("from subprocess import run", "subprocess"),
        ("guard = kv_cache_bytes.__closure__", "kv_cache_bytes.__closure__"),
    ],
)
def test_who_reaches_for_what_is_withheld_is_listed(source, other):
    found = reaches_for({"ann": {"e": source}}, WITHHELD)
    assert found
    assert {(pair.student, pair.exercise) for pair in found} == {("ann", "e")}
    assert other is None or other in [pair.other for pair in found]


@pytest.mark.parametrize(
    "source",
    ["def kv_cache_bytes(c):\n    return c", "parts = torch.split(x, 2), 'a b'.split()", "from llmlab.config import MODEL_CONFIGS",
     "import llmlab.memory\nx = 'split'.join(names)", "broken ("],
)  # fmt: skip
def test_who_writes_the_answer_is_not(source):
    assert reaches_for({"ann": {"e": source}}, WITHHELD) == []


def test_what_is_withheld_must_be_written_out():
    assert names_withheld_by("withhold(['a.b'])\nwithhold(['c.d', 'a.b'])") == ["a.b", "c.d"]
    for wrong in ("withhold(NAMES)", "withhold(f'a.{n}' for n in 'bc')", "withhold(['plain'])"):
        with pytest.raises(ValueError, match="withhold: expected a list of dotted names, got"):
            names_withheld_by(wrong)


def test_independent_right_answers_to_a_real_lab_are_not_listed(memory, package):
    lab, instructor = memory
    answers, released = read_answers(lab), released_sources(instructor)
    for exercise in lab.exercises:
        cells = {f"right {n}": {exercise.name: a.source} for n, a in enumerate(answers.right(exercise.name))}
        assert similar_pairs(cells, released) == []
        assert copies_of_package(cells, package, released) + reaches_for(cells, package) == []


def test_the_packages_own_code_is_listed_under_other_names(memory, package):
    lab, instructor = memory
    for exercise in lab.exercises:
        if exercise.name in ("parameter_counts", "training_bytes"):
            disguised = exercise.answer.replace("config", "cfg").replace("num_params", "count").replace("D", "width")
            for answer in (exercise.answer, disguised):
                pairs = copies_of_package({"ann": {exercise.name: answer}}, package, released_sources(instructor))
                assert [pair.other for pair in pairs] == [exercise.lifted_from]


def test_the_command_lists_and_exits_well(tmp_path, root):
    course = ToyCourse(tmp_path, root)
    package_code = _sources(["llmlab.memory.parameter_counts"])["llmlab.memory.parameter_counts"]
    course.submit("ann", course.notebook(GOOD, LONG))
    course.submit("bob", course.notebook(GOOD, "# mine", DISGUISED))
    course.submit("cem", course.notebook(GOOD, OTHER))
    course.submit("[red]dee", course.notebook(package_code.replace("parameter_counts", "double")))
    course.submit("eve", "no notebook")
    course.submit("fay", nothing())
    course.submit("gus", None)
    result = CliRunner().invoke(app, ["similar", "toy", "--course", str(course.folder)])
    assert result.exit_code == 0, result.output
    assert "4 submissions compared, 1 pairs to look at" in result.stdout
    assert [word in result.stdout for word in ("ann", "bob", OWN_CELLS, "cem")] == [True, True, True, False]
    assert all(name in result.stderr for name in ("eve", "fay", "gus (missing)"))
    assert not list(tmp_path.glob("results/*"))


def test_the_command_lists_copies_of_the_package(tmp_path, root):
    course = ToyCourse(tmp_path, root)
    notebook = course.folder / "build" / "source" / "toy" / "toy.ipynb"
    notebook.write_text(notebook.read_text().replace("kv_cache_bytes", "parameter_counts"))
    source = _sources(["llmlab.memory.parameter_counts"])["llmlab.memory.parameter_counts"]
    course.submit("[red]dee", course.notebook(source.replace("parameter_counts", "double")))
    result = CliRunner().invoke(app, ["similar", "toy", "--course", str(course.folder)])
    assert "[red]dee" in result.stdout
    assert "llmlab.memory.parameter_counts" in result.stdout
    assert "100%" in result.stdout


def test_cells_are_read_from_a_submission(memory):
    lab, instructor = memory
    written = written_cells(instructor, instructor)
    assert {e.name for e in lab.exercises} <= written.keys()
    assert not [name for name in written if name.startswith("test_") or name == "given"]


def test_the_help_says_from_which_share_on_a_pair_is_listed():
    said = CliRunner().invoke(app, ["similar", "--help"]).stdout
    assert f"{ALIKE:g} unless told" in " ".join(said.replace("│", " ").split())
