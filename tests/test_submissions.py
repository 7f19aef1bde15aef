"""What lies in submitted/: what is taken, what is left aside, and what is said of it."""

import json
import shutil

import nbformat
import pytest
from toy_course import GOOD, ToyCourse
from typer.testing import CliRunner

from llmlab.cli import app
from llmlab.grading.report import table_rows
from llmlab.grading.submissions import find_misplaced, find_students, read_submission

pytestmark = pytest.mark.xdist_group("submissions")  # one class for all of them


def lay_out(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("a lab" if "lab" in name else "{}")
    return folder


def is_lab(content):
    return content == b"a lab"


@pytest.mark.parametrize(
    ("files", "text", "notes"),
    [
        (["toy.ipynb"], "{}", []),
        (["toy.ipynb", "lab (1).ipynb", "data.csv"], "{}", []),
        (["lab (1).ipynb", "other.ipynb"], "a lab", ["there was no toy.ipynb; 'lab (1).ipynb' was taken"]),
        (["lab (1).ipynb", "lab (2).ipynb"], None, ["there is no plain file toy.ipynb; found: 'lab (1).ipynb', 'lab (2).ipynb'"]),
        (["other.ipynb"], None, ["there is no plain file toy.ipynb; found: 'other.ipynb'"]),
        ([f"lab-{n}.ipynb" for n in range(6)], None, ["there is no plain file toy.ipynb; found: " + ", ".join(f"'lab-{n}.ipynb'" for n in range(5)) + " and 1 more"]),
        ([], None, []),
    ],
)  # fmt: skip
def test_a_notebook_of_another_name_is_taken_where_one_alone_is_of_the_lab(tmp_path, files, text, notes):
    (tmp_path / "student-01" / "toy").mkdir(parents=True)
    lay_out(tmp_path / "student-01" / "toy", *files)
    found = read_submission(tmp_path, "toy", "student-01", is_lab)
    assert (found.text, list(found.notes)) == (text, notes)


def test_a_link_is_named_and_not_followed(tmp_path):
    lay_out(tmp_path, "lab.ipynb", "student-01/toy/notes.txt")
    (tmp_path / "student-01" / "toy" / "toy.ipynb").symlink_to(tmp_path / "lab.ipynb")
    found = read_submission(tmp_path, "toy", "student-01", is_lab)
    assert found.text is None
    assert "'toy.ipynb' is a link or a device and was not followed" in found.notes


def test_work_that_lies_elsewhere_is_found_and_other_labs_are_not_taken_for_it(tmp_path):
    folder = lay_out(
        tmp_path / "submitted", "a/toy/toy.ipynb", "b/Toy.ipynb", "c/TOY/toy.ipynb", "d/other/other.ipynb", "toy_e.ipynb",
        "other.ipynb", "toy/f/toy.ipynb", "notes.txt",
    )  # fmt: skip
    (folder / "g").symlink_to(folder / "a")
    (folder / "h").mkdir()
    (folder / "h" / "toy").symlink_to(folder / "a" / "toy")
    expected = "is not in a folder submitted/<student>/toy/"
    assert find_misplaced(folder, "toy") == {
        "b": f"submitted/b/Toy.ipynb {expected}",
        "c": f"submitted/c/TOY {expected}",
        "g": "submitted/g is a link, and links are not followed",
        "h": "submitted/h/toy is a link, and links are not followed",
        "toy": "submitted/toy/ holds folders; expected is submitted/<student>/toy/",
        "toy_e.ipynb": f"it {expected}",
    }
    assert find_students(folder, "toy") == ["a"]
    assert find_misplaced(tmp_path / "nowhere", "toy") == {}


ENDLESS_CELL = "while True:\n    pass"
ENDLESS_ANSWER = "def double(n):\n    while n > 1:\n        pass\n    return 2"


@pytest.fixture(scope="module")
def course(tmp_path_factory, pytestconfig):
    """A class with something to be said of every submission, graded once with little time for a cell and a property."""
    course = ToyCourse(tmp_path_factory.mktemp("class"), pytestconfig.rootpath)
    good = course.notebook(GOOD)
    bare = nbformat.from_dict(json.loads(good))
    for cell in bare.cells:
        cell.metadata, cell.id = {}, f"x{cell.id}"
    edited = nbformat.from_dict(json.loads(good))
    next(c for c in edited.cells if c.metadata.get("nbgrader", {}).get("grade")).source = "check = None"
    for student, text in {
        "as-it-should-be": good,
        "bare": nbformat.writes(bare),
        "download": None,
        "edited": nbformat.writes(edited),
        "hanging": course.notebook(GOOD, ENDLESS_CELL),
        "slow": course.notebook(ENDLESS_ANSWER),
        "marked-up": good,
        "gone": good,
    }.items():
        course.submit(student, text)
    (course.folder / "submitted" / "download" / "toy" / "toy (1).ipynb").write_text(good)
    (course.folder / "submitted" / "marked-up" / "toy" / "timestamp.txt").write_text("[/b]")
    lay_out(course.folder / "submitted", "lost/toy.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMLAB_CELL_SECONDS", "2")
        patch.setenv("LLMLAB_CHECK_SECONDS", "1")
        tally = course.grade()
        shutil.rmtree(course.folder / "submitted" / "gone")
        rows = {row[0]: row for row in table_rows(course.plan, tally)}
        yield course, tally, rows


def test_the_table_says_what_happened(course):
    _, _, rows = course
    unsafe = "graded without a sandbox"
    assert rows["as-it-should-be"][-1] == unsafe
    assert rows["download"][2:] == (
        "3 of 3",
        rows["download"][3],
        f"{unsafe}; there was no toy.ipynb; 'toy (1).ipynb' was taken",
    )
    assert "cell 'test_double', which is not the student's, had been changed" in rows["edited"][-1]
    assert rows["hanging"][1] == rows["slow"][1] == "timeout"
    assert "took too long" in rows["hanging"][-1]
    assert "the cell number" in rows["hanging"][-1]
    assert "the property 'a large number' of 'test_double' took too long" in rows["slow"][-1]


def test_of_many_notes_the_table_has_the_first_and_the_feedback_all(course):
    folder, _, rows = course[0].folder, *course[1:]
    mended = [f"cell '{name}' had lost its mark; found by its" for name in ("given", "double", "test_double")]
    assert mended[0] in rows["bare"][-1]
    assert "(and 2 more notes, in the feedback)" in rows["bare"][-1]
    assert not any(note in rows["bare"][-1] for note in mended[1:])
    page = (folder / "feedback" / "bare" / "toy" / "toy.html").read_text(encoding="utf-8")
    assert all(note.replace("'", "&#x27;") in page for note in mended)


def test_the_feedback_says_what_was_stopped(course):
    page = (course[0].folder / "feedback" / "slow" / "toy" / "toy.html").read_text(encoding="utf-8")
    assert "timeout: the property" in page


def grade(course, *options):
    return CliRunner().invoke(app, ["grade", "toy", "--course", str(course.folder), "--unsandboxed", *options])


def test_the_command_leaves_out_what_is_gone_and_names_what_lies_elsewhere(course):
    result = grade(course[0])
    table, said = result.stdout.split("left out, as the submission is no longer there: ")
    assert "as-it-should-be" in table
    assert "gone " not in table
    assert said.startswith("gone (1 in all)")
    assert "0 graded, 7 unchanged, 1 failed" in said
    assert "not graded: lost: submitted/lost/toy.ipynb is not in a folder submitted/<student>/toy/" in result.stderr
    assert "'[/b]'" in table  # no markup of rich's
    assert result.exit_code == 1


def test_a_lab_that_is_not_there_is_said_first(course):
    result = CliRunner().invoke(app, ["grade", "nolab", "--course", str(course[0].folder), "--unsandboxed"])
    assert result.exit_code == 2
    assert "nolab" in result.stderr
    assert "nothing to grade" not in result.stderr


@pytest.mark.parametrize("files", [None, [], ["toy.ipynb"]], ids=["no folder", "empty", "misplaced"])
def test_a_class_without_a_submission_is_an_error_that_says_where_it_was_looked_for(
    course, monkeypatch, tmp_path, files
):
    for name in ("nbgrader_config.py", "build"):
        (tmp_path / name).symlink_to(course[0].folder / name)
    if files is not None:
        (tmp_path / "submitted").mkdir()
        lay_out(tmp_path / "submitted", *files)
    monkeypatch.setenv("LLMLAB_COURSE_ROOT", str(tmp_path))
    result = CliRunner().invoke(app, ["grade", "toy", "--course", str(tmp_path), "--unsandboxed"])
    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1
    assert f"looked for {tmp_path}/submitted/<student>/toy/toy.ipynb" in result.stderr
    there = {None: "does not exist", 0: "is empty", 1: "toy.ipynb: it is not in a folder"}
    assert there[None if files is None else len(files)] in result.stderr


def test_no_jobs_at_all_is_an_error_of_one_line(course):
    result = grade(course[0], "--jobs", "0")
    assert (result.exit_code, result.stderr) == (2, "llmlab: jobs: expected a whole number of at least 1, got 0\n")


def test_the_help_lists_the_exit_codes():
    said = CliRunner().invoke(app, ["grade", "--help"]).stdout
    assert all(f" {code}  " in said for code in range(5))
