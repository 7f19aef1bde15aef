"""Late penalties: the arithmetic, and what comes into the gradebook."""

from datetime import timedelta

import pytest
from toy_course import DUE, GOOD, HALF, ToyCourse
from traitlets import TraitError

from llmlab.grading.late import DAY, Lateness, PerDay, penalty, read_timestamp
from llmlab.grading.report import table_rows

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


@pytest.mark.parametrize(
    ("text", "when", "problem"),
    [
        ("2026-01-15 13:00:00 +0100", DUE, ""),
        (None, None, ""),
        ("", None, "timestamp.txt is empty"),
        ("soon", None, "timestamp.txt holds no time: 'soon'"),
        ("2026-13-45 10:00:00 UTC", None, "timestamp.txt holds no time: '2026-13-45 10:00:00 UTC'"),
        ("9" * 60, None, f"timestamp.txt holds no time: {'9' * 40!r}"),
        ("0001-01-01 00:00:00 +2300", None, "timestamp.txt holds no time: '0001-01-01 00:00:00 +2300'"),
    ],
)
def test_a_timestamp_is_a_time_or_has_a_problem(text, when, problem):
    assert read_timestamp(text) == (when, problem)


def test_lateness_is_said_in_a_note():
    assert Lateness().note() == ""
    assert Lateness(61, 0).note() == "handed in 2 min late: no penalty"
    assert Lateness(DAY + 3600, 0.6).note() == "handed in 1 d 1 h late: 0.6 points less"
    assert Lateness(problem="no time").note() == "no time; no late penalty was applied"


@pytest.fixture(scope="module")
def late_class(tmp_path_factory, pytestconfig):
    """A class with a due date and a policy; each test hands in under ids of its own."""
    course = ToyCourse(tmp_path_factory.mktemp("late"), pytestconfig.rootpath, SETTINGS)
    with course.gradebook() as gradebook:
        gradebook.update_or_create_assignment("toy", duedate=DUE)
    return course


def stamp(course, student):
    return course.folder / "submitted" / student / "toy" / "timestamp.txt"


def feedback(course, student):
    return (course.folder / "feedback" / student / "toy" / "toy.html").read_text(encoding="utf-8")


def notes(course):
    """The run, and the notes of the table by student."""
    tally = course.grade()
    return tally, {row[0]: row[-1] for row in table_rows(course.plan, tally)}


def penalty_of(course, student):
    with course.gradebook() as gradebook:
        return gradebook.find_submission("toy", student).late_submission_penalty or 0


def test_a_time_that_is_none_is_named_and_costs_nobody_anything(late_class):
    for student in ("a-torn", "b-empty", "c-late"):
        late_class.submit(student, late_class.notebook(GOOD), timedelta(days=1))
    stamp(late_class, "a-torn").write_text("yesterday, I think")
    stamp(late_class, "b-empty").write_text("")
    tally, said = notes(late_class)
    assert (tally.graded, tally.failures) == (3, [])
    torn = "timestamp.txt holds no time: 'yesterday, I think'; no late penalty was applied"
    assert torn in said["a-torn"]
    assert torn.replace("'", "&#x27;") in feedback(late_class, "a-torn")
    assert "timestamp.txt is empty; no late penalty was applied" in said["b-empty"]
    assert "handed in 1 d late: 0.6 points less" in said["c-late"]
    assert "handed in 1 d late: 0.6 points less" in feedback(late_class, "c-late")
    assert [penalty_of(late_class, s) for s in ("a-torn", "b-empty", "c-late")] == pytest.approx([0, 0, 0.6])


def test_an_unchanged_submission_follows_its_time_the_due_date_and_the_policy(late_class):
    late_class.submit("moved", late_class.notebook(GOOD), timedelta(days=1))
    late_class.grade()
    page = late_class.folder / "feedback" / "moved" / "toy" / "toy.html"
    written = page.stat().st_mtime_ns

    def again(cost, note):
        tally, said = notes(late_class)
        assert (tally.graded, tally.failures) == (0, [])
        assert penalty_of(late_class, "moved") == pytest.approx(cost)
        assert note in said["moved"]
        assert note in feedback(late_class, "moved")

    again(0.6, "handed in 1 d late")
    assert page.stat().st_mtime_ns == written  # nothing had changed
    stamp(late_class, "moved").write_text(f"{DUE + timedelta(days=2)} UTC")
    again(1.2, "handed in 2 d late")
    with late_class.gradebook() as gradebook:
        gradebook.update_or_create_assignment("toy", duedate=DUE + timedelta(days=1))
    again(0.6, "handed in 1 d late")
    with (late_class.folder / "nbgrader_config.py").open("a") as config:
        config.write("c.PerDay.percent_per_day = 10\n")
    again(0.3, "0.3 points less")
    with late_class.gradebook() as gradebook:
        grade = gradebook.find_grade("test_double", "toy", "toy", "moved")
        grade.manual_score = 2
        gradebook.db.commit()
    again(0.2, "0.2 points less")
    stamp(late_class, "moved").unlink()
    tally, said = notes(late_class)
    assert (tally.graded, penalty_of(late_class, "moved")) == (0, 0)
    assert "late" not in said["moved"] + feedback(late_class, "moved")
    with late_class.gradebook() as gradebook:
        assert gradebook.find_submission("toy", "moved").timestamp is None
        gradebook.update_or_create_assignment("toy", duedate=DUE)


def test_what_cannot_be_written_costs_its_own_student_alone(late_class):
    late_class.submit("barred", late_class.notebook(GOOD))
    late_class.submit("student-99", late_class.notebook(GOOD))
    barrier = late_class.folder / "feedback" / "barred"
    barrier.parent.mkdir(exist_ok=True)
    barrier.write_text("a file where a folder must be")
    for graded in (1, 0):  # what is in the log is tried again
        tally = late_class.grade()
        assert (tally.graded, [failure.student for failure in tally.failures]) == (graded, ["barred"])
        assert "graded, and not brought into the gradebook" in tally.failures[0].reason
    barrier.unlink()
    assert late_class.grade().failures == []
    assert "3 of 3" in feedback(late_class, "barred")
