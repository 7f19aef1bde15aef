"""Exports: the columns that the other system reads, blanks for what was not graded, and nothing that a sheet would run."""

import csv
import io
import json
import os
import stat
from datetime import timedelta

import forked
import pytest
from toy_course import DUE, GOOD, HALF, SECRET_INPUT, ToyCourse, nothing
from typer.testing import CliRunner

from llmlab.cli import app
from llmlab.grading.formats import UNSAFE, canvas_csv, gradescope_results, lab_grades, moodle_csv, plain_csv
from llmlab.grading.results import ResultLog, read_results


@pytest.fixture(scope="module")
def course(tmp_path_factory, pytestconfig):
    """A class with every kind of outcome; one scored by hand, one late, one whose id and name a sheet would run."""
    course = ToyCourse(tmp_path_factory.mktemp("course"), pytestconfig.rootpath, "c.PerDay.percent_per_day = 10")
    with course.gradebook() as gradebook:
        gradebook.update_or_create_assignment("toy", duedate=DUE)
        gradebook.update_or_create_student(
            "ada", first_name="Ada", last_name="Lovelace", email="ada@example.org", lms_user_id="4711"
        )
        gradebook.update_or_create_student("=cmd", last_name="@SUM(1)", first_name="A", email="\t=1")
        gradebook.update_or_create_student("never", last_name="Never", first_name="Handed")
    for student, text in {
        "ada": course.notebook(GOOD),
        "=cmd": course.notebook(GOOD),
        "half": course.notebook(HALF),
        "by-hand": course.notebook(HALF),
        "zero": course.notebook("def double(n):\n    return 0"),
        "broken": "no notebook",
        "other": nothing(),
        "missing": None,
    }.items():
        course.submit(student, text)
    course.submit("late", course.notebook(GOOD), timedelta(hours=1))
    assert course.grade().failures == []
    with course.gradebook() as gradebook:
        grade = gradebook.find_grade("test_double", "toy", "toy", "by-hand")
        grade.manual_score, grade.needs_manual_grade = 2.5, False
        gradebook.db.commit()
    with ResultLog(course.plan.log_file) as log:  # a run that was killed before it came to the gradebook
        log.append({**next(read_results(course.plan.log_file)), "student": "killed"})
    course.submit("waiting", course.notebook(GOOD))
    return course


@pytest.fixture
def grades(course):
    return lab_grades(course.plan.course, "toy")


pytestmark = pytest.mark.xdist_group("formats")  # one class for all of them
SCORES = {
    "=cmd": "3", "ada": "3", "half": "1", "by-hand": "2.5", "zero": "0", "late": "2.7", "broken": "", "other": "",
    "missing": "", "never": "", "killed": "", "waiting": "",
}  # fmt: skip


def read(text):
    return list(csv.reader(io.StringIO(text, newline="")))


def test_scores_count_hand_and_lateness_and_are_blank_where_nothing_was_graded(grades):
    assert {grade.student: grade.score for grade in grades} == SCORES


def test_canvas(grades):
    head, possible, *rows = read(canvas_csv(grades, "toy", 99))
    assert head == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "toy (99)"]
    assert possible == ["    Points Possible", "", "", "", "", "3"]
    by_login = {row[3].lstrip("'"): row for row in rows}
    assert by_login["ada"] == ["Lovelace, Ada", "4711", "", "ada", "", "3"]
    assert {login: row[5] for login, row in by_login.items()} == SCORES
    assert read(canvas_csv(grades, "toy"))[0][5] == "toy"


def test_canvas_has_no_place_for_it_so_the_command_says_who_was_graded_without_a_sandbox(course, grades, tmp_path):
    unsafe = [grade.student for grade in grades if grade.is_unsafe]
    assert "ada" in unsafe
    assert "missing" not in unsafe
    arguments = [
        "export",
        "toy",
        "--format",
        "canvas",
        "--to",
        str(tmp_path / "it.csv"),
        "--course",
        str(course.folder),
    ]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0
    assert f"{len(unsafe)} of them were graded without a sandbox" in said.stderr


def test_the_graded_notebook_says_that_there_was_no_sandbox(course):
    """From it nbgrader makes the page of its own feedback."""
    notebook = json.loads((course.folder / "autograded" / "ada" / "toy" / "toy.ipynb").read_text(encoding="utf-8"))
    assert "".join(notebook["cells"][0]["source"]) == f"**{UNSAFE}**"


def test_moodle(grades):
    head, *rows = read(moodle_csv(grades, "toy"))
    assert head == ["Username", "Email address", "ID number", "Grade", "Feedback comments"]
    by_name = {row[0].lstrip("'"): row for row in rows}
    assert by_name["ada"][:4] == ["ada", "ada@example.org", "4711", "3"]
    assert by_name["ada"][4] == f"double: 3 of 3. {UNSAFE}"
    assert by_name["late"][4].startswith("double: 3 of 3; late: 0.3 points less.")
    assert by_name["by-hand"][4].startswith("double: 2.5 of 3")
    assert by_name["broken"][4].startswith("Not graded: unreadable (")
    assert {name: row[3] for name, row in by_name.items()} == SCORES


def test_plain_is_what_nbgrader_export_writes(grades, course):
    rows = {row["student_id"].lstrip("'"): row for row in csv.DictReader(io.StringIO(plain_csv(grades, "toy")))}
    assert {s: float(r["score"]) if r["score"] else "" for s, r in rows.items()} == {
        s: float(v) if v else "" for s, v in SCORES.items()
    }
    status = {s: r["status"] for s, r in rows.items() if not r["score"]}
    assert status == {"broken": "unreadable", "other": "wrong structure", "missing": "missing", "never": "missing", "killed": "not graded", "waiting": "not graded"}  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "LLMLAB_COURSE_ROOT"}
    done = forked.run("nbgrader", "export", "--to=nbgrader.csv", cwd=course.folder, env=environment)
    assert done.returncode == 0, done.stderr
    written = (course.folder / "nbgrader.csv").read_text(encoding="utf-8")
    assert sorted(written.splitlines()) == sorted(plain_csv(grades, "toy").splitlines())


@pytest.mark.parametrize("write", [plain_csv, canvas_csv, moodle_csv])
def test_no_cell_is_a_formula(grades, write):
    cells = [cell for row in read(write(grades, "toy")) for cell in row]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r")]
    assert "'=cmd" in cells


def test_gradescope_names_hidden_properties_and_nothing_of_their_inputs(course):
    results = {r["student"]: r for r in read_results(course.plan.log_file)}
    told = gradescope_results(results["half"])
    assert told["score"] == 1
    assert [(t["name"], t["score"], t["max_score"], t["status"], t["visibility"]) for t in told["tests"]] == [
        ("double: two", 1, 1, "passed", "visible"),
        ("double: a large number", 0, 2, "failed", "visible"),
    ]
    assert str(SECRET_INPUT) not in str(told)
    assert UNSAFE in told["output"]


@pytest.mark.parametrize("student", ["broken", "other", "missing"])
def test_gradescope_has_no_score_for_what_was_not_graded(course, student):
    told = gradescope_results({r["student"]: r for r in read_results(course.plan.log_file)}[student])
    assert "score" not in told
    assert not [test for test in told["tests"] if "score" in test]
    assert told["output"].startswith("Not graded: ")


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize("form", ["csv", "canvas", "moodle"])
def test_the_command(course, tmp_path, form):
    file = tmp_path / "grades.csv"
    result = run("export", "toy", "--format", form, "--to", file, "--course", course.folder)
    assert result.exit_code == 0, result.output
    assert "12 students, 6 of them without a grade" in result.stdout
    assert "ada" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "arguments", [["toy", "--format", "excel"], ["tyo"], ["toy", "--canvas-id", "1"]], ids=["format", "lab", "id"]
)
def test_the_command_says_what_is_wrong(course, tmp_path, arguments):
    result = run("export", *arguments, "--to", tmp_path / "grades.csv", "--course", course.folder)
    assert result.exit_code == 2
    assert result.stderr.startswith("llmlab: ")
    assert not (tmp_path / "grades.csv").exists()
