"""What the attacks share: a toy lab with canaries, a submission of it, our grader, and what a control looks at.

A control shows that an attack works where nothing stops it: plain nbgrader grades it, with its defaults, in a process
with its tests (`attacks.plain`), or our own grader does without a sandbox. Attacks must be harmless to the machine that
tests them: targets are canary files and ports that the harness makes, floods are bounded, and what is planted in a
home or among packages asks first whether it is one of the harness's (`ON_GROUND`).
"""

from __future__ import annotations

import contextlib
import json
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
class Plain:
    """The control by plain nbgrader.

    bites: asserts that the attack worked. tests: what the lab's test cells hold where they are others than PLAIN_TESTS.
    text: a notebook that holds this attack and others, so that one run shows what all of them do. alone: in a course of its own, since it may end a class or take long. options: of the command. seconds: after which
    the command is killed. memory: bytes of address space that the command has.
    """

    bites: Callable[[Graded, Ground], None]
    tests: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    alone: bool = False
    options: tuple[str, ...] = ()
    seconds: float = 120
    memory: int | None = None


@dataclass(frozen=True)
class Unsandboxed:
    """The control by our own grader without a sandbox; ``bites`` gets the result, or the failure to grade."""

    bites: Callable[[Any, Ground], None]


@dataclass(frozen=True)
class Own:
    """A control that is a run of its own."""

    bites: Callable[[Ground], None]


@dataclass(frozen=True)
class Attack:
    """One attack.

    kind: one of KINDS. text: the notebook handed in, given a folder for canaries (see `Ground`). contained: asserts
    what came of it under our grader. control: how it is seen to work where nothing stops it. lay_out: where it is not
    the text that attacks but what lies in the student's folder, which it makes.
    """

    kind: str
    name: str
    text: Callable[[Ground], str | bytes | None]
    contained: Callable[[dict[str, Any], Ground], None]
    control: Plain | Unsandboxed | Own
    limits: Limits = LIMITS
    lay_out: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Fault:
    """What could harm only our grader, by what it speaks or accepts: no other would notice, so it has no control."""

    name: str
    text: Callable[[Ground], str | bytes | None]
    contained: Callable[[dict[str, Any], Ground], None]
    limits: Limits = LIMITS


@dataclass(frozen=True)
class Graded:
    """What came of a submission under plain nbgrader."""

    score: float | None  # None: the gradebook has none
    said: str  # what its cells printed, showed and raised, without tracebacks
    page: str  # its feedback, where that was asked for
    folder: Path  # of what was graded; there is none where nbgrader gave up on it
    log: str  # of the command that graded it, with the class or alone
    seconds: float | None  # that the command took; None where it had to be killed


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


def graded(bundles: list[Bundle], jobs: int = 2) -> list[dict[str, Any]]:
    """The results, in the bundles' order; an infrastructure failure is an error of the test."""
    found = outcomes(bundles, jobs)
    assert not any(isinstance(outcome, Failure) for outcome in found), found
    return found


def outcomes(bundles: list[Bundle], jobs: int = 2) -> list[Any]:
    """Results and failures, in the bundles' order; each bundle is another student's."""
    found = {o.student if isinstance(o, Failure) else o["student"]: o for o in Local(jobs).run(bundles)}
    assert len(found) == len(bundles)
    return [found[bundle.student] for bundle in bundles]


# At the start of what would plant something: it goes on only in the sandbox's home, or in one that the harness made.
ON_GROUND = """
import os
assert os.environ["HOME"] == "/student" or os.path.exists(os.environ["HOME"] + "/of-the-harness"), "not here"
"""


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
    "FULL", "GOOD", "HIDDEN_CANARY", "KINDS", "LAB", "LIMITS", "MOST_BYTES", "ON_GROUND", "PLAIN_TESTS", "SECRET_CANARY",
    "TRIPLE_ONLY", "WRONG", "Attack", "Fault", "Graded", "Ground", "Own", "Plain", "Unsandboxed", "change_lab", "code",
    "error_names", "everything_shown", "graded", "instructor", "markdown", "notebook", "outcomes", "said", "submission",
]  # fmt: skip
