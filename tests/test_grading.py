"""A class is graded: in parallel, once each, through kills; on SQLite, PostgreSQL and a cluster; by file for schedulers."""

import csv
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from attacks.harness import FULL, GOOD, LAB, TRIPLE_ONLY, WRONG, submission

from llmlab.authoring.lab import Lab
from llmlab.grading.results import Busy, ResultLog, read_results

pytestmark = pytest.mark.sandbox
ANSWERS = {"right": GOOD["double"], "wrong": WRONG, "crash": "import os\nos._exit(3)", "raises": "1 / 0"}


class Course:
    """A course of the toy lab in a folder of its own, with this repository's configuration."""

    def __init__(self, folder, root, db_url=None):
        self.folder, self.root = folder, root
        self.environment = {**os.environ, "LLMLAB_COURSE_ROOT": str(folder), "LLMLAB_CHECK_SECONDS": "2"}
        self.config = root / "labs"
        if db_url:
            self.config = folder / "config"
            self.config.mkdir(parents=True)
            ours = (root / "labs" / "nbgrader_config.py").read_text()
            (self.config / "nbgrader_config.py").write_text(f"{ours}\nc.CourseDirectory.db_url = {db_url!r}\n")

    def build(self):
        """Make the lab and release it; a copy of the folder is as good."""
        (self.folder / "labs").mkdir(parents=True, exist_ok=True)
        (self.folder / "labs" / "toy.py").write_text(LAB)
        Lab(self.folder / "labs" / "toy.py").build(self.folder / "build" / "source")
        self.nbgrader("generate_assignment", "toy", "--create")
        return self

    def nbgrader(self, *arguments):
        return self._checked(forked.run("nbgrader", *arguments, cwd=self.config, env=self.environment))

    def run(self, *command, check=True):
        """Run a program from its start."""
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        return self._checked(done, check)

    def _checked(self, done, check=True):
        assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done

    def submit(self, student, text):
        folder = self.folder / "submitted" / student / "toy"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "toy.ipynb").write_bytes(text if isinstance(text, bytes) else text.encode())

    def grade(self, *options, check=True):
        return self._checked(self.start(*options).result(), check)

    def start(self, *options):
        command = ("grade", "toy", "--course", self.config, *options)
        return forked.Forked("llmlab", *command, cwd=self.root, env=self.environment)

    def export(self):
        self.nbgrader("export", f"--to={self.folder / 'grades.csv'}")
        with (self.folder / "grades.csv").open() as file:
            return {row["student_id"]: (row["status"], row["score"]) for row in csv.DictReader(file)}

    def lines(self):
        return list(read_results(self.folder / "results" / "toy.jsonl"))


@pytest.fixture(scope="module")
def built(tmp_path_factory, pytestconfig):
    return Course(tmp_path_factory.mktemp("built") / "course", pytestconfig.rootpath).build()


@pytest.fixture
def course_in(built):
    """A course in a folder."""

    def make(folder):
        shutil.copytree(built.folder, folder)
        return Course(folder, built.root)

    return make


@pytest.fixture
def course(tmp_path, course_in):
    return course_in(tmp_path / "course")


def test_a_class_is_graded_once_and_only_what_changed_again(course):
    for name, answer in ANSWERS.items():
        course.submit(name, submission(answer))
    course.submit("torn", submission()[:100])
    course.submit("foreign", json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    (course.folder / "submitted" / "nothing" / "toy").mkdir(parents=True)
    assert set(course.export().values()) == {("not graded", "")}
    said = course.grade().stdout
    assert "7 graded, 0 unchanged, 0 failed" in said
    assert "bubblewrap, seccomp, cgroup" in said
    expected = {
        "right": ("ok", str(FULL)), "wrong": ("ok", str(TRIPLE_ONLY)), "crash": ("crashed", str(TRIPLE_ONLY)),
        "raises": ("ok", str(TRIPLE_ONLY)), "torn": ("unreadable", ""), "foreign": ("wrong structure", ""),
        "nothing": ("missing", ""),
    }  # fmt: skip
    assert course.export() == expected
    course.submit("wrong", submission(GOOD["double"]))
    assert "1 graded, 6 unchanged, 0 failed" in course.grade().stdout
    assert course.export() == expected | {"wrong": ("ok", str(FULL))}
    assert "7 graded, 0 unchanged" in course.grade("--force").stdout


def test_feedback_and_the_formgraders_notebook_are_written(course):
    course.submit("student-01", submission())
    course.grade()
    page = (course.folder / "feedback" / "student-01" / "toy" / "toy.html").read_text()
    assert "3 of 6 points" in page
    assert "a hidden input gives another value" in page
    graded = json.loads((course.folder / "autograded" / "student-01" / "toy" / "toy.ipynb").read_text())
    assert graded["metadata"]["llmlab"]["sandbox"] == "bubblewrap, seccomp, cgroup"
    # nbgrader's own commands go on from there.
    course.nbgrader("generate_feedback", "toy", "--force")
    assert "HIDDEN TESTS" not in (course.folder / "feedback" / "student-01" / "toy" / "toy.html").read_text()


def test_the_same_submission_meets_the_same_inputs_and_students_meet_different_ones(course):
    tell = "def double(n):\n    return n * 2 if n % 2 else -1"  # right for about half of all students
    for number in range(8):
        course.submit(f"student-{number}", submission(tell))
    course.grade()
    first = course.export()
    assert {score for _, score in first.values()} == {"4.0", "6.0"}
    course.grade("--force")
    assert course.export() == first
    (course.folder / ".grading-secret").write_text("another secret\n")
    course.grade("--force")
    assert course.export() != first


def test_one_file_is_graded_for_a_job_scheduler_and_nothing_is_written(course):
    course.submit("student-01", submission())
    before = sorted(course.folder.rglob("*"))
    file = course.folder / "submitted" / "student-01" / "toy" / "toy.ipynb"
    result = json.loads(course.grade("--one", str(file), "--student", "student-01").stdout)
    assert (result["status"], result["score"], result["student"]) == ("ok", TRIPLE_ONLY, "student-01")
    assert {path.name for path in set(course.folder.rglob("*")) - set(before)} == {".grading-secret"}


def test_without_a_sandbox_it_refuses_and_on_the_flag_every_record_says_so(course):
    course.submit("student-01", submission())
    code = (
        "import sys, llmlab.grading.probe as p\n"
        "p.has_bubblewrap = p.in_container = lambda: False; p.landlock_abi = lambda: 0\n"
        "from llmlab.cli import app; sys.argv = ['llmlab', *sys.argv[1:]]; app()"
    )
    command = [sys.executable, "-c", code, "grade", "toy", "--course", str(course.config)]
    refused = course.run(*command, check=False)
    assert refused.returncode == 3
    assert "sudo apt-get install bubblewrap" in refused.stderr
    assert not (course.folder / "results").exists()
    said = course.run(*command, "--unsandboxed").stdout
    assert "NO SANDBOX" in said
    assert course.lines()[0]["sandbox"].startswith("NO SANDBOX")
    assert "graded without a sandbox" in (course.folder / "feedback" / "student-01" / "toy" / "toy.html").read_text()
    course.export()
    assert "NO SANDBOX" in (course.folder / "grades.csv").read_text()


def test_two_runs_at_once_do_not_mix(tmp_path):
    with ResultLog(tmp_path / "toy.jsonl"), pytest.raises(Busy, match="another run is grading"):
        ResultLog(tmp_path / "toy.jsonl")


def test_a_torn_line_is_cut_off_and_the_others_stay(tmp_path):
    file = tmp_path / "toy.jsonl"
    with ResultLog(file) as log:
        log.append({"student": "a"})
    with file.open("ab") as handle:
        handle.write(b'{"student":"b","x":"' + b"y" * 100_000)
    assert [r["student"] for r in read_results(file)] == ["a"]
    with ResultLog(file) as log:
        log.append({"student": "c"})
    assert [r["student"] for r in read_results(file)] == ["a", "c"]


def test_kills_at_random_moments_lose_nothing_and_double_nothing(course):
    """SIGKILL at 20 random moments over 200 submissions, of which every other is no notebook and so takes no time."""
    total, moments = 200, random.Random(20260115)
    kinds = [kind for name in ANSWERS for kind in (name, "torn")]
    for number in range(total):
        kind = kinds[number % len(kinds)]
        text = f"torn {number}" if kind == "torn" else submission(ANSWERS[kind], after=f"number = {number}")
        course.submit(f"student-{number:03d}", text)
    for _ in range(20):
        done = _count_lines(course)
        grading, deadline = course.start(), time.monotonic() + 60
        wanted = min(
            done + moments.randrange(1, 9), total
        )  # some results further on, at any point of the next one's way
        while time.monotonic() < deadline and _count_lines(course) < wanted and grading.runs:
            time.sleep(0.005)
        time.sleep(moments.random() * 0.1)
        grading.kill()
    assert 20 <= _count_lines(course) < total  # each came to something, and none to the end
    course.grade()
    students = [result["student"] for result in course.lines()]
    assert sorted(students) == [f"student-{number:03d}" for number in range(total)]
    expected = {
        "crash": ("crashed", "3.0"), "right": ("ok", "6.0"), "wrong": ("ok", "3.0"), "raises": ("ok", "3.0"),
        "torn": ("unreadable", ""),
    }  # fmt: skip
    assert course.export() == {f"student-{n:03d}": expected[kinds[n % len(kinds)]] for n in range(total)}
    assert "0 graded, 200 unchanged" in course.grade().stdout
    assert not [p for p in _command_lines() if "llmlab.grading.prefork" in p]


def _count_lines(course):
    file = course.folder / "results" / "toy.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _command_lines():
    """What runs that is a child of nobody: a killed grader's processes must not be among it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "stat").read_text().rpartition(")")[2].split()[1] == "1":
                yield (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue


@pytest.fixture
def postgres(tmp_path):
    """A real server on loopback, with a database for the gradebook."""
    programs = sorted(p for p in Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    data = tmp_path / "postgres"
    data.mkdir()
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(data, "postgres", "postgres")
        for folder in [data, *data.parents][:-2]:
            folder.chmod(folder.stat().st_mode | 0o011)
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([*user, programs / "initdb", "-D", data, "-A", "trust", "-U", "grader", "--no-sync"], **quiet)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    subprocess.run([*user, programs / "pg_ctl", "-D", data, "-w", "-l", data / "log", "-o", options, "start"], **quiet)
    try:
        subprocess.run(
            [*user, programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "grader", "gradebook"], **quiet
        )
        yield f"postgresql+psycopg://grader@127.0.0.1:{port}/gradebook"
    finally:
        subprocess.run([*user, programs / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **quiet)


@pytest.mark.postgres
def test_the_gradebook_may_be_in_postgresql(tmp_path, root, postgres):
    course = Course(tmp_path / "course", root, db_url=postgres).build()
    for name, answer in ANSWERS.items():
        course.submit(name, submission(answer))
    course.grade()
    assert course.export() == {
        "right": ("ok", "6.0"),
        "wrong": ("ok", "3.0"),
        "crash": ("crashed", "3.0"),
        "raises": ("ok", "3.0"),
    }
    assert not (course.folder / "gradebook.db").exists()


def test_a_cluster_gives_the_same_gradebook(tmp_path, course_in):
    from distributed import LocalCluster

    local, remote = course_in(tmp_path / "local"), course_in(tmp_path / "remote")
    shutil.copy(_secret(local), remote.folder / ".grading-secret")
    for name, answer in ANSWERS.items():
        for course in (local, remote):
            course.submit(name, submission(answer))
    local.grade()
    with LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, processes=True
    ) as cluster:
        remote.grade("--scheduler", cluster.scheduler_address)
    assert remote.export() == local.export()
    assert {r["student"]: r["digest"] for r in remote.lines()} == {r["student"]: r["digest"] for r in local.lines()}


def _secret(course):
    from llmlab.grading.secret import course_secret

    course_secret(course.folder)
    return course.folder / ".grading-secret"
