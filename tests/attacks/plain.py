"""Plain nbgrader, with its defaults: a lab of assertions, attackers as its students, graded by its own command."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import forked
import nbformat
from nbgrader.api import Gradebook, MissingEntry

from attacks.harness import (
    GOOD,
    PLAIN_TESTS,
    SECRET_CANARY,
    TRIPLE_ONLY,
    Attack,
    Graded,
    Ground,
    Plain,
    code,
    submission,
)
from attacks.harness import notebook as notebook_of
from llmlab.grading.checks import SEED_VARIABLE, STUDENT_VARIABLE
from llmlab.grading.sandbox import PACKAGE
from llmlab.grading.secret import keyed_seed

GIVEN = "import random\n\nfrom llmlab.grading.checks import Checks, equal"
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
BUSY = ("Kernel didn't respond", "Kernel died before replying", "Timeout waiting for IOPub")  # said on a busy machine
HONEST = "honest"  # who hands in a plainly wrong answer


@dataclass
class Course:
    """A course in a folder, whose labs differ in their tests; ``feedback``: pages are made when it is graded."""

    folder: Path
    feedback: bool = False
    submitted: dict[str, tuple[str, str]] = field(default_factory=dict)  # attack -> student, lab
    shared: dict[str, str] = field(default_factory=dict)  # the text of several attacks -> student

    @property
    def environment(self) -> dict[str, str]:
        """The instructor's: a home, packages, a token, and the seed of hidden inputs, as a lab that draws them must have it."""
        return {
            **os.environ, "HOME": str(self.folder / "home"), "PYTHONPATH": str(self.folder / "site"),
            "COURSE_TOKEN": SECRET_CANARY, STUDENT_VARIABLE: "student-01",
            SEED_VARIABLE: keyed_seed(SECRET_CANARY, "toy", "student-01"),
        }  # fmt: skip

    def nbgrader(self, *arguments: object, memory: int | None = None) -> forked.Forked:
        return forked.Forked("nbgrader", *arguments, cwd=self.folder, env=self.environment, memory=memory)

    def build(self, labs: dict[str, dict[str, str]]) -> None:
        """Make and release the labs: their names, and their tests."""
        (self.folder / "nbgrader_config.py").write_text("c = get_config()\nc.CourseDirectory.course_id = 'plain'\n")
        (self.folder / "home").mkdir()
        (self.folder / "home" / "of-the-harness").touch()
        package = self.folder / "site" / PACKAGE.name
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "data", "engine", "parallel"))
        for lab, tests in labs.items():
            (self.folder / "source" / lab).mkdir(parents=True)
            (self.folder / "source" / lab / f"{lab}.ipynb").write_text(_source(tests), encoding="utf-8")
            done = self.nbgrader("generate_assignment", lab, "--create").result()
            assert done.returncode == 0, done.stderr

    def hand_in(self, attack: Attack, ground: Ground, lab: str, shared: str | None) -> None:
        if shared is not None and shared in self.shared:
            self.submitted[attack.name] = self.shared[shared], lab
            return
        student = f"student-{len(self.submitted):02d}"
        self.submitted[attack.name] = student, lab
        home = self.folder / "submitted" / student / lab
        if attack.lay_out:
            attack.lay_out(home)
        elif shared is None:
            _write(home, attack.text(ground))
        else:
            self.shared[shared] = student
            _write(home, shared)

    def grade(self, control: Plain | None = None) -> tuple[str, float | None]:
        """What the commands said, and how long they took; None where one was killed. control: of an attack that is alone."""
        log, start = "", time.monotonic()
        for lab in sorted({path.name for path in self.folder.glob("submitted/*/*")}):
            options, memory = (control.options, control.memory) if control else ((), None)
            try:
                said = self._autograde(lab, *options, memory=memory, seconds=control.seconds if control else None)
            except TimeoutError:
                return log, None
            if control is None and any(busy in said for busy in BUSY):
                said += self._autograde(lab)  # those that it has not graded
            if self.feedback:
                said += self.nbgrader("generate_feedback", lab).result().stderr
            log += said
        return log, time.monotonic() - start

    def _autograde(self, lab: str, *options: str, memory: int | None = None, seconds: float | None = None) -> str:
        command = self.nbgrader("autograde", lab, *options, memory=memory)
        try:
            return str(command.result(seconds).stderr)
        except TimeoutError:
            command.kill()
            raise

    def outcome(self, student: str, lab: str, log: str = "", seconds: float | None = None) -> Graded:
        with Gradebook(f"sqlite:///{self.folder}/gradebook.db") as gradebook:
            try:
                graded = gradebook.find_submission_notebook(lab, lab, student).grades
            except MissingEntry:
                graded = []
            scores = [grade.auto_score for grade in graded]
        folder = self.folder / "autograded" / student / lab
        notebook, page = folder / f"{lab}.ipynb", self.folder / "feedback" / student / lab / f"{lab}.html"
        text, shown = (file.read_text(encoding="utf-8") if file.is_file() else "" for file in (notebook, page))
        score = None if None in scores or not scores else sum(scores)
        return Graded(score, _said(text), shown, folder, log, seconds)


def graded_plainly(folder: Path, attacks: Iterable[Attack], ground_of: Callable[[Attack], Ground]) -> dict[str, Graded]:
    """What comes of attacks under plain nbgrader: a few classes side by side, and some in a course of their own."""
    folder.mkdir(parents=True)
    chosen = [(attack, attack.control) for attack in attacks if isinstance(attack.control, Plain)]
    labs: dict[str, dict[str, str]] = {"toy": PLAIN_TESTS}
    lab_of = {}
    for attack, control in chosen:
        tests = {**PLAIN_TESTS, **control.tests}
        lab_of[attack.name] = next((lab for lab, known in labs.items() if known == tests), f"toy-{len(labs)}")
        labs[lab_of[attack.name]] = tests
    template = Course(folder / "template")
    template.folder.mkdir()
    template.build(labs)
    classes: dict[str, list[tuple[Attack, Plain]]] = {}
    for number, (attack, control) in enumerate(chosen):
        classes.setdefault(f"alone-{number}" if control.alone else attack.kind, []).append((attack, control))
    # A plainly wrong answer to each lab, in one class of those that have it, earns what it must.
    of_honest = {
        lab_of[attack.name]: name
        for name, members in classes.items()
        for attack, control in members
        if not control.alone
    }

    def grade(name: str) -> dict[str, Graded]:
        shutil.copytree(template.folder, folder / name)
        course = Course(folder / name, feedback=name == "feedback")
        honest = [lab for lab in labs if of_honest.get(lab) == name]
        for attack, control in classes[name]:
            course.hand_in(attack, ground_of(attack), lab_of[attack.name], control.text)
        for lab in honest:
            _write(course.folder / "submitted" / HONEST / lab, submission())
        first = classes[name][0][1]
        log, seconds = course.grade(first if first.alone else None)
        for lab in honest:
            assert course.outcome(HONEST, lab).score == TRIPLE_ONLY, (name, lab, log[-3000:])
        return {attack: course.outcome(*where, log, seconds) for attack, where in course.submitted.items()}

    # Who is alone mostly waits, and so comes first.
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(grade, sorted(classes, key=lambda name: (len(classes[name]) > 1, -len(classes[name])))))
    return {attack: outcome for one in found for attack, outcome in one.items()}


def _source(tests: dict[str, str]) -> str:
    cells = [code('student_id = "student-00"'), code(GIVEN, "given", solution=False, locked=True)]
    for name, answer in GOOD.items():
        cells.append(code(f"### BEGIN SOLUTION\n{answer}\n### END SOLUTION", name))
        cells.append(code(tests[name], f"test_{name}", grade=True, solution=False, locked=True, points=3))
    return nbformat.writes(nbformat.from_dict(json.loads(notebook_of(cells, metadata=KERNEL, nbformat_minor=4))))


def _write(home: Path, text: str | bytes | None) -> None:
    assert text is not None
    home.mkdir(parents=True, exist_ok=True)
    (home / f"{home.name}.ipynb").write_bytes(
        text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    )


def _said(text: str) -> str:
    outputs = [o for cell in json.loads(text)["cells"] for o in cell.get("outputs", ())] if text else []
    parts = [
        part for o in outputs
        for part in (o.get("text"), o.get("ename"), o.get("evalue"), *o.get("data", {}).values()) if part is not None
    ]  # fmt: skip
    return "\n".join("".join(part) if isinstance(part, list | str) else json.dumps(part) for part in parts)
