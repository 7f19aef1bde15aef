"""Every lab's grader is proved, and the example class earns what it must through plain nbgrader commands."""

import csv
import importlib
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import nbformat
import pytest
from lab_runs import LABS, cells_of, graded_in_worker

from llmlab.authoring.answers import read_answers
from llmlab.authoring.example_class import example_class, write_class
from llmlab.authoring.lab import HIDDEN
from llmlab.authoring.proof import SAMPLE, SAMPLE_SEED, full_proof, prove
from llmlab.authoring.run import run_exercise
from llmlab.grading.withhold import Withheld, names_withheld_by


@pytest.mark.parametrize("lab", LABS.values(), ids=lambda lab: lab.name)
def test_the_grader_grades(lab, request):
    proof = full_proof(lab) if request.config.getoption("--all-mutants") else prove(lab, SAMPLE, SAMPLE_SEED)
    assert proof.problems == []


@pytest.mark.parametrize("lab", LABS.values(), ids=lambda lab: lab.name)
def test_a_lab_has_three_to_six_exercises_and_a_prediction(lab):
    assert 3 <= len(lab.exercises) <= 6
    assert any(e.name.startswith("predicted") for e in lab.exercises)


@pytest.mark.parametrize("lab", LABS.values(), ids=lambda lab: lab.name)
def test_the_first_cell_says_device_time_and_difficulty(lab):
    first = lab.cells[0]
    assert first.cell_type == "markdown"
    for word in ("**Device**", "**Time**", "**Difficulty**"):
        assert word in first.source


EACH_CLASS = [
    pytest.param(lab, id=lab.name, marks=pytest.mark.xdist_group(f"class of {lab.name}")) for lab in LABS.values()
]


@pytest.fixture(scope="module", params=EACH_CLASS)
def graded(request, tmp_path_factory):
    """A lab's class, graded in a course of its own: the lab, its folder, submissions, export, scores worked out by hand.

    The lab on memory has the whole class, through plain nbgrader, and an endless loop in it ends soon; the others have
    those students who show something of the lab itself, graded together.
    """
    lab, root = request.param, request.config.rootpath
    by_hand = importlib.import_module(f"test_lab_{lab.name}").SCORES
    course = tmp_path_factory.mktemp("course")
    whole = lab.name == "memory"
    limits = {"LLMLAB_CHECK_SECONDS": "2", "LLMLAB_CELL_SECONDS": "20"} if whole else {}
    environment = {**os.environ, "LLMLAB_COURSE_ROOT": str(course), **limits}

    def run(*command):
        result = subprocess.run(
            command, cwd=root / "labs", env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]

    lab.build(course / "build" / "source")
    run("nbgrader", "generate_assignment", lab.name, "--create")
    released = nbformat.read(course / "build" / "release" / lab.name / f"{lab.name}.ipynb", as_version=4)
    submissions = example_class(lab, released, whole)
    write_class(submissions, lab, course)
    if whole:
        run("nbgrader", "autograde", lab.name)
        run("nbgrader", "generate_feedback", lab.name)
    else:
        run("llmlab", "grade", lab.name, "--course", ".")
    run("nbgrader", "export", f"--to={course / 'grades.csv'}")
    with (course / "grades.csv").open(encoding="utf-8") as file:
        return lab, course, submissions, list(csv.DictReader(file)), by_hand


def test_the_class_earns_what_it_must(graded):
    lab, _, submissions, rows, _ = graded
    earned = {r["student_id"]: (r["assignment"], r["status"], float(r["score"])) for r in rows}
    assert earned == {s.student: (lab.name, s.status, s.score) for s in submissions}


def test_the_scores_are_those_worked_out_by_hand(graded):
    *_, rows, by_hand = graded
    assert {r["student_id"]: float(r["score"]) for r in rows} == by_hand


def test_the_feedback_shows_outcomes_and_no_hidden_test(graded):
    lab, course, submissions, *_ = graded
    pages = {
        s.student: (course / "feedback" / s.student / lab.name / f"{lab.name}.html").read_text("utf-8")
        for s in submissions
    }
    for hidden in ("HIDDEN TESTS", "check.hidden", "submission_rng", "randrange(10**6"):
        assert [student for student, page in pages.items() if hidden in page] == [], hidden
    assert "✗" in pages["student-02"]


def test_the_measurement_is_recorded_beside_the_prediction(graded):
    lab, course, *_ = graded
    notebook = nbformat.read(course / "autograded" / "student-01" / lab.name / f"{lab.name}.ipynb", as_version=4)
    (recorded,) = notebook.metadata["llmlab"]["measurements"]
    if lab.name == "memory":  # what this one measures is counted, not timed
        assert recorded["measured"] == pytest.approx(recorded["predicted"], rel=0.001)
    assert recorded["measured"] > 0


LIFTED = [lab for lab in LABS.values() if any(exercise.lifted_from for exercise in lab.exercises)]


@pytest.mark.sandbox
@pytest.mark.parametrize("lab", LIFTED, ids=lambda lab: lab.name)
@pytest.mark.parametrize(
    "how",
    ["{name} = first[{name!r}]", "from {module} import {name}", "__name__ = {module!r}\nfrom {module} import {name}"],
)
def test_the_packages_own_function_earns_nothing_as_an_answer(lab, how):
    """Imported as it is, before the cell that withholds it, or under the name of a module that may call it."""
    dotted = {e.name: e.lifted_from for e in lab.exercises if e.lifted_from}
    answers, imports = {}, []
    for name, where in dotted.items():
        module, _, function = where.rpartition(".")
        answers[name] = how.format(module=module, name=function) + (
            "" if function == name else f"\n{name} = {function}"
        )
        imports.append(f"from {module} import {function}")
    cells = cells_of(graded_in_worker(lab, answers, "\n".join([*imports, "first = dict(globals())"])))
    for name in dotted:
        outcomes = cells[f"test_{name}"]["outcomes"]
        assert [o["property"] for o in outcomes if o["passed"] and o["points"]] == [], name
        assert any("answers this exercise" in o["message"] for o in outcomes), name


# The lab on memory, the first, leaves to its hidden tests whether an answer holds for other shapes and widths.
SHOWN = [(lab, exercise) for lab in LABS.values() if lab.name != "memory" for exercise in lab.exercises[:-1]]


@pytest.mark.parametrize(("lab", "exercise"), SHOWN, ids=[f"{lab.name}-{e.name}" for lab, e in SHOWN])
def test_a_student_sees_each_named_wrong_answer_fail(lab, exercise):
    visible = replace(exercise, tests=HIDDEN.sub("", exercise.tests))
    for answer in read_answers(lab).wrong(exercise.name):
        outcomes = run_exercise(lab, visible, answer.source, "student-01").outcomes
        assert any(o.points and not o.passed and o.message for o in outcomes), answer.name


def withheld_by(lab):
    """What a lab withholds, by its dotted name."""
    given = [c.source for c in lab.notebook().cells if c.metadata.get("nbgrader", {}).get("grade_id") == "given"]
    names = [name for source in given for name in names_withheld_by(source)]
    return {n: getattr(importlib.import_module(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names}


@pytest.mark.parametrize("lab", LABS.values(), ids=lambda lab: lab.name)
def test_what_a_lab_withholds_is_there(lab):
    found = withheld_by(lab)
    assert len(found) > 5
    assert all(map(callable, found.values()))
    assert {e.lifted_from for e in lab.exercises} - {None} <= found.keys()


@pytest.mark.parametrize("lab", LABS.values(), ids=lambda lab: lab.name)
def test_to_try_a_grader_in_this_process_withholds_nothing_from_it(lab):
    """Behind the run: what other tests of the process unpickle or call must still be there. In the run it is withheld."""
    before, during = withheld_by(lab), {}
    modules = package_names()
    exercise = lab.exercises[0]
    record = run_exercise(
        lab, exercise, exercise.answer, "student-01", lambda namespace: during.update(withheld_by(lab))
    )
    assert record.score == exercise.points
    assert [name for name in before if during[name] is before[name]] == []
    for name, guard in during.items():
        with pytest.raises(Withheld, match=f"{re.escape(name)} answers this exercise"):
            guard()
    assert withheld_by(lab) == before
    assert {place: value for place, value in package_names().items() if place in modules} == modules


def package_names():
    """What stands under every name of every module of the package that is imported."""
    modules = [(name, module) for name, module in sys.modules.items() if name.partition(".")[0] == "llmlab"]
    return {(name, alias): id(value) for name, module in modules for alias, value in list(vars(module).items())}


@pytest.mark.parametrize("lab", LABS.values(), ids=lambda lab: lab.name)
def test_a_whole_lab_runs_in_time_without_a_network(lab, tmp_path):
    """The reference notebook from top to bottom, as the autograder runs it: under 60 s."""
    notebook = lab.build(tmp_path)
    notebook.write_text(
        notebook.read_text(encoding="utf-8").replace('\\"student-00\\"  #', '\\"student-01\\"  #'), encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        "--output",
        "done",
        str(notebook),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LLMLAB_STUDENT": "student-01"}
    start = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert time.monotonic() - start < 60
