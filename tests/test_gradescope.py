"""Gradescope's autograder: its zip, and its script run for real in a folder that is laid out as the container is."""

import io
import json
import stat
import subprocess
import sys
import zipfile

import nbformat
import pytest
from typer.testing import CliRunner

from llmlab.authoring.lab import Lab
from llmlab.cli import app
from llmlab.grading.formats import UNSAFE
from llmlab.grading.gradescope import student_id

STUDENT = "ada@example.org"


@pytest.fixture(scope="module")
def course(tmp_path_factory, pytestconfig):
    """The course's folder with the lab `memory` built."""
    folder = tmp_path_factory.mktemp("course")
    labs = pytestconfig.rootpath / "labs"
    (folder / "nbgrader_config.py").write_text((labs / "nbgrader_config.py").read_text(encoding="utf-8"))
    Lab(labs / "memory.py").build(folder / "build" / "source")
    return folder


@pytest.fixture(scope="module")
def archives(course):
    """The zip as it is made with a sandbox, and without one."""
    made = {}
    for options in ((), ("--unsandboxed",)):
        file = course / f"autograder{len(options)}.zip"
        result = CliRunner().invoke(app, ["gradescope", "memory", "--to", str(file), "--course", str(course), *options])
        assert result.exit_code == 0, result.output
        assert "holds the hidden tests" in result.stdout
        made[bool(options)] = file
    return made


@pytest.fixture
def container(archives, tmp_path):
    """Lay out Gradescope's folders, run the script on a submission, read the results."""

    def run(files, unsandboxed=True, metadata=None, python=sys.executable, code=0):
        root = tmp_path / "autograder"
        for folder in ("source", "submission", "results"):
            (root / folder).mkdir(parents=True)
        with zipfile.ZipFile(archives[unsandboxed]) as archive:
            archive.extractall(root / "source")
        script = root / "run_autograder"
        script.write_bytes((root / "source" / "run_autograder").read_bytes())
        script.chmod(0o755)
        told = {"id": 1, "users": [{"email": STUDENT, "id": 12, "name": "Ada"}]} if metadata is None else metadata
        (root / "submission_metadata.json").write_text(json.dumps(told))
        for name, text in files.items():
            (root / "submission" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "submission" / name).write_text(text, encoding="utf-8")
        command = [script, root, python]
        ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert ran.returncode == code, ran.stderr
        return json.loads((root / "results" / "results.json").read_text()), ran

    return run


def answered(course, answers=None):
    """The reference's notebook as a student's, with other answers to some of the exercises."""
    notebook = nbformat.read(course / "build" / "source" / "memory" / "memory.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.source.startswith("student_id = "):
            cell.source = f'student_id = "{STUDENT}"'
        elif cell.metadata.get("nbgrader", {}).get("grade_id") in (answers or {}):
            cell.source = answers[cell.metadata.nbgrader.grade_id]
    return nbformat.writes(notebook)


WRONG = {"serving_bytes": "def serving_bytes(num_params, bits, overhead=1.2):\n    return num_params * bits * overhead"}


def test_the_zip_has_gradescopes_layout(archives, course):
    file = archives[False]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with zipfile.ZipFile(file) as archive:
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
        assert {"setup.sh", "run_autograder"} <= modes.keys()
        assert modes["setup.sh"] == modes["run_autograder"] == 0o755
        bundle = json.loads(archive.read("bundle.json"))
        assert (bundle["assignment"], bundle["student"], bundle["submission"]) == ("memory", "", None)
        assert (course / ".grading-secret").read_text().strip() == bundle["secret"]
        for script in ("setup.sh", "run_autograder"):
            subprocess.run(["bash", "-n"], input=archive.read(script), check=True)
        assert b"\nnbgrader==" in archive.read("constraints.txt")
        assert b"+" not in archive.read("constraints.txt")


def test_the_wheel_in_it_installs_this_package(archives, tmp_path):
    with zipfile.ZipFile(archives[False]) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".whl"))
        archive.extract(name, tmp_path)
        inside = zipfile.ZipFile(io.BytesIO(archive.read(name))).namelist()
    assert not [n for n in inside if n.endswith(".pyc") or n.startswith(("labs", "tests"))]
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, tmp_path / name]
    subprocess.run(command, check=True, capture_output=True)
    code = "import llmlab.grading.gradescope as g, importlib.metadata as m, llmlab.config as c; print(g.__file__, m.version('llmlab'), len(c.MODEL_CONFIGS))"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.startswith(str(target))


def test_the_reference_earns_everything_and_litter_beside_it_is_not_looked_at(container, course, root):
    litter = {"__MACOSX/memory.ipynb": "{", "x/.ipynb_checkpoints/memory.ipynb": "{", "scratch.ipynb": "{"}
    told, _ = container({"x/memory.ipynb": answered(course), **litter})
    assert told["score"] == Lab(root / "labs" / "memory.py").points == sum(t["score"] for t in told["tests"])
    assert {test["status"] for test in told["tests"]} == {"passed"}
    assert UNSAFE in told["output"]
    assert "Note:" not in told["output"]
    assert told["extra_data"]["sandbox"].startswith("NO SANDBOX")


def test_a_wrong_answer_loses_its_own_points_and_another_name_of_the_file_is_said(container, course):
    told, _ = container({"memory (1).ipynb": answered(course, WRONG)})
    assert "Note: there was no memory.ipynb; 'memory (1).ipynb' was taken." in told["output"].splitlines()
    failed = [test for test in told["tests"] if test["status"] == "failed"]
    assert failed
    assert all(test["name"].startswith("serving_bytes: ") and test["score"] == 0 for test in failed)
    assert told["score"] == pytest.approx(
        sum(t["max_score"] for t in told["tests"]) - sum(t["max_score"] for t in failed)
    )
    assert {test["visibility"] for test in told["tests"]} == {"visible"}
    hidden = [test for test in failed if test["output"].startswith("a hidden input")]
    assert [test["output"] for test in hidden] == ["a hidden input gives another value"] * len(hidden)


@pytest.mark.sandbox
def test_where_there_is_a_sandbox_it_is_used(container, course, tmp_path):
    told, _ = container({"memory.ipynb": answered(course, WRONG)}, unsandboxed=False)
    assert told["extra_data"]["sandbox"].startswith("bubblewrap")
    assert UNSAFE not in told["output"]
    assert told["score"] > 0
    # Where the sandbox is but another user, the hidden tests are closed to it.
    assert (tmp_path / "autograder" / "source").stat().st_mode & 0o077 == 0


WITHOUT_SANDBOX = """#!/usr/bin/env bash
exec {python} -c "import os, runpy, sys
import llmlab.grading.probe as probe
os.defpath = '/nonexistent'  # where bubblewrap is looked for
probe.landlock_abi, probe.in_container = (lambda: 0), (lambda: False)
sys.argv = sys.argv[3:]
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)" "$@"
"""


def test_without_a_sandbox_it_refuses_unless_the_zip_says_so(container, course, tmp_path):
    """Where there is neither bubblewrap nor anything weaker nothing of the submission is run, and there is no score."""
    python = tmp_path / "python"
    python.write_text(WITHOUT_SANDBOX.format(python=sys.executable))
    python.chmod(0o755)
    ran_file = tmp_path / "ran"
    answer = {"serving_bytes": f"open({str(ran_file)!r}, 'w').close()"}
    told, ran = container({"memory.ipynb": answered(course, answer)}, unsandboxed=False, python=python, code=1)
    assert not ran_file.exists()
    assert "score" not in told
    assert not [test for test in told["tests"] if "score" in test]
    assert "tell your instructor" in told["output"]
    assert "bubblewrap is not installed" in ran.stderr
    assert "--unsandboxed" in ran.stderr
    assert "bubblewrap" not in json.dumps(told)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "missing"),
        ({"notes.txt": "x"}, "missing"),
        ({"memory.ipynb": "{"}, "unreadable"),
        (
            {"mine.ipynb": "{"},
            "unreadable: not a notebook: no JSON, or cut off Note: there was no memory.ipynb; 'mine.ipynb' was taken.",
        ),
        ({"a.ipynb": "{}", "b.ipynb": "{}"}, "there are 2 notebooks"),
    ],
)
def test_what_cannot_be_graded_has_no_score(container, files, said):
    told, _ = container(files)
    assert "score" not in told
    assert told["output"].startswith(f"Not graded: {said}")


def test_a_submission_of_nobody_is_not_graded(container, course):
    told, ran = container({"memory.ipynb": answered(course)}, metadata={"users": []}, code=1)
    assert "score" not in told
    assert "names no student" in ran.stderr


@pytest.mark.parametrize("metadata", [{}, {"users": []}, {"users": [{"email": " "}]}, {"users": [{"email": 7}]}, []])
def test_the_student_is_the_first_with_an_address(metadata):
    with pytest.raises(ValueError, match="names no student"):
        student_id(metadata)
    assert student_id({"users": [{"email": f" {STUDENT}"}, {"email": "b@example.org"}]}) == STUDENT


def test_a_zip_that_cannot_be_made_leaves_the_one_before(tmp_path, course):
    kept = tmp_path / "keep.zip"
    kept.write_bytes(b"the one before")
    done = subprocess.run(
        [sys.executable, "-m", "llmlab", "gradescope", "memroy", "--course", str(course), "--to", str(kept)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("llmlab: ")
    assert kept.read_bytes() == b"the one before"
