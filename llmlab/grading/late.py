"""What a late submission costs: a share of its score for each day that has begun."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from nbgrader.plugins import LateSubmissionPlugin
from nbgrader.utils import parse_utc
from traitlets import Float

DAY = 24 * 60 * 60
SHOWN = 40  # characters of a timestamp that is none


class PerDay(LateSubmissionPlugin):  # type: ignore[misc]  # nbgrader ships no types
    """A late penalty by the day; none unless ``percent_per_day`` is set. Days are counted from the end of the grace."""

    percent_per_day = Float(0.0, min=0, max=100, help="percent of the score that each begun day costs").tag(config=True)
    grace_minutes = Float(0.0, min=0, help="minutes after the due date that cost nothing").tag(config=True)
    most_percent = Float(100.0, min=0, max=100, help="percent of the score that lateness costs at most").tag(
        config=True
    )

    def late_submission_penalty(self, student_id: str, score: float, total_seconds_late: float) -> float | None:
        """The points that are taken off; None where there are none to take."""
        return penalty(score, total_seconds_late, self.percent_per_day, self.grace_minutes, self.most_percent) or None


def penalty(score: float, seconds_late: float, percent_per_day: float, grace_minutes: float, most: float) -> float:
    """``score`` times the share that so much lateness costs."""
    days = math.ceil(max(0.0, seconds_late - 60 * grace_minutes) / DAY)
    return round(score * min(days * percent_per_day, most) / 100, 6)


@dataclass(frozen=True)
class Lateness:
    """How late a submission came, the points that this takes off, and why its time is not known where it should be."""

    seconds: float = 0.0
    penalty: float = 0.0
    problem: str = ""

    def note(self) -> str:
        """What the instructor and the student read; "" of a submission in time."""
        if self.problem:
            return f"{self.problem}; no late penalty was applied"
        if not self.seconds:
            return ""
        cost = f"{self.penalty:g} points less" if self.penalty else "no penalty"
        return f"handed in {_span(self.seconds)} late: {cost}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_timestamp(text: str | None) -> tuple[datetime | None, str]:
    """The time that timestamp.txt says, in UTC, and what is wrong with it; None for no file, and where something is.

    It is read as nbgrader reads it, a date and a time, and a zone where it is not UTC; but a zone such as +0100, which
    nbgrader takes for seconds, is one.
    """
    if text is None:
        return None, ""
    if not text:
        return None, "timestamp.txt is empty"
    try:
        return parse_utc(re.sub(r" ([+-]\d\d:?\d\d)$", r"\1", text)), ""
    except (ValueError, OverflowError, TypeError):
        return None, f"timestamp.txt holds no time: {text[:SHOWN]!r}"


def _span(seconds: float) -> str:
    """A time with its two largest units; begun minutes count."""
    minutes = math.ceil(seconds / 60)
    days, hours, minutes = minutes // (24 * 60), minutes // 60 % 24, minutes % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min")]
    first = next(i for i, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count)
