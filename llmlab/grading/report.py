"""What an instructor reads when a class has been graded: a row for each submission that is there."""

from __future__ import annotations

from typing import Any

from llmlab.grading.classroom import Plan, Tally
from llmlab.grading.graded import is_unsafe
from llmlab.grading.markup import plain_text
from llmlab.grading.results import summaries
from llmlab.grading.submissions import MOST_NAMED

TABLE_HEADER = ("student", "status", "score", "time", "notes")


MOST_NOTES = 2  # about what was mended; of more the first is shown, and how many there are


def table_rows(plan: Plan, tally: Tally) -> list[tuple[str, ...]]:
    """Student, status, score of the tests, what it took and what is to be said of it, of every submission with a result."""
    results = summaries(plan.log_file)
    rows: list[tuple[str, ...]] = []
    for student in plan.students():
        if student in results:
            result = results[student]
            score = "" if result["score"] is None else f"{result['score']:g} of {result['max_score']:g}"
            late = tally.late[student].note() if student in tally.late else ""
            notes = "; ".join(filter(None, [late, *_notes(result)]))
            rows.append((student, result["status"], score, f"{result['seconds']:.1f} s", notes))
    return rows


def gone_line(plan: Plan) -> str:
    """Whose results the table leaves out because the submission is no longer there; "" where all are."""
    gone = sorted(summaries(plan.log_file).keys() - set(plan.students()))
    names = ", ".join(map(plain_text, gone[:MOST_NAMED])) + (" …" if len(gone) > MOST_NAMED else "")
    return f"left out, as the submission is no longer there: {names} ({len(gone)} in all)" if gone else ""


def _notes(result: dict[str, Any]) -> list[str]:
    unsafe = ["graded without a sandbox"] if is_unsafe(result) else []
    mended = result["mended"]
    if len(mended) > MOST_NOTES:
        mended = [f"{mended[0]} (and {len(mended) - 1} more notes, in the feedback)"]
    return [*unsafe, *([result["message"]] if result["message"] else []), *mended]
