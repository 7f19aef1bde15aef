"""What an instructor reads when a class has been graded: a row for each submission that is there."""

from __future__ import annotations

from typing import Any

from llmlab.grading.classroom import Plan, Tally
from llmlab.grading.results import summaries

TABLE_HEADER = ("student", "status", "score", "time", "notes")


def table_rows(plan: Plan, tally: Tally) -> list[tuple[str, ...]]:
    """Student, status, score of the tests, what it took and what is to be said of it, of every student with a result."""
    rows: list[tuple[str, ...]] = []
    for student, result in sorted(summaries(plan.log_file).items()):
        score = "" if result["score"] is None else f"{result['score']:g} of {result['max_score']:g}"
        late = [tally.late[student].note()] if student in tally.late else []
        notes = "; ".join(filter(None, [*late, *_notes(result)]))
        rows.append((student, result["status"], score, f"{result['seconds']:.1f} s", notes))
    return rows


def _notes(result: dict[str, Any]) -> list[str]:
    unsafe = ["graded without a sandbox"] if str(result["sandbox"]).startswith("NO SANDBOX") else []
    return [*unsafe, *([result["message"]] if result["message"] else []), *result["mended"]]
