"""What the attacks share: a toy lab with canaries, a submission of it, our grader, and the two controls.

A control shows that the attack works where nothing stops it: in `plain` the notebook runs in one process with its
tests, as nbgrader runs it (the same cells, assertions for tests, IPython, the hidden test in its place); in
`unsandboxed` our own grader runs it at `Level.NONE`. Attacks must be harmless to the machine that tests them: targets
are canary files and ports that the harness makes, floods are bounded.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toy_lab import doubling, toy_lab, tripling

from llmlab.authoring.lab import Lab, visible_tests
from llmlab.grading.batch import Failure, Local
from llmlab.grading.grade import Bundle
from llmlab.grading.notebooks import MOST_BYTES
from llmlab.grading.sandbox import Level, Limits

HIDDEN_CANARY = "canary-of-the-hidden-test-5417"
SECRET_CANARY = "canary-of-the-secret-9208"
LAB = toy_lab(
    doubling("any number", f'canary = "{HIDDEN_CANARY}"', "n = rng.randrange(10**6, 10**9)", "equal(double(n), n + n)"),
    tripling("any other number", "n = rng.randrange(10**6, 10**9)", "equal(triple(n), n + n + n)"),
)
# What plain nbgrader's test cells hold for the same exercises.
PLAIN_TESTS = {
    "double": f"assert double(1) == 2\n# {HIDDEN_CANARY}\nassert double(123457) == 246914",
    "triple": "assert triple(2) == 6\nassert triple(123457) == 370371",
}
GOOD = {"double": "def double(n):\n    return n * 2", "triple": "def triple(n):\n    return n * 3"}
WRONG = "def double(n):\n    return 7"
FULL, TRIPLE_ONLY = 6.0, 3.0
LIMITS = Limits(
    seconds=25, cell_seconds=6, property_seconds=2, cpu_seconds=20, memory_bytes=512 * 2**20, processes=32,
    disk_bytes=16 * 2**20,
)  # fmt: skip


def instructor(folder: Path) -> str:
    """The instructor's notebook of the toy lab."""
    (folder / "toy.py").write_text(LAB, encoding="utf-8")
    return json.dumps(Lab(folder / "toy.py").notebook())


def notebook(cells: Iterable[dict[str, Any]], **more: Any) -> str:
    """A notebook file of these cells."""
    return json.dumps({"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5, **more})


def code(source: str, grade_id: str | None = None, **marks: Any) -> dict[str, Any]:
    """A code cell; with a grade id it is one of the lab's, a solution unless ``marks`` say otherwise."""
    full = {"grade": False, "solution": True, "locked": False, "schema_version": 3, "task": False, **marks}
    metadata = {"nbgrader": {**full, "grade_id": grade_id}} if grade_id else {}
    return {"cell_type": "code", "source": source, "metadata": metadata, "outputs": [], "execution_count": None}


def markdown(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "source": source, "metadata": {}}


def submission(double: str = WRONG, triple: str = GOOD["triple"], before: str = "", after: str = "") -> str:
    """A notebook as a student hands it in: two answers, and code of the student's before and after them."""
    cells = [code('student_id = "student-01"'), *([code(before)] if before else [])]
    released = {name: visible_tests(_test_source(name)) for name in ("double", "triple")}
    given = "import random\n\nfrom llmlab.grading.checks import Checks, equal"
    cells.append(code(given, "given", solution=False, locked=True))
    for name, answer in (("double", double), ("triple", triple)):
        cells.append(code(answer, name))
        cells.append(code(released[name], f"test_{name}", grade=True, solution=False, locked=True, points=3))
    return notebook([*cells, *([code(after)] if after else [])])


def _test_source(name: str) -> str:
    start = LAB.index(f'# %% nbgrader={{"grade_id": "test_{name}"')
    return LAB[LAB.index("\n", start) + 1 :].split("\n# %%", 1)[0]


@dataclass(frozen=True)
class Attack:
    """One attack.

    kind: one of KINDS. text: the notebook handed in, given a folder for canaries (see `Ground`). contained: asserts
    what came of it under our grader. bites: asserts, by one of the controls, that it works where nothing stops it.
    """

    kind: str
    name: str
    text: Callable[[Ground], str | bytes | None]
    contained: Callable[[dict[str, Any], Ground], None]
    bites: Callable[[Ground], None]
    limits: Limits = LIMITS


KINDS = (
    "integrity", "secrecy", "other students", "resources", "escape", "persistence", "malformed input", "feedback",
)  # fmt: skip


@dataclass
class Ground:
    """Where one attack is tried: a folder of its own on the host, the instructor's notebook, and the graders."""

    folder: Path
    instructor: str
    limits: Limits = LIMITS
    notes: dict[str, Any] = field(default_factory=dict)  # what an attack's parts tell each other (ports, processes)
    open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # closed when the attack has been tried

    def canary(self, name: str = "canary", content: str = "untouched") -> Path:
        """A file on the host that an attack tries to read or change."""
        file = self.folder / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
        return file

    def bundle(self, text: str | bytes | None, level: Level = Level.FULL, student: str = "student-01") -> Bundle:
        shown = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        return Bundle("toy", student, self.instructor, shown, SECRET_CANARY, self.limits, level)

    def unsandboxed(self, text: str | bytes) -> dict[str, Any]:
        """Our grader without a sandbox."""
        return graded([self.bundle(text, Level.NONE)])[0]

    def plain(self, text: str | bytes, folder: Path | None = None, seconds: float | None = None) -> dict[str, Any]:
        """The notebook in one process with its tests, as nbgrader runs it.

        Returns score (of FULL), outputs (all that the cells printed), hidden (what the process could see of the hidden
        test: always in its memory), returncode. Raises subprocess.TimeoutExpired after ``seconds``.
        """
        home = folder or self.folder / "plain"
        home.mkdir(parents=True, exist_ok=True)
        source = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        cells = []
        for cell in json.loads(source)["cells"]:
            grade_id = cell["metadata"].get("nbgrader", {}).get("grade_id", "")
            if cell["cell_type"] == "code":
                name = grade_id.removeprefix("test_")
                is_test = grade_id.startswith("test_") and name in PLAIN_TESTS
                cells.append([name if is_test else "", PLAIN_TESTS[name] if is_test else "".join(cell["source"])])
        command = [sys.executable, "-c", PLAIN_RUNNER]
        done = subprocess.run(
            command, input=json.dumps(cells), cwd=home, capture_output=True, text=True, check=False,
            timeout=self.limits.seconds + 10 if seconds is None else seconds,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("SCORES ")]
        scores = json.loads(lines[-1].removeprefix("SCORES ")) if lines else {}
        return {"score": sum(scores.values()), "outputs": done.stdout + done.stderr, "returncode": done.returncode}


# Runs the cells in one IPython; a test cell that raises nothing and prints nothing to stderr earns its 3 points.
PLAIN_RUNNER = """
import io, json, sys
from IPython.core.interactiveshell import InteractiveShell
cells = json.load(sys.stdin)
shell = InteractiveShell.instance()
scores = {}
for name, source in cells:
    result = shell.run_cell(source, store_history=True)
    if name:
        scores[name] = 3.0 if result.success else 0.0
print("SCORES " + json.dumps(scores))
"""


def graded(bundles: list[Bundle], jobs: int = 2) -> list[dict[str, Any]]:
    """The results, in the bundles' order; an infrastructure failure is an error of the test."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for outcome in Local(jobs).run(bundles):
        assert not isinstance(outcome, Failure), outcome
        found[outcome["student"], outcome["digest"]] = outcome
    return [found[bundle.student, bundle.digest] for bundle in bundles]


def everything_shown(result: dict[str, Any]) -> str:
    """All that a student may get to see of a result."""
    from llmlab.grading.feedback import feedback_page

    return feedback_page(result) + json.dumps(result)


def said(result: dict[str, Any]) -> str:
    """All that the student's cells printed or showed; unlike `everything_shown` without their source."""
    outputs = [output for cell in result["cells"] for output in cell["outputs"]]
    return "".join(output.get("text") or json.dumps(output.get("data")) for output in outputs)


def change_lab(ground: Ground, replaced: dict[str, str]) -> None:
    """Give the ground a toy lab of its own, in which some texts are replaced by others."""
    lab = LAB
    for old, new in replaced.items():
        assert old in lab
        lab = lab.replace(old, new, 1)
    (ground.folder / "own.py").write_text(lab, encoding="utf-8")
    ground.instructor = json.dumps(Lab(ground.folder / "own.py").notebook())


def error_names(result: dict[str, Any]) -> list[str]:
    """The errors of the student's cells."""
    return [cell["error"]["name"] for cell in result["cells"] if cell["error"]]


__all__ = [
    "FULL", "GOOD", "HIDDEN_CANARY", "KINDS", "LAB", "LIMITS", "MOST_BYTES", "SECRET_CANARY", "TRIPLE_ONLY", "WRONG", "Attack",
    "Ground", "change_lab", "code", "error_names", "everything_shown", "graded", "instructor", "markdown", "notebook", "said",
    "submission",
]  # fmt: skip
