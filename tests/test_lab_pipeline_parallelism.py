"""The lab on pipeline parallelism: the package answers no exercise."""

import pytest
from lab_runs import LABS, cells_of, exercise_of, graded_in_worker, ways_in

from llmlab.authoring.run import run_exercise

LAB = LABS["pipeline_parallelism"]
SCORES = {  # of 18 points, for the example class
    "student-01": 18,
    "student-02": 0,
    "student-03": 10,
    "student-04": 7.75,
    "student-11": 18,
}


# How long the drawn pipeline takes, by whatever of the package runs a schedule.
RUNS = """
from llmlab.parallel.schedules import Costs, Schedule, bubble_fraction, simulate

mine = Schedule("1f1b", my_p, my_m, 1, one_f_one_b_orders(my_p, my_m))
my_costs = Costs(my_forward, my_backward, 0, my_transfer)  # 0: the backward includes the weights' part


def by_a_run():
    return simulate(mine, my_costs).makespan


def by_its_bubble():
    return my_m * max(f + b for f, b in zip(my_forward, my_backward)) / (1 - bubble_fraction(mine, costs=my_costs))


"""


@pytest.mark.parametrize("way", ways_in(RUNS))
def test_no_way_through_the_package_to_the_makespan_is_open(way):
    exercise = exercise_of(LAB, "predicted_makespan")
    answer = f"{RUNS}predicted_makespan = float({way}())"
    drawn = {}
    run_exercise(LAB, exercise, exercise.answer, "student-01", drawn.update)
    given = {name: drawn[name] for name in drawn if name.startswith("my_") or name == "one_f_one_b_orders"}
    exec(answer, given)  # it would be an answer
    assert given["predicted_makespan"] == pytest.approx(drawn["predicted_makespan"], rel=1e-9)
    said = {}
    record = run_exercise(LAB, exercise, answer, "student-01", said.update)
    assert record.score == 0
    assert "answers this exercise" in str(said["answer_error"])


@pytest.mark.sandbox
@pytest.mark.parametrize(
    "how",
    [
        "simulate = first['simulate']",
        "from llmlab.parallel.schedules.simulate import simulate",
        "__name__ = 'llmlab.parallel.schedules.simulate'\nfrom llmlab.parallel.schedules.simulate import simulate",
    ],
)
def test_in_the_worker_the_package_runs_no_schedule(how):
    """Imported before the cell that withholds it, as it is, or under the name of a module that may call it."""
    first = "from llmlab.parallel.schedules.simulate import simulate\nfirst = dict(globals())"
    answer = f"{RUNS}{how}\npredicted_makespan = float(by_a_run())"
    result = graded_in_worker(LAB, {"predicted_makespan": answer}, first)
    cells = cells_of(result)
    assert "answers this exercise" in cells["predicted_makespan"]["error"]["message"]
    outcomes = cells["test_predicted_makespan"]["outcomes"]
    assert [o["property"] for o in outcomes if o["passed"]] == ["student_id (first code cell) is your own"]
    assert result["score"] == LAB.points - 2
