"""The answers that a lab's author wrote to try the grader: right ones, and wrong ones that must fail.

``labs/answers/<lab>.py`` is a py:percent file. Each cell defines one exercise's name and says what it is::

    # %% answer={"exercise": "kv_cache_bytes", "name": "query heads cached", "fails": "grouped-query attention"}
    # %% answer={"exercise": "kv_cache_bytes", "name": "summed layer by layer", "right": true}
    # %% equivalent={"exercise": "gpus_needed", "mutant": "…", "because": "…"}

``fails`` is the beginning of the property that must fail. The last form explains a mutant that no test can kill.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jupytext

from llmlab.authoring.lab import Lab


class AnswerError(ValueError):
    """An answers file with a cell that says too little, or speaks of an exercise that is not there."""


@dataclass(frozen=True)
class Answer:
    """One answer and what must become of it; ``fails`` is None for a right one."""

    exercise: str
    name: str
    source: str
    fails: str | None


@dataclass(frozen=True)
class Equivalent:
    """A mutant that computes the same as the reference, and why."""

    exercise: str
    mutant: str
    because: str


@dataclass(frozen=True)
class Answers:
    answers: tuple[Answer, ...]
    equivalents: tuple[Equivalent, ...]

    def wrong(self, exercise: str) -> list[Answer]:
        return [a for a in self.answers if a.exercise == exercise and a.fails is not None]

    def right(self, exercise: str) -> list[Answer]:
        return [a for a in self.answers if a.exercise == exercise and a.fails is None]


def answers_file(lab: Lab) -> Path:
    return lab.path.parent / "answers" / lab.path.name


def read_answers(lab: Lab) -> Answers:
    """Read the answers of a lab; AnswerError where a cell is incomplete."""
    file = answers_file(lab)
    known = {exercise.name for exercise in lab.exercises}
    answers, equivalents = [], []
    for cell in jupytext.read(file, fmt="py:percent").cells:
        said = cell.metadata.get("answer") or cell.metadata.get("equivalent")
        if said is None:
            continue
        if said.get("exercise") not in known:
            raise AnswerError(f"{file.name}: no exercise {said.get('exercise')!r} in the lab")
        if "answer" not in cell.metadata:
            equivalents.append(Equivalent(**said))
        elif bool(said.get("right")) == ("fails" in said):
            raise AnswerError(f"{file.name}: {said.get('name')!r} must be right, or name the property that it fails")
        else:
            answers.append(Answer(said["exercise"], said["name"], cell.source, said.get("fails")))
    return Answers(tuple(answers), tuple(equivalents))
