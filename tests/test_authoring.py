"""Building labs: lifted answers, metadata, points, released notebooks, mutants."""

import ast
import hashlib
import json
import subprocess
import textwrap

import nbformat
import pytest

from llmlab.authoring.answers import AnswerError, read_answers
from llmlab.authoring.lab import Lab, LabError, find_labs, release_source, visible_tests
from llmlab.authoring.lift import LiftError, free_names, lift_body
from llmlab.authoring.mutants import mutants
from llmlab.authoring.proof import ExerciseProof, Proof, extent, prove

GIVEN = (
    "# %% nbgrader={'grade_id': 'given', 'locked': true}\nfrom llmlab.grading.checks import Checks, equal\n\n".replace(
        "'", '"'
    )
)
TESTS = """# %% nbgrader={"grade_id": "test_double", "grade": true}
check = Checks("double")


@check("two", points=1)
def _(rng):
    equal(double(1), 2)


### BEGIN HIDDEN TESTS
@check.hidden("any", points=2)
def _(rng):
    n = rng.randrange(10, 99)
    equal(double(n), n + n)


### END HIDDEN TESTS
check.report()
"""
ANSWER = """# %% nbgrader={"grade_id": "double", "solution": true}
def double(n):
    ### BEGIN SOLUTION
    return n * 2
    ### END SOLUTION


"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="toy", answers=""):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        (tmp_path / "answers").mkdir(exist_ok=True)
        (tmp_path / "answers" / f"{name}.py").write_text(answers, encoding="utf-8")
        return Lab(tmp_path / f"{name}.py")

    return write


def test_the_same_source_gives_the_same_bytes(root, tmp_path):
    for lab in find_labs(root / "labs"):
        first = lab.build(tmp_path / "a").read_bytes()
        assert Lab(lab.path).build(tmp_path / "b").read_bytes() == first


def test_an_unchanged_notebook_is_left_alone(write, tmp_path):
    lab = write(GIVEN + ANSWER + TESTS)
    file = lab.build(tmp_path / "out")
    before = file.stat().st_mtime_ns
    assert lab.build(tmp_path / "out").stat().st_mtime_ns == before


def test_points_and_metadata_are_filled_in(write):
    cells = {c.metadata.nbgrader.grade_id: c.metadata.nbgrader for c in write(GIVEN + ANSWER + TESTS).cells}
    assert cells["test_double"].points == 3
    assert cells["test_double"].locked
    assert cells["given"].locked
    assert not cells["given"].grade
    assert cells["double"].solution
    assert not cells["double"].locked
    assert {m.schema_version for m in cells.values()} == {3}


def test_what_is_released_holds_no_answer_and_no_hidden_test(write):
    exercise = write(GIVEN + ANSWER + TESTS).exercises[0]
    assert release_source(exercise.answer).endswith("    # YOUR CODE HERE\n    raise NotImplementedError()")
    assert "n * 2" not in exercise.stub
    assert "randrange" not in visible_tests(exercise.tests)
    assert '@check("two", points=1)' in visible_tests(exercise.tests)


def test_the_release_of_every_lab_holds_no_answer_and_no_hidden_test(root):
    """What nbgrader released, against what the source says must not be in it."""
    for lab in find_labs(root / "labs"):
        released = (root / "labs" / "build" / "release" / lab.name / f"{lab.name}.ipynb").read_text(encoding="utf-8")
        assert "HIDDEN TESTS" not in released
        assert "SOLUTION" not in released
        assert "check.hidden" not in released
        stubs = "".join(e.stub + visible_tests(e.tests) for e in lab.exercises)
        for exercise in lab.exercises:
            for line in {*exercise.answer.splitlines(), *exercise.tests.splitlines()}:
                if len(line.strip()) > 25 and line not in stubs and "SOLUTION" not in line and "HIDDEN" not in line:
                    assert json.dumps(line)[1:-1] not in released, line


def test_the_release_is_reproducible(root, tmp_path):
    """Two runs of nbgrader's own command in two courses give the same bytes."""
    import os

    hashes = set()
    for name in ("a", "b"):
        course = tmp_path / name
        for lab in find_labs(root / "labs"):
            lab.build(course / "build" / "source")
            command = ["nbgrader", "generate_assignment", lab.name, "--create"]
            environment = {**os.environ, "LLMLAB_COURSE_ROOT": str(course)}
            subprocess.run(command, cwd=root / "labs", env=environment, check=True, capture_output=True)
            released = course / "build" / "release" / lab.name / f"{lab.name}.ipynb"
            hashes.add((lab.name, hashlib.sha256(released.read_bytes()).hexdigest()))
            nbformat.validate(nbformat.read(released, as_version=4))
    assert len(hashes) == len(find_labs(root / "labs"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GIVEN + ANSWER, "the solution 'double' has no test cell 'test_double'"),
        (GIVEN + TESTS, "test cells without a solution: test_double"),
        (
            GIVEN + ANSWER + TESTS.replace("check.hidden(", "check("),
            "must stand inside a hidden region just if it is hidden",
        ),
        (
            GIVEN + ANSWER + TESTS.replace('"two", points=1', '"two", points=0').replace("points=2", "points=0"),
            "no property with points",
        ),
        (
            GIVEN + ANSWER.replace('"solution": true', '"solutions": true') + TESTS,
            "takes grade_id, solution, grade and locked",
        ),
    ],
)
def test_a_broken_lab_is_refused(write, text, message):
    with pytest.raises(LabError, match=message):
        _ = write(text).exercises


def lift(stub, given=()):
    return lift_body("llmlab.memory.gpus_needed", stub, given, "    ")


def test_a_body_is_lifted_without_its_docstring():
    body = lift("def gpus_needed(num_bytes, device, usable_fraction=1.0):\n    pass", ("find_device", "math"))
    assert (
        body
        == "    memory = find_device(device).memory_bytes\n    return math.ceil(num_bytes / (memory * usable_fraction))"
    )


def test_a_method_is_lifted():
    body = lift_body("llmlab.memory.TrainingMemory.total", "def total(self):\n    pass", (), "")
    assert body == "return self.weights + self.gradients + self.optimizer + self.activations"


@pytest.mark.parametrize(
    ("stub", "given", "message"),
    [
        ("def gpus_needed(num_bytes, device):\n    pass", ("find_device", "math"), "the lab has the signature"),
        ("def gpus_needed(num_bytes, device, usable_fraction=0.9):\n    pass", ("find_device", "math"), "signature"),
        ("def other(num_bytes):\n    pass", (), "does not define 'gpus_needed'"),
        ("def gpus_needed(num_bytes, device, usable_fraction=1.0):\n    pass", ("math",), "uses find_device"),
    ],
)
def test_a_lift_that_does_not_fit_is_refused(stub, given, message):
    with pytest.raises(LiftError, match=message):
        lift(stub, given)


@pytest.mark.parametrize("dotted", ["llmlab.memory.nothing", "llmlab.nothing.at_all", "nothing"])
def test_a_lift_of_nothing_is_refused(dotted):
    with pytest.raises(LiftError, match=r"defines no|no such module"):
        lift_body(dotted, "def nothing():\n    pass", (), "")


def test_free_names_are_what_comes_from_outside():
    source = """
    def f(x: Annotation, y=DEFAULT):
        import os
        z = [len(w) + OUTER for w in x]
        def inner():
            return z, GLOBAL, os
        return inner
    """
    assert free_names(textwrap.dedent(source)) >= {"OUTER", "GLOBAL"}
    assert not free_names(textwrap.dedent(source)) & {"Annotation", "os", "z", "w", "len", "f"}


def test_mutants_are_single_faults():
    names = {
        m.name
        for m in mutants('def f(a, b=1):\n    """Doc 7."""\n    if a > 2:\n        return a + b\n    return a * b')
    }
    assert {"a > 2 → a >= 2", "a + b → a - b", "a + b → a", "1 → 2", "return a * b → return None"} <= names
    assert not any("7" in name for name in names)
    for mutant in mutants("def f(a):\n    return a // 2 + 1"):
        ast.parse(mutant.source)
        assert mutant.source != "def f(a):\n    return a // 2 + 1"


WRONG = """# %% answer={"exercise": "double", "name": "squared", "fails": "two"}
def double(n):
    return n * n
"""


def problems_of(write, tests=TESTS, answers=WRONG):
    return prove(write(GIVEN + ANSWER + tests, answers=answers), processes=1).problems


def test_the_proof_notices_a_grader_that_cannot_fail(write):
    """Checks that compare nothing: the stub, trivial answers, wrong answers and mutants all get through."""
    blind = TESTS.replace("equal(double(1), 2)", "pass").replace("equal(double(n), n + n)", "pass")
    problems = " ".join(problems_of(write, tests=blind))
    for expected in (
        "the empty stub earns 3",
        "returning None earns 2 hidden",
        "squared: passes 'two'",
        "mutant survives",
    ):
        assert expected in problems


def test_the_proof_notices_a_hidden_test_that_the_visible_one_answers(write):
    repeated = TESTS.replace("n = rng.randrange(10, 99)", "n = 1")
    assert any("a table of the visible answers earns 2" in problem for problem in problems_of(write, tests=repeated))


def test_the_proof_notices_a_test_that_refuses_a_right_answer(write):
    narrow = TESTS.replace("equal(double(n), n + n)", "assert n < 50; equal(double(n), n + n)")
    assert any(problem.startswith("double: the reference earns 1 of 3") for problem in problems_of(write, tests=narrow))


def test_the_proof_asks_for_enough_answers(write):
    problems = " ".join(problems_of(write))
    assert "1 named wrong answers, 5 are asked for" in problems
    assert "0 other right answers, 2 are asked for" in problems


def test_a_sample_tries_fewer_mutants_and_the_same_ones(write):
    lab = write(GIVEN + ANSWER + TESTS, answers=WRONG)
    whole, half, again = prove(lab, processes=1), prove(lab, 0.5, 7, processes=1), prove(lab, 0.5, 7, processes=1)
    assert 0 < half.exercises[0].tried < whole.exercises[0].tried == half.exercises[0].mutants
    assert half == again


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (WRONG.replace('"double"', '"triple"'), "no exercise 'triple'"),
        (WRONG.replace(', "fails": "two"', ""), "must be right, or name the property that it fails"),
    ],
)
def test_an_incomplete_answer_is_refused(write, answers, message):
    with pytest.raises(AnswerError, match=message):
        read_answers(write(GIVEN + ANSWER + TESTS, answers=answers))


def test_a_proof_on_a_sample_says_so():
    exercise = ExerciseProof("double", 3, 2, 5, mutants=40, tried=12, killed=12, equivalent=0, problems=())
    sampled, full = Proof("toy", (exercise, exercise), True), Proof("other", (exercise,), False)
    assert "a sample" in extent([sampled, full])
    assert "24 of 80 mutants of *toy*" in extent([sampled, full])
    assert "other" not in extent([sampled, full])
    assert extent([full]) == "Every mutant of every lab was tried."
