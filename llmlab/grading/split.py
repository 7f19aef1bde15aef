"""Split execution: the student's cells run in the sandboxed worker, the tests here, and only plain data crosses.

Given cells, taken from the instructor's notebook, run on both sides. A name that a test uses and no trusted cell
binds is the student's: a plain value is brought over, anything else is a proxy.

Nothing that has met a hidden input is shown. So the notebook runs to its end with the visible properties, and leaves a
checkpoint at each test; the hidden properties then run from the checkpoints, and only whether they hold is kept.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import symtable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmlab.grading.checks import Checks, Outcome, Record, around_property, only_hidden
from llmlab.grading.session import Worker
from llmlab.grading.withhold import names_withheld_by

STUDENT, GIVEN, TEST = "student", "given", "test"


@dataclass(frozen=True)
class Part:
    """One code cell of a submission: what it is, whose source it has, and its points where it is a test."""

    kind: str
    source: str
    grade_id: str | None = None
    points: float = 0.0


@dataclass(frozen=True)
class PartResult:
    """What became of a part: outputs of the student's side, and a test's record."""

    outputs: tuple[dict[str, Any], ...] = ()
    error: dict[str, str] | None = None
    record: Record | None = None


def run_split(parts: Sequence[Part], worker: Worker, whole: bool = True) -> list[PartResult]:
    """Run the parts in order, then the hidden properties. whole: each test must have all the points of its cell."""
    token = around_property.set(worker.property)
    try:
        worker.withhold(_withheld(parts, strict=whole))
        shown = Trusted(worker, bound_names(parts), hidden=False)
        results = [_run_part(part, worker, shown) for part in parts]
        return _with_hidden(parts, results, worker, shown, whole)
    finally:
        around_property.reset(token)


def _withheld(parts: Sequence[Part], strict: bool) -> list[str]:
    """What the given cells withhold; where they may be a student's, what cannot be read is left to the cells themselves."""
    names: list[str] = []
    for part in parts:
        with contextlib.nullcontext() if strict else contextlib.suppress(ValueError):
            names += names_withheld_by(part.source) if part.kind == GIVEN else []
    return names


def _run_part(part: Part, worker: Worker, trusted: Trusted) -> PartResult:
    if part.kind == TEST:
        trusted.test(part)
        worker.checkpoint()
        return PartResult()
    result = worker.run(part.source)
    if part.kind == GIVEN:
        trusted.run(part.source)
    return PartResult(tuple(result["outputs"]), result["error"])


def _with_hidden(
    parts: Sequence[Part], results: list[PartResult], worker: Worker, shown: Trusted, whole: bool
) -> list[PartResult]:
    """The results, each test's record completed by its hidden properties."""
    hidden, tests = Trusted(worker, bound_names(parts), hidden=True), 0
    complete = []
    for number, part in enumerate(parts):
        if part.kind == STUDENT:
            complete.append(results[number])
            continue
        # A given cell sees the student's names as the test behind it does.
        if tests < sum(p.kind == TEST for p in parts):
            worker.go_to(tests)
        if part.kind == GIVEN:
            hidden.run(part.source)
            complete.append(results[number])
            continue
        hidden.test(part)
        complete.append(PartResult(record=_record(part, shown.tested[tests], hidden.tested[tests], whole)))
        tests += 1
    return complete


def _record(part: Part, shown: Tested, hidden: Tested, whole: bool) -> Record:
    """The record of a test cell; one whose checks did not run to their end earns nothing."""
    # What a hidden test said could tell its input: it is not shown.
    reason = shown.error or ("a hidden test failed outside its properties" if hidden.error else "no outcome")
    if shown.checks is not None and hidden.checks is not None:
        with contextlib.suppress(ValueError):
            record = shown.checks.record_with(hidden.checks)
            if record.points == part.points or not whole:
                return record
        reason = "the properties are not those of the lab"
    failed = Outcome("runs", part.points, False, False, f"the checks did not run to their end ({reason})")
    return Record(part.grade_id or "", (failed,))


def bound_names(parts: Sequence[Part]) -> frozenset[str]:
    """The names that the trusted cells bind, and Python's own: should a cell fail half-way, they are still not the student's."""
    found = set(vars(builtins))
    for part in parts:
        if part.kind != STUDENT:
            found |= {
                name for name, symbol in _module_symbols(part.source) if symbol.is_assigned() or symbol.is_imported()
            }
    return frozenset(found)


def _module_symbols(source: str) -> list[tuple[str, symtable.Symbol]]:
    return [(symbol.get_name(), symbol) for symbol in symtable.symtable(source, "<trusted>", "exec").get_symbols()]


@dataclass(frozen=True)
class Tested:
    """One run of a test cell."""

    checks: Checks | None
    error: str


class Trusted:
    """The namespace of the trusted cells."""

    def __init__(self, worker: Worker, reserved: frozenset[str], hidden: bool) -> None:
        """reserved: the names that are never the student's, bound already or not."""
        self._worker, self._reserved, self._hidden = worker, reserved, hidden
        self.tested: list[Tested] = []
        self._names: dict[str, Any] = {"__name__": "__lab__"}

    def run(self, source: str) -> str:
        """Run a trusted cell; says what it raised, "" where it ended well."""
        tree = ast.parse(source)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        asked = sorted(names - self._reserved)
        for name in asked:
            self._names.pop(name, None)
        self._names.update(self._worker.values(asked))
        error = ""
        token = only_hidden.set(self._hidden)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                exec(compile(tree, "<trusted>", "exec"), self._names)
            except Exception as raised:  # noqa: BLE001  a test's is ChecksFailed; a given cell's, about the student's id
                error = f"{type(raised).__name__}: {raised}"
            finally:
                only_hidden.reset(token)
        return error

    def test(self, part: Part) -> None:
        """Run a test cell, and keep its checks."""
        self._names.pop("check", None)
        error = self.run(part.source)
        check = self._names.get("check")
        self.tested.append(Tested(check if type(check) is Checks else None, error))
