"""Late penalties: the arithmetic, and what comes into the gradebook."""

from datetime import timedelta

import pytest
from toy_course import DUE, GOOD, HALF, ToyCourse
from traitlets import TraitError

from llmlab.grading.late import DAY, PerDay, penalty

# nbgrader's own, where it makes a submission
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
SETTINGS = "c.PerDay.percent_per_day = 20\nc.PerDay.grace_minutes = 15\nc.PerDay.most_percent = 50"


@pytest.mark.parametrize(
    ("seconds", "days"),
    [(0, 0), (1, 1), (DAY, 1), (DAY + 1, 2), (2.5 * DAY, 3)],
)
def test_each_begun_day_costs_its_share(seconds, days):
    assert penalty(8, seconds, 10, 0, 100) == pytest.approx(0.8 * days)


@pytest.mark.parametrize(("seconds", "days"), [(900, 0), (901, 1), (DAY + 900, 1), (DAY + 901, 2)])
def test_days_are_counted_from_the_end_of_the_grace(seconds, days):
    assert penalty(10, seconds, 10, 15, 100) == days


def test_a_penalty_has_its_most_and_is_never_more_than_the_score():
    assert penalty(10, 100 * DAY, 10, 0, 30) == 3
    assert penalty(10, 100 * DAY, 10, 0, 100) == 10
    assert penalty(0, DAY, 10, 0, 100) == 0


def test_there_is_no_penalty_unless_it_is_set():
    assert PerDay().late_submission_penalty("student-01", 8.0, 100 * DAY) is None
    with pytest.raises(TraitError):
        PerDay(percent_per_day=-1)


LATENESS = {"in-time": -60, "in-grace": 900, "one-day": 901, "two-days": DAY + 901, "a-week": 7 * DAY}


@pytest.mark.parametrize("settings", ["", SETTINGS], ids=["default", "set"])
def test_the_gradebook_has_the_penalty(tmp_path, root, settings):
    course = ToyCourse(tmp_path, root, settings)
    with course.gradebook() as gradebook:
        gradebook.update_or_create_assignment("toy", duedate=DUE)
    for student, seconds in LATENESS.items():
        course.submit(student, course.notebook(GOOD), timedelta(seconds=seconds))
    course.submit("wrong-and-late", course.notebook(HALF), timedelta(days=1))
    assert course.grade().failures == []
    with course.gradebook() as gradebook:
        found = {s.student.id: s.late_submission_penalty for s in gradebook.assignment_submissions("toy")}
    if settings:
        week = {"in-time": 0, "in-grace": 0, "one-day": 0.6, "two-days": 1.2, "a-week": 1.5, "wrong-and-late": 0.2}
        assert {k: v or 0 for k, v in found.items()} == pytest.approx(week)
    else:
        assert not any(found.values())
