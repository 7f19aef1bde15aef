"""The lab on batching: what its students draw, and that the package answers no exercise."""

import pytest
from lab_runs import LABS, cells_of, exercise_of, graded_in_worker

from llmlab.authoring.answers import read_answers
from llmlab.authoring.run import run_exercise
from llmlab.grading.checks import student_rng

LAB = LABS["batching"]
SCORES = {  # of 18 points, for the example class
    "student-01": 18,
    "student-02": 0,
    "student-03": 9,
    "student-04": 7,
    "student-11": 18,
}


# The drawn load's throughput, by the package's simulator; and the schedule, by the policy that an engine comes with.
BY_THE_SIMULATOR = """
lengths = [(r["prompt"], r["max_new_tokens"]) for r in my_load]
coming = make_requests([0.0] * len(lengths), lengths)
run = simulate(coming, Plugged(schedule, *my_limits), LinearCost(*my_cost), BlockManager(200, 16))
predicted_throughput = run.throughput
"""
BY_THE_ENGINES_POLICY = """
def schedule(pool, max_batch_size, num_slots):
    from llmlab.batching import Request, State

    policy = Engine(TINY, num_blocks=50, max_num_seqs=max_batch_size, max_length=256, graphs=False).policy
    state = State(BlockManager(num_slots, 1), max_batch_size)
    for r in sorted(pool, key=lambda r: (r["generated"] == 0, r["arrival"])):
        state.add(Request(r["id"], [r["id"]] * (r["prompt"] + r["generated"]), r["max_new_tokens"] - r["generated"]))
    return [r.request_id for r in policy.schedule(state).requests]
"""


def test_the_packages_simulator_predicts_no_throughput():
    exercise = exercise_of(LAB, "predicted_throughput")
    drawn, said = {}, {}
    run_exercise(LAB, exercise, exercise.answer, "student-01", drawn.update)
    given = dict(drawn)
    exec(BY_THE_SIMULATOR, given)  # it would be an answer
    assert given["predicted_throughput"] == pytest.approx(drawn["predicted_throughput"], rel=1e-9)
    answer = f"from llmlab.batching import simulate\n{BY_THE_SIMULATOR}"
    assert run_exercise(LAB, exercise, answer, "student-01", said.update).score == 0
    assert "answers this exercise" in str(said["answer_error"])


def test_the_engines_own_policy_reserves_nothing_and_is_no_answer():
    exercise = exercise_of(LAB, "schedule")
    outcomes = run_exercise(LAB, exercise, BY_THE_ENGINES_POLICY, "student-01").outcomes
    assert not next(o for o in outcomes if o.property.startswith("all that a request may come to")).passed
    assert sum(o.points for o in outcomes if o.passed) < exercise.points


@pytest.mark.sandbox
@pytest.mark.parametrize(
    "how",
    [
        "",  # the name that the given cell imports for a check
        "simulate = first['simulate']",
        "from llmlab.batching.simulate import simulate",
        "__name__ = 'llmlab.batching.simulate'\nfrom llmlab.batching.simulate import simulate",
    ],
)
def test_in_the_worker_the_package_simulates_no_requests(how):
    """As the lab's own cell imports it, or before that cell withholds it, or under the name of a module that may call it."""
    first = "from llmlab.batching import simulate\nfirst = dict(globals())"
    result = graded_in_worker(LAB, {"predicted_throughput": f"{how}\n{BY_THE_SIMULATOR}"}, first)
    cells = cells_of(result)
    assert "answers this exercise" in cells["predicted_throughput"]["error"]["message"]
    assert result["score"] == LAB.points - 2


def test_every_students_load_tells_mistakes_from_the_right_throughput():
    """For many ids, each named wrong prediction lies further off than the band, and the engine takes no more than seconds."""
    exercise = LAB.exercises[-1]
    names = {}
    run_exercise(LAB, exercise, exercise.answer, "student-01", names.update)
    wrong = {
        answer.name: compile(answer.source, answer.name, "exec") for answer in read_answers(LAB).wrong(exercise.name)
    }
    right_code = compile(exercise.answer, "the reference", "exec")
    for number in range(300):
        names["my_load"], names["my_limits"], names["my_cost"] = names["draw_load"](
            student_rng(f"student-{number:02d}", LAB.name)
        )
        exec(right_code, names)
        right = names["predicted_throughput"]
        assert sum(r["max_new_tokens"] for r in names["my_load"]) / right < 5
        for name, code in wrong.items():
            exec(code, names)
            assert abs(names["predicted_throughput"] / right - 1) > 0.006, (number, name)
