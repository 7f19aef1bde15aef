"""What a late submission costs: a share of its score for each day that has begun."""

from __future__ import annotations

import math

from nbgrader.plugins import LateSubmissionPlugin
from traitlets import Float

DAY = 24 * 60 * 60


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
