"""The proof that a lab's grader grades: right answers pass, wrong ones fail, and small faults are noticed.

For each exercise: the reference earns full marks from five seeds; the empty stub earns nothing; a trivial answer
(None, the input, a constant) and a table of the visible answers earn no hidden points; each named wrong answer fails
the property meant for it; the author's other right answers earn full marks; of the mutants of the reference at most
10 % survive, each one explained.
"""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from llmlab.authoring.answers import Answers, answers_file, read_answers
from llmlab.authoring.imports import PACKAGE, sources_behind
from llmlab.authoring.lab import Exercise, Lab, visible_tests
from llmlab.authoring.mutants import mutants
from llmlab.authoring.run import Replace, hidden_score, run_exercise
from llmlab.cache import cache_folder, write_atomically
from llmlab.grading.checks import SECONDS_VARIABLE

STUDENTS = ("student-01", "student-02", "student-03", "student-04", "student-05")
LEAST_WRONG_ANSWERS = 5
LEAST_RIGHT_ANSWERS = 2
LEAST_KILLED = 0.9
MOST_EQUIVALENT = 0.05
SAMPLE, SAMPLE_SEED = 0.3, 20260115  # the share of the mutants that a quick proof tries


@dataclass(frozen=True)
class ExerciseProof:
    """What became of all the answers to one exercise; ``problems`` is empty where the grader holds."""

    exercise: str
    points: float
    right_answers: int
    wrong_answers: int
    mutants: int
    tried: int
    killed: int
    equivalent: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Proof:
    """The proof of one lab."""

    lab: str
    exercises: tuple[ExerciseProof, ...]
    sampled: bool

    @property
    def problems(self) -> list[str]:
        return [f"{e.exercise}: {problem}" for e in self.exercises for problem in e.problems]


def prove(lab: Lab, sample: float = 1.0, sample_seed: int = 0, processes: int | None = None) -> Proof:
    """Prove a lab's grader; ``sample`` below 1 tries that share of the mutants, drawn by ``sample_seed``."""
    jobs = [(lab.path, e.name, sample, sample_seed) for e in lab.exercises]
    count = min(len(jobs), processes or os.cpu_count() or 1)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        return Proof(lab.name, tuple(pool.map(_prove_exercise, *zip(*jobs, strict=True))), sample < 1)


def stored_proof(lab: Lab) -> Proof | None:
    """The full proof of the lab as it is; None where it has not been made, or did not hold."""
    file = _proof_file(lab)
    if not file.exists():
        return None
    data = json.loads(file.read_text(encoding="utf-8"))
    exercises = tuple(ExerciseProof(**{**e, "problems": tuple(e["problems"])}) for e in data["exercises"])
    return Proof(data["lab"], exercises, data["sampled"])


def full_proof(lab: Lab) -> Proof:
    """The full proof, kept by the content of everything it depends on; made where it is not there yet."""
    if (stored := stored_proof(lab)) is not None:
        return stored
    proof = prove(lab)
    if not proof.problems:
        write_atomically(_proof_file(lab), json.dumps(asdict(proof), indent=1))
    return proof


def quick_proof(lab: Lab) -> Proof:
    """The full proof where it is there; else one on a sample of the mutants."""
    return stored_proof(lab) or prove(lab, SAMPLE, SAMPLE_SEED)


def _proof_file(lab: Lab) -> Path:
    return cache_folder() / "proofs" / f"{lab.name}-{proof_key(lab)}.json"


def proof_key(lab: Lab) -> str:
    """A hash of the lab, its answers, the Python version, and all of the package that either imports."""
    this = f"import llmlab.authoring.proof  # Python {platform.python_version()}"
    lifted = [f"import {e.lifted_from.rpartition('.')[0]}" for e in lab.exercises if e.lifted_from]
    data = [f"# {file.read_text('utf-8')!r}" for file in sorted(PACKAGE.glob("data/**/*")) if file.is_file()]
    return sources_behind([this, *lifted, *data, lab.path.read_text("utf-8"), answers_file(lab).read_text("utf-8")])[
        :16
    ]


def _prove_exercise(path: Path, name: str, sample: float, sample_seed: int) -> ExerciseProof:
    os.environ[SECONDS_VARIABLE] = "2"
    lab = Lab(path)
    exercise = next(e for e in lab.exercises if e.name == name)
    answers = read_answers(lab)
    problems = (
        _check_right(lab, exercise, answers) + _check_nothing(lab, exercise) + _check_wrong(lab, exercise, answers)
    )
    every = faults = mutants(exercise.answer)
    if sample < 1:
        faults = random.Random(f"{sample_seed}/{name}").sample(faults, max(1, round(sample * len(faults))))
    survivors = [m.name for m in faults if run_exercise(lab, exercise, m.source, STUDENTS[0]).score == exercise.points]
    explained = {e.mutant for e in answers.equivalents if e.exercise == name}
    problems += [f"a mutant survives and nobody says why: {s}" for s in survivors if s not in explained]
    if sample == 1:
        problems += [f"no such surviving mutant: {e}" for e in sorted(explained - set(survivors))]
        if len(faults) - len(survivors) < LEAST_KILLED * len(faults):
            problems.append(f"only {len(faults) - len(survivors)} of {len(faults)} mutants are killed")
        if len(survivors) > MOST_EQUIVALENT * len(faults):
            problems.append(f"{len(survivors)} of {len(faults)} mutants are explained away; mend the tests")
    right, wrong = answers.right(name), answers.wrong(name)
    killed = len(faults) - len(survivors)
    return ExerciseProof(
        name, exercise.points, len(right), len(wrong), len(every), len(faults), killed, len(survivors), tuple(problems)
    )


def _check_right(lab: Lab, exercise: Exercise, answers: Answers) -> list[str]:
    problems = []
    right = answers.right(exercise.name)
    if len(right) < LEAST_RIGHT_ANSWERS:
        problems.append(f"{len(right)} other right answers, {LEAST_RIGHT_ANSWERS} are asked for")
    sources = {"the reference": exercise.answer} | {a.name: a.source for a in right}
    for name, source in sources.items():
        for student in STUDENTS:
            record = run_exercise(lab, exercise, source, student)
            if record.score != exercise.points:
                failed = [o.property for o in record.outcomes if not o.passed]
                problems.append(f"{name} earns {record.score:g} of {exercise.points:g} for {student}: {failed}")
    return problems


def _check_nothing(lab: Lab, exercise: Exercise) -> list[str]:
    """The empty stub, trivial answers and a table of the visible answers."""
    problems = []
    if score := run_exercise(lab, exercise, exercise.stub, STUDENTS[0]).score:
        problems.append(f"the empty stub earns {score:g} points")
    for what, replace in _trivial_answers(lab, exercise).items():
        if score := hidden_score(run_exercise(lab, exercise, exercise.answer, STUDENTS[0], replace)):
            problems.append(f"{what} earns {score:g} hidden points")
    return problems


def _trivial_answers(lab: Lab, exercise: Exercise) -> dict[str, Replace]:
    def setting(value: Any) -> Replace:
        return lambda namespace: namespace.__setitem__(exercise.name, value)

    captured: dict[str, Any] = {}
    run_exercise(lab, exercise, exercise.answer, STUDENTS[1], captured.update)
    if not callable(captured[exercise.name]):
        return {
            "None": setting(None),
            "zero": setting(0),
            "a constant": setting(captured[exercise.name]),  # right for another student
        }
    table: dict[str, Any] = {}
    visible = Exercise(exercise.name, exercise.answer, exercise.stub, visible_tests(exercise.tests), 0, None)
    run_exercise(lab, visible, exercise.answer, STUDENTS[0], _remember(exercise.name, table))
    trivial: dict[str, Callable[..., Any]] = {
        "returning None": lambda *a, **k: None,
        "returning its input": lambda *a, **k: a[0] if a else next(iter(k.values()), None),
        "returning 0": lambda *a, **k: 0,
        "returning 1": lambda *a, **k: 1,
        "a table of the visible answers": lambda *a, **k: table.get(repr((a, k))),
    }
    if table:
        trivial["returning one visible answer"] = lambda *a, **k: next(iter(table.values()))
    return {what: setting(function) for what, function in trivial.items()}


def _remember(name: str, table: dict[str, Any]) -> Replace:
    def replace(namespace: dict[str, Any]) -> None:
        answer = namespace[name]

        def remembering(*args: Any, **kwargs: Any) -> Any:
            table[repr((args, kwargs))] = result = answer(*args, **kwargs)
            return result

        namespace[name] = remembering

    return replace


def _check_wrong(lab: Lab, exercise: Exercise, answers: Answers) -> list[str]:
    wrong = answers.wrong(exercise.name)
    problems = []
    if len(wrong) < LEAST_WRONG_ANSWERS:
        problems.append(f"{len(wrong)} named wrong answers, {LEAST_WRONG_ANSWERS} are asked for")
    for answer in wrong:
        record = run_exercise(lab, exercise, answer.source, STUDENTS[0])
        assert answer.fails is not None
        meant = [o for o in record.outcomes if o.property.startswith(answer.fails)]
        if len(meant) != 1:
            problems.append(f"{answer.name}: {len(meant)} properties begin with {answer.fails!r}")
        elif meant[0].passed:
            problems.append(f"{answer.name}: passes {meant[0].property!r}, which is meant to fail it")
    return problems


def table_rows(proofs: Sequence[Proof]) -> list[tuple[str, ...]]:
    """The kill table: a row an exercise."""
    return [
        (f"{p.lab}/{e.exercise}", f"{e.points:g}", str(e.right_answers), str(e.wrong_answers), str(e.mutants),
         f"{e.killed} of {e.tried}", str(e.equivalent), "fails" if e.problems else "holds")
        for p in proofs for e in p.exercises
    ]  # fmt: skip


def extent(proofs: Sequence[Proof]) -> str:
    """Which share of the mutants the proofs tried, in Markdown."""
    sampled = [proof for proof in proofs if proof.sampled]
    if not sampled:
        return "Every mutant of every lab was tried."
    counts = [
        f"{sum(e.tried for e in proof.exercises):,} of {sum(e.mutants for e in proof.exercises):,} mutants of *{proof.lab}*"
        for proof in sampled
    ]
    return f"Here it shows **a sample**: {', '.join(counts)} were tried. `make proof` tries them all."


TABLE_HEADER = ("exercise", "points", "right", "wrong", "mutants", "killed", "explained", "grader")
