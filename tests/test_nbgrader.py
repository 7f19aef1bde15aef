"""nbgrader's traps, each in both directions: plain nbgrader falls into it, this course's configuration does not."""

import csv
import fcntl
import os
import shutil
import time

import nbformat
import pytest
from forked import Forked, run
from nbformat.v4 import new_code_cell, new_notebook
from nbgrader.api import Gradebook
from toy_lab import doubling, toy_lab

from llmlab.authoring.lab import Lab

LAB = toy_lab(doubling("a secret property", "secret_input = 21", "equal(double(secret_input), 42)"))
# The same exercise as plain nbgrader has it: an assertion a test cell.
PLAIN_TEST = "assert double(1) == 2\n### BEGIN HIDDEN TESTS\nsecret_input = 21\nassert double(secret_input) == 42\n### END HIDDEN TESTS"
GOOD = "def double(n):\n    return n * 2"


def plain_metadata(grade_id, grade):
    return {"nbgrader": {"grade": grade, "grade_id": grade_id, "locked": grade, "schema_version": 3, "solution": not grade,
                         "task": False, **({"points": 3} if grade else {})}}  # fmt: skip


class Course:
    """A course of one toy lab in a folder: ours, or plain nbgrader's with its defaults."""

    def __init__(self, folder, root, plain):
        self.folder, self.root, self.plain = folder, root, plain

    def build(self):
        """Make the lab and release it; a copy of the folder is as good."""
        source = self.folder / ("source" if self.plain else "build/source")
        (self.folder / "labs").mkdir(parents=True)
        if self.plain:
            cells = [new_code_cell("### BEGIN SOLUTION\n" + GOOD + "\n### END SOLUTION", metadata=plain_metadata("double", False)),
                     new_code_cell(PLAIN_TEST, metadata=plain_metadata("test_double", True))]  # fmt: skip
            kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
            (source / "toy").mkdir(parents=True)
            nbformat.write(new_notebook(cells=cells, metadata=kernel), source / "toy" / "toy.ipynb")
            config = "c = get_config()\nc.CourseDirectory.course_id = 'plain'\n"
            (self.folder / "nbgrader_config.py").write_text(config)
        else:
            (self.folder / "toy.py").write_text(LAB, encoding="utf-8")
            Lab(self.folder / "toy.py").build(source)
        self.nbgrader("generate_assignment", "toy", "--create")

    @property
    def released(self):
        release = self.folder / ("release" if self.plain else "build/release")
        return nbformat.read(release / "toy" / "toy.ipynb", as_version=4)

    @property
    def where(self):
        environment = {**os.environ, "LLMLAB_CHECK_SECONDS": "2"}
        if not self.plain:
            environment["LLMLAB_COURSE_ROOT"] = str(self.folder)
        return {"cwd": self.folder if self.plain else self.root / "labs", "env": environment}

    def nbgrader(self, *arguments, check=True):
        result = run("nbgrader", *arguments, **self.where)
        assert not check or result.returncode == 0, result.stderr[-3000:]
        return result

    def submit(self, student, answer, edit=lambda notebook: None):
        notebook = nbformat.from_dict(self.released)
        for cell in notebook.cells:
            if cell.metadata.get("nbgrader", {}).get("grade_id") == "double":
                cell.source = answer
        edit(notebook)
        folder = self.folder / "submitted" / student / "toy"
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, folder / "toy.ipynb")

    def grade(self, check=True):
        result = self.nbgrader("autograde", "toy", check=check)
        return result, self.export()

    def export(self):
        self.nbgrader("export", f"--to={self.folder / 'grades.csv'}")
        with (self.folder / "grades.csv").open() as file:
            return {row["student_id"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def built(tmp_path_factory, pytestconfig):
    """A course of each kind; tests get copies."""
    made = {}
    for plain in (True, False):
        made[plain] = Course(tmp_path_factory.mktemp("built") / "course", pytestconfig.rootpath, plain)
        made[plain].build()
    return made


@pytest.fixture
def course_in(built):
    """A course in a folder."""

    def make(folder, plain=False):
        shutil.copytree(built[plain].folder, folder)
        return Course(folder, built[plain].root, plain)

    return make


@pytest.fixture
def courses(tmp_path, course_in):
    return course_in(tmp_path / "plain", plain=True), course_in(tmp_path / "ours")


def score(rows, student):
    return float(rows[student]["score"])


def test_a_warning_does_not_cost_the_points(courses):
    plain, ours = courses
    noisy = "import sys\ndef double(n):\n    print('noise', file=sys.stderr)\n    return n * 2"
    for course in courses:
        course.submit("student-01", noisy)
    assert score(plain.grade()[1], "student-01") == 0
    assert score(ours.grade()[1], "student-01") == 3


def test_a_skipped_test_does_not_earn_the_points(courses):
    """The wrong answer empties each test cell before it has checked anything, and without an error."""
    plain, ours = courses
    skipping = "class Skip(Exception):\n    def _render_traceback_(self): return []\n" + (
        "def double(n):\n    from IPython import get_ipython\n    get_ipython().ast_transformers.clear()\n    return 7\n"
        "from IPython import get_ipython\nget_ipython().input_transformers_cleanup.append(lambda lines: [] if any('assert' in l or 'check' in l for l in lines) else lines)"
    )
    for course in courses:
        course.submit("student-01", skipping)
    assert score(plain.grade()[1], "student-01") == 3
    assert score(ours.grade()[1], "student-01") == 0


def test_a_copied_cell_does_not_end_the_class(courses):
    plain, ours = courses

    def copy(notebook):
        position = next(
            i for i, c in enumerate(notebook.cells) if c.metadata.get("nbgrader", {}).get("grade_id") == "double"
        )
        notebook.cells.insert(
            position, nbformat.from_dict({**notebook.cells[position], "id": "copied", "source": "first = 'try'"})
        )

    for course in courses:
        course.submit("student-01", GOOD, copy)
        course.submit("student-02", GOOD)
    result, _ = plain.grade(check=False)
    assert result.returncode != 0
    assert "nbgrader update ." in result.stderr  # what it says on its SchemaTooOldError
    rows = ours.grade()[1]
    assert (score(rows, "student-01"), score(rows, "student-02")) == (3, 3)


def without(*names):
    def delete(notebook):
        notebook.cells = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") not in names]

    return delete


@pytest.mark.parametrize("missing", [["test_double"], ["given"], ["given", "test_double"], ["double"]])
def test_deleted_cells_come_back(tmp_path, course_in, missing):
    ours = course_in(tmp_path / "ours")
    ours.submit("student-01", GOOD, without(*missing))
    row = ours.grade()[1]["student-01"]
    assert (row["status"], float(row["score"])) == ("ok", 0 if "double" in missing else 3)


def misname(ours, student):
    home = ours.folder / "submitted" / student / "toy"
    (home / "toy.ipynb").rename(home / "toy (1).ipynb")


def stamp(ours, student, text):
    (ours.folder / "submitted" / student / "toy" / "timestamp.txt").write_text(text)


def set_due(course):
    course.nbgrader("db", "assignment", "add", "toy", "--duedate=2026-01-15 12:00:00 UTC")


def test_every_submission_ends_in_a_status_with_a_name(courses, tmp_path):
    """What nbgrader fails on, takes for missing or follows links in. Plain nbgrader gives two of them a 0 that nobody earned,
    and of the third it takes another's file for the answer."""
    plain, ours = courses
    for course in courses:
        for student in ("download", "foreign", "linked", "outside", "right", "torn"):
            course.submit(student, GOOD)
        misname(course, "download")
        course.submit("foreign", GOOD, without("given", "double", "test_double"))
        home = course.folder / "submitted"
        (home / "torn" / "toy" / "toy.ipynb").write_text('{"cells": [')
        (home / "linked" / "toy" / "toy.ipynb").unlink()
        (home / "linked" / "toy" / "toy.ipynb").symlink_to(home / "right" / "toy" / "toy.ipynb")
        (home / "empty" / "toy").mkdir(parents=True)
        (home / "outside").rename(course.folder / "elsewhere")
        (home / "outside").symlink_to(course.folder / "elsewhere")
    result, rows = plain.grade(check=False)
    assert result.returncode == 1
    assert {s: rows[s]["score"] for s in ("download", "torn", "linked")} == {
        "download": "0.0",
        "torn": "0.0",
        "linked": "3.0",
    }
    result, rows = ours.grade()
    expected = {
        "download": ("ok", "3.0"), "empty": ("missing", ""), "foreign": ("wrong structure", ""),
        "linked": ("missing", ""), "right": ("ok", "3.0"), "torn": ("unreadable", ""),
    }  # fmt: skip
    assert {student: (row["status"], row["score"]) for student, row in rows.items()} == expected
    for said in (
        "'toy (1).ipynb' was taken",
        "torn: unreadable; not a notebook",
        "foreign: wrong structure",
        "outside is not graded",
    ):
        assert said in result.stderr
    with Gradebook(f"sqlite:///{ours.folder}/gradebook.db") as gradebook:
        grades = [g for s in gradebook.assignment_submissions("toy") for n in s.notebooks for g in n.grades]
        assert len(grades) == len(expected)
        assert [g for g in grades if g.auto_score is None and not g.needs_manual_grade] == []
    ours.nbgrader("generate_feedback", "toy", "--force")
    page = (ours.folder / "feedback" / "foreign" / "toy" / "toy.html").read_text(encoding="utf-8")
    assert "Not graded: wrong structure" in page
    assert ours.grade()[1] == rows  # what stands is not taken apart by the next run


def test_a_time_that_is_none_is_said_and_the_grade_before_stays(courses):
    """Plain nbgrader removes what it had graded."""
    plain, ours = courses
    for course in courses:
        course.submit("student-01", GOOD)
        course.grade()
        stamp(course, "student-01", "yesterday, I think")
    assert plain.nbgrader("autograde", "toy", "--force", check=False).returncode == 1
    assert not list(plain.folder.glob("autograded/*/*/*.ipynb"))
    result, rows = ours.grade()
    assert (
        "student-01: ok; timestamp.txt holds no time: 'yesterday, I think'; no late penalty was applied"
        in result.stderr
    )
    assert (rows["student-01"]["status"], rows["student-01"]["score"]) == ("ok", "3.0")
    assert (ours.folder / "autograded" / "student-01" / "toy" / "toy.ipynb").exists()
    assert ours.nbgrader("autograde", "toy", "--force").returncode == 0


@pytest.mark.parametrize("forced", [False, True])
def test_a_time_that_was_taken_away_costs_nothing_any_more(tmp_path, course_in, forced):
    """Plain nbgrader keeps the time, and with it the penalty."""
    late = "--PerDay.percent_per_day=10"
    ours = course_in(tmp_path / "ours")
    set_due(ours)
    ours.submit("student-01", GOOD)
    stamp(ours, "student-01", "2026-01-16 12:00:00 UTC")
    ours.nbgrader("autograde", "toy", late)
    assert float(ours.export()["student-01"]["late_penalty"]) == pytest.approx(0.3)
    (ours.folder / "submitted" / "student-01" / "toy" / "timestamp.txt").unlink()
    ours.nbgrader("autograde", "toy", late, *(["--force"] if forced else []))
    row = ours.export()["student-01"]
    assert (row["status"], row["score"], row["late_penalty"], row["timestamp"]) == ("ok", "3.0", "0.0", "")


def test_plain_nbgrader_does_not_grade_a_deleted_test(tmp_path, course_in):
    plain = course_in(tmp_path / "plain", plain=True)
    plain.submit("student-01", GOOD, without("test_double"))
    assert score(plain.grade()[1], "student-01") == 0


def test_a_slow_answer_has_its_time_and_an_endless_one_ends(tmp_path, course_in):
    """Plain nbgrader gives every cell 30 s: it fails a right answer that takes 32, and an endless one costs the whole cell."""
    slow = "import time\ntime.sleep(32)\n" + GOOD
    endless = "def double(n):\n    while n > 1:\n        pass\n    return 2"
    runs = {}
    for name, answer in (("slow", slow), ("endless", endless)):
        for plain in (True, False):
            course = course_in(tmp_path / f"{name}-{plain}", plain)
            course.submit("student-01", answer)
            runs[name, plain] = course, time.monotonic(), Forked("nbgrader", "autograde", "toy", **course.where)
    earned, seconds = {}, {}
    for key in (("endless", False), ("endless", True), ("slow", True), ("slow", False)):
        course, start, process = runs[key]
        assert process.result(timeout=120).returncode == 0
        seconds[key] = time.monotonic() - start
        earned[key] = score(course.export(), "student-01")
    assert earned == {("slow", True): 0, ("slow", False): 3, ("endless", True): 0, ("endless", False): 1}
    assert seconds["endless", False] < 30 < seconds["endless", True]


def test_hidden_tests_are_not_in_the_feedback(courses):
    _plain, _ours = courses
    pages = {}
    for course in courses:
        course.submit("student-01", "def double(n):\n    return 2")
        course.grade()
        course.nbgrader("generate_feedback", "toy")
        pages[course.plain] = (course.folder / "feedback" / "student-01" / "toy" / "toy.html").read_text(
            encoding="utf-8"
        )
    assert "secret_input" in pages[True]
    assert "secret_input" not in pages[False]
    assert "a secret property" in pages[False]
    assert "42" not in pages[False].partition("<body")[2].replace("#42", "")


def kill_in_mid_run(course, *options):
    """Start autograde on an answer that sleeps, and kill it with its kernel once the notebook runs."""
    process = Forked("nbgrader", "autograde", "toy", *options, **course.where)
    waiting = course.folder / "autograded" / "student-01" / "toy" / "toy.ipynb"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if waiting.exists() and (course.plain or '"running"' in waiting.read_text()):
            break
        time.sleep(0.05)
    time.sleep(1)
    process.kill()


def test_a_killed_run_is_not_a_zero(courses):
    plain, ours = courses
    slow = "import time\ntime.sleep(4)\n" + GOOD
    for course in courses:
        course.submit("student-01", slow)
        kill_in_mid_run(course)
    assert float(plain.export()["student-01"]["score"]) == 0.0
    assert (ours.export()["student-01"]["status"], ours.export()["student-01"]["score"]) == ("not graded", "")
    assert float(plain.grade()[1]["student-01"]["score"]) == 0.0  # plain nbgrader takes the folder for a finished one
    assert score(ours.grade()[1], "student-01") == 3


def test_a_killed_regrade_does_not_pass_for_the_grade_before(tmp_path, course_in):
    ours = course_in(tmp_path / "ours")
    ours.submit("student-01", GOOD)
    assert score(ours.grade()[1], "student-01") == 3
    ours.submit("student-01", "import time\ntime.sleep(4)\ndef double(n):\n    return n")
    kill_in_mid_run(ours, "--force")
    assert (ours.export()["student-01"]["status"], ours.export()["student-01"]["score"]) == ("not graded", "")
    assert score(ours.grade()[1], "student-01") == 0


def test_a_dead_kernel_costs_what_it_did_not_reach(courses):
    """The class-mate after it is graded, and the run ends well. Plain nbgrader fails, and exports a zero that nobody gave."""
    plain, ours = courses
    for course in courses:
        course.submit("student-01", "import os\nos._exit(1)")
        course.submit("student-02", GOOD)
    result, rows = plain.grade(check=False)
    assert (result.returncode, rows["student-01"]["score"]) == (1, "0.0")
    rows = ours.grade()[1]
    assert [(rows[s]["status"], float(rows[s]["score"])) for s in ("student-01", "student-02")] == [
        ("crashed", 0.0),
        ("ok", 3.0),
    ]


def test_only_autograde_forgets_what_is_unfinished_and_not_while_another_run_is_at_work(tmp_path, course_in):
    ours = course_in(tmp_path / "ours")
    ours.submit("student-01", "import time\ntime.sleep(4)\n" + GOOD)
    kill_in_mid_run(ours)
    begun = ours.folder / "autograded" / "student-01" / "toy"
    ours.export()
    assert begun.exists()
    with (ours.folder / ".autograde-toy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Another run is grading 'toy'" in ours.grade()[0].stderr
        assert begun.exists()
    assert "begun by a run that was killed" in ours.grade()[0].stderr
    assert score(ours.export(), "student-01") == 3


def test_the_export_quotes_what_a_spreadsheet_would_run(tmp_path, course_in):
    ours = course_in(tmp_path / "ours")
    ours.submit("=1+1", GOOD)
    assert "SAWarning" not in ours.grade()[0].stderr
    assert "\n" + "toy,'=1+1,ok,3.0" in (ours.folder / "grades.csv").read_text()


def test_validate_judges_as_the_autograder_does(tmp_path, course_in):
    """The button's command: a right answer that warns passes, a wrong one fails and says which property."""
    ours = course_in(tmp_path / "ours")
    noisy = "import sys\ndef double(n):\n    print('noise', file=sys.stderr)\n    return n * 2"
    for student, answer, passes in (("right", noisy, True), ("wrong", "def double(n):\n    return n", False)):
        ours.submit(student, answer)
        said = ours.nbgrader("validate", str(ours.folder / "submitted" / student / "toy" / "toy.ipynb")).stdout
        assert ("Success! Your notebook passes all the tests." in said) == passes, said
        assert ("two" in said) != passes
