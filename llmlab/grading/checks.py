"""The checks of an exercise: small named properties, each worth points, each with a message of its own.

A test cell of a lab reads::

    check = Checks("kv_cache_bytes")

    @check("a token of Llama-2-70B takes 327,680 bytes", points=1)
    def _(rng):
        equal(kv_cache_bytes(MODEL_CONFIGS["llama-2-70b"], 1), 327_680)

    check.report()

A property that fails costs its own points and no others. ``check.hidden`` marks the properties that the release leaves
out: their message names the property and keeps the inputs and the expected value to itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import math
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

RECORD_TYPE = "application/vnd.llmlab.checks+json"
MEASUREMENT_TYPE = "application/vnd.llmlab.measurement+json"
SEED_VARIABLE = "LLMLAB_SEED"
STUDENT_VARIABLE = "LLMLAB_STUDENT"
SECONDS_VARIABLE = "LLMLAB_CHECK_SECONDS"  # how long one property may take; 10 unless set

Property = Callable[[random.Random], None]
# What surrounds each property while a submission is graded, and which are run; a student's own run runs them all.
around_property: contextvars.ContextVar[Callable[[], contextlib.AbstractContextManager[None]]] = contextvars.ContextVar(
    "around_property", default=contextlib.nullcontext
)
only_hidden: contextvars.ContextVar[bool | None] = contextvars.ContextVar("only_hidden", default=None)


class CheckFailed(Exception):
    """A value that is not what the property asks for."""

    def __init__(self, got: Any, expected: str) -> None:
        super().__init__(f"got {_show(got)}, expected {expected}")


class ChecksFailed(Exception):
    """Raised at the end of a test cell some of whose properties failed, so that the cell is seen to fail."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the lines above say what failed, a traceback through the checks would not."""
        return [f"ChecksFailed: {self}"]


@dataclass(frozen=True)
class Outcome:
    """What became of one property."""

    property: str
    points: float
    passed: bool
    hidden: bool
    message: str = ""


@dataclass(frozen=True)
class Record:
    """The outcome of one exercise; the autograder reads scores from here and nowhere else."""

    exercise: str
    outcomes: tuple[Outcome, ...]

    @property
    def score(self) -> float:
        return round(sum(o.points for o in self.outcomes if o.passed), 6)

    @property
    def points(self) -> float:
        return round(sum(o.points for o in self.outcomes), 6)

    def lines(self) -> list[str]:
        """A line for each property, as a student reads it."""
        return [
            f"{'✓' if o.passed else '✗'} {o.property}"
            + (f"  [{o.points if o.passed else 0:g} of {o.points:g}]" if o.points else "")
            + (f"\n    {o.message}" if o.message else "")
            for o in self.outcomes
        ]

    def to_json(self) -> dict[str, Any]:
        return {"exercise": self.exercise, "outcomes": [asdict(o) for o in self.outcomes]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        return cls(data["exercise"], tuple(Outcome(**o) for o in data["outcomes"]))


LATE, LATE_HIDDEN = "TimeoutError: ", "a hidden input takes too long"  # how the message of a late property begins


class Checks:
    """Collects the outcomes of one exercise's properties; each runs as it is defined, with its own random inputs."""

    def __init__(self, exercise: str) -> None:
        self.exercise = exercise
        self._outcomes: list[Outcome | None] = []  # None: left to another run

    def __call__(self, name: str, points: float) -> Callable[[Property], None]:
        """Run the decorated function as the visible property ``name``."""
        return lambda function: self._run(name, points, function, hidden=False)

    def hidden(self, name: str, points: float) -> Callable[[Property], None]:
        """Run the decorated function as a property whose inputs and expected values stay unseen."""
        return lambda function: self._run(name, points, function, hidden=True)

    def _run(self, name: str, points: float, function: Property, hidden: bool) -> None:
        message = ""
        if only_hidden.get() not in (None, hidden):
            self._outcomes.append(None)
            return
        seconds = check_seconds()
        try:
            # nbgrader takes stderr in a test cell for a failure; a warning of the answer's is none.
            with contextlib.redirect_stderr(sys.stdout), around_property.get()(), _time_limit(seconds):
                function(submission_rng(self.exercise, name))
            passed = True
        except (Exception, SystemExit) as error:  # a student's function may raise anything: that is its outcome
            passed = False
            message = _hidden_message(error) if hidden else _visible_message(error)
        self._outcomes.append(Outcome(name, points, passed, hidden, message))

    @property
    def record(self) -> Record:
        return Record(self.exercise, tuple(o for o in self._outcomes if o is not None))

    def record_with(self, other: Checks) -> Record:
        """The record of two runs, of which each ran the properties that the other left to it."""
        pairs = zip(self._outcomes, other._outcomes, strict=True)
        return Record(self.exercise, tuple(o for pair in pairs for o in pair if o is not None))

    def report(self) -> None:
        """Show every property's outcome and hand the record to the notebook; raises ChecksFailed where one failed."""
        record = self.record
        text = "\n".join(record.lines())
        print(text)
        _publish({RECORD_TYPE: record.to_json()})
        failed = [o.property for o in record.outcomes if not o.passed]
        if failed:
            raise ChecksFailed(f"{len(failed)} of {len(record.outcomes)} properties failed, see above")


def equal(got: Any, expected: int | float | str | bool) -> None:
    """Fail unless ``got`` is a plain number (string, truth value) of exactly the expected value."""
    allowed: tuple[type, ...] = (int, float) if type(expected) in (int, float) else (type(expected),)
    if type(got) not in allowed:
        raise CheckFailed(got, f"{_show(expected)} (a plain {' or '.join(t.__name__ for t in allowed)})")
    if got != expected:
        raise CheckFailed(got, _show(expected))


def close(got: Any, expected: float, relative: float = 1e-6) -> None:
    """Fail unless ``got`` is a plain number within ``relative`` of the expected value."""
    if type(got) not in (int, float):
        raise CheckFailed(got, f"{_show(expected)} (a plain number)")
    if not math.isclose(got, expected, rel_tol=relative, abs_tol=0.0):
        raise CheckFailed(got, _show(expected) + (f", give or take {relative:.0%}" if relative >= 0.005 else ""))


def instance(got: Any, kind: type) -> None:
    """Fail unless ``got`` is an instance of exactly ``kind``."""
    if type(got) is not kind:
        raise CheckFailed(got, f"a {kind.__name__}")


def measured(name: str, predicted: float, value: float, unit: str = "bytes") -> None:
    """Show a measurement beside its prediction and record it; it is worth no points."""
    ratio = f"{value / predicted:.4f}" if predicted else "undefined"
    print(f"{name}: predicted {predicted:,.0f} {unit}, measured {value:,.0f} {unit}, measured / predicted {ratio}")
    _publish({MEASUREMENT_TYPE: {"name": name, "predicted": predicted, "measured": value, "unit": unit}})


def check_seconds() -> float:
    """How long one property may take."""
    return float(os.environ.get(SECONDS_VARIABLE, "10"))


def submission_seed() -> str:
    """The seed of the submission that is being graded; a student's own runs have the seed "practice"."""
    return os.environ.get(SEED_VARIABLE, "practice")


def seed_of(assignment: str, student: str) -> str:
    """The seed of one student's submission of one lab."""
    return hashlib.sha256(f"{assignment}\x1f{student}".encode()).hexdigest()


def submission_rng(*purpose: str) -> random.Random:
    """Random numbers that differ by submission and by purpose, and are the same on every run."""
    text = "\x1f".join((submission_seed(), *purpose))
    return random.Random(hashlib.sha256(text.encode()).digest())


def student_rng(student_id: str, purpose: str) -> random.Random:
    """Random numbers of one student, for inputs that the student must see to predict from.

    Raises ValueError for an id that is empty or has blanks around it, and where the submission that is graded belongs
    to another student.
    """
    if type(student_id) is not str or not student_id or student_id != student_id.strip():
        raise ValueError(f"student_id: expected your id without blanks around it, got {student_id!r}")
    owner = os.environ.get(STUDENT_VARIABLE, student_id)
    if student_id != owner:
        raise ValueError(f"student_id is {student_id!r} and this submission is of {owner!r}; its inputs are another's")
    return random.Random(hashlib.sha256(f"student\x1f{student_id}\x1f{purpose}".encode()).digest())


def _visible_message(error: BaseException) -> str:
    if isinstance(error, NotImplementedError):
        return "not written yet"
    return str(error) if isinstance(error, CheckFailed) else f"{type(error).__name__}: {error}"


def _hidden_message(error: BaseException) -> str:
    """No more than this: by the kind of its error an answer could tell what its hidden input was."""
    if isinstance(error, CheckFailed):
        return "a hidden input gives another value"
    return LATE_HIDDEN if isinstance(error, TimeoutError) else "a hidden input raises an error"


def _show(value: Any) -> str:
    if type(value) in (int, float):
        return f"{value:,}"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " …"


def _publish(data: dict[str, Any]) -> None:
    """Display ``data`` in the notebook; outside IPython there is nowhere to display it."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ModuleNotFoundError:
        return
    if get_ipython() is not None:
        display(data, raw=True)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after ``seconds``, where signals can be had (the main thread of a Unix)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(signum: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
