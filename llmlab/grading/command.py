"""What ``llmlab grade`` and ``llmlab check`` do, without how they print it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmlab.grading.batch import Failure, Local, Scheduler
from llmlab.grading.classroom import (
    Plan,
    Rehearsal,
    Tally,
    grade_class,
    model_cache,
    rehearse,
)
from llmlab.grading.grade import UNGRADED, to_json
from llmlab.grading.gradebook import Course
from llmlab.grading.graded import record_of
from llmlab.grading.limits import limits_from_environment
from llmlab.grading.probe import probe, refusal
from llmlab.grading.sandbox import Level
from llmlab.grading.selfcheck import check_text
from llmlab.grading.submissions import MOST_NAMED


class NoSandbox(SystemExit):
    """Refusal to run others' work; exit code 3."""


class NothingToGrade(SystemExit):
    """There is no submission where one is looked for; exit code 4."""


def sandbox_level(unsandboxed: bool, course: Path | None = None) -> Level:
    """The level to grade the course in a folder at; warns of a weak one, exits with 3 where there is none, and says what mends it."""
    level, reason = refusal(unsandboxed, course)
    if level not in (Level.FULL, Level.NONE):
        print(f"llmlab: warning: a weaker sandbox than usual ({level.value})", file=sys.stderr)
    if reason:
        print(f"llmlab: {reason}\nTo run it with your own rights all the same: --unsandboxed", file=sys.stderr)
        raise NoSandbox(3)
    return level


def plan(course: Path, lab: str, level: Level, force: bool, gpu: bool = False) -> Plan:
    """The plan for a lab of the course in a folder. Raises ValueError for a folder that is no course."""
    if not (course / "nbgrader_config.py").exists():
        raise ValueError(
            f"{course.resolve()} has no nbgrader_config.py; run this in the repository's root, or say --course"
        )
    return Plan(Course.at(course), lab, level, limits_from_environment(), model_cache(), force=force, gpu=gpu)


def grade_with_progress(plan: Plan, jobs: int | None, scheduler: str | None, out: Console) -> Tally:
    """Grade the class, with a bar and an estimate of the time that is left. Raises ValueError for jobs below 1."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: expected a whole number of at least 1, got {jobs}")
    rehearsal = rehearse(plan)
    _say_if_reference_fails(rehearsal, plan, out)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out) as progress:
        task = progress.add_task(plan.assignment, total=len(plan.students()))
        return grade_class(plan, _scheduler(scheduler, jobs, rehearsal), lambda _: progress.advance(task))


def require_submissions(plan: Plan) -> None:
    """Exit with 4 where the lab has no submission at all, and say where one is looked for and what is there."""
    if plan.students():
        return
    home = plan.course.submitted
    names = sorted(entry.name for entry in home.iterdir()) if home.is_dir() else []
    there = f"has {len(names)} other entries" if names else "is empty" if home.is_dir() else "does not exist"
    lies = "".join(f"; {name}: {where}" for name, where in list(plan.misplaced().items())[:MOST_NAMED])
    place = home / "<student>" / plan.assignment / f"{plan.assignment}.ipynb"
    print(f"llmlab: nothing to grade: looked for {place}; {home} {there}{lies}", file=sys.stderr)
    raise NothingToGrade(4)


def grade_file(plan: Plan, notebook: Path, student: str) -> str:
    """The result of one file as JSON: nothing is written anywhere."""
    if not student:
        raise ValueError("student: --one needs --student, from which the hidden inputs are drawn")
    text = notebook.read_bytes().decode("utf-8", "surrogateescape")
    outcome = next(Local(1).run([plan.bundle(student, plan.instructor(), text)]))
    if isinstance(outcome, Failure):
        raise ValueError(outcome.reason)
    return to_json(outcome)


def check_file(notebook: Path) -> dict[str, Any]:
    """The result of a student's own notebook."""
    if not notebook.is_file():
        raise FileNotFoundError(f"no notebook {notebook}")
    found = probe()
    result = check_text(notebook.read_bytes().decode("utf-8", "surrogateescape"), found, limits_from_environment())
    return {**result, "student": "", "weaknesses": list(found.weaknesses)}


def check_lines(result: dict[str, Any]) -> list[str]:
    """What a student reads."""
    if result["status"] in UNGRADED:
        return [f"{result['status']}: {result['message']}"]
    lines, failed = [], 0
    for cell in result["cells"]:
        if cell["outcomes"] is not None:
            lines += ["", str(cell["grade_id"]).removeprefix("test_"), *record_of(cell).lines()]
        elif cell["error"] is not None:
            failed += 1
            told = f"{cell['error']['name']}: {cell['error']['message']}"
            lines += ["", f"the cell that begins with {first_line(cell['source'])!r} ended with {told}"]
    sandbox = "in a sandbox" if result["sandbox"] != Level.NONE.value else "without a sandbox, as it is your own code"
    all_points = sum(cell["points"] for cell in result["cells"])
    score = f"{result['score']:g} of {result['max_score']:g} points on the visible tests, run {sandbox}"
    rest = f"the lab has {all_points:g}: the others are earned on inputs that only the grader has"
    warning = [f"{failed} cell{'s' * (failed > 1)} outside the tests failed: see above"] if failed else []
    return [*lines, "", score, *([rest] if all_points > result["max_score"] else []), *warning]


def first_line(source: str) -> str:
    """What a cell is known by, as nobody counts them: its first line that is not empty, no longer than fits."""
    line = next((line.strip() for line in source.splitlines() if line.strip()), "")
    return line if len(line) <= 60 else f"{line[:57]}..."


def holds(result: dict[str, Any]) -> bool:
    """Whether every visible property holds."""
    cells = [cell for cell in result["cells"] if cell["outcomes"] is not None]
    return bool(cells) and all(outcome["passed"] for cell in cells for outcome in cell["outcomes"])


def _scheduler(address: str | None, jobs: int | None, rehearsal: Rehearsal) -> Scheduler:
    if address is None:
        return Local(jobs, rehearsal.modules)
    from llmlab.grading.cluster import Cluster

    return Cluster(address)


def _say_if_reference_fails(rehearsal: Rehearsal, plan: Plan, out: Console) -> None:
    if rehearsal.score != rehearsal.max_score:
        out.print(
            f"[yellow]The instructor's own answers earn {rehearsal.score:g} of {rehearsal.max_score:g} points in "
            f"{plan.assignment!r}.[/yellow] Look at the lab before you believe the scores."
        )
