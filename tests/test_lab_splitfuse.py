"""The lab on SplitFuse: the package answers no exercise."""

import pytest
from lab_runs import LABS, exercise_of, refuses

from llmlab.authoring.answers import read_answers
from llmlab.authoring.run import run_exercise
from llmlab.grading.checks import student_rng

LAB = LABS["splitfuse"]
SCORES = {  # of 17 points, for the example class
    "student-01": 17,
    "student-02": 0,
    "student-03": 6,
    "student-04": 7.5,
    "student-11": 17,
}


# How a step is filled, by the first step of whatever of the package fills one.
FILLS = """
def fill_budget(prompts, budget, most=None):
    from llmlab.batching import RooflineCost, policies, simulate
    from llmlab.batching.workload import make_requests
    from llmlab.kv_cache import BlockManager

    requests = make_requests([0.0] * len(prompts), [(n, 1) for n in prompts])
    kv = BlockManager(1000, 16, prefix_caching=False)
    (first, *_) = simulate(requests, policies.{policy}, RooflineCost(1, 1), kv).steps
    return [dict(first.tokens).get(i, 0) for i in range(len(prompts))]
"""


@pytest.mark.parametrize(
    "policy",
    ["SplitFuse(budget, most)", "PrefillFirst(budget)", "OrcaBatching(64, budget)", "StaticBatching(64, budget)"],
)
def test_no_policy_of_the_package_fills_a_step(policy):
    answer, given = FILLS.format(policy=policy), {}
    exec(answer, given)  # it would be an answer
    assert given["fill_budget"]([600, 100], 512) == [512, 0]
    refuses(LAB, "fill_budget", answer)


# The tail that is to be predicted, by the package's simulator.
BY_THE_SIMULATOR = """
from llmlab.batching import Request, RooflineCost, StepPlan, simulate
from llmlab.batching.metrics import percentile
from llmlab.kv_cache import BlockManager


class Mine:
    def __init__(self, whole):
        self.whole = whole

    def schedule(self, state):
        plan, left = StepPlan(), my_run["budget"]
        if not self.whole or not state.waiting:
            plan.decodes = state.with_slots(state.decoding(), plan)
            left -= len(plan.decodes)
        for request in state.in_context():
            left -= state.add_chunk(plan, request, left)
        while left > 0 and (request := state.admit()) is not None:
            left -= state.add_chunk(plan, request, request.num_prompt if self.whole else left)
        return plan


def tail_under(policy, prompts):
    cost = RooflineCost(my_run["floor"] / 1000, 1000 * my_run["rate"], fixed=my_run["fixed"] / 1000)
    requests = [Request(f"decode {i}", [1], my_run["outputs"]) for i in range(my_run["decodes"])]
    prompt = [1] * my_run["tokens of a prompt"]
    requests += [Request(f"prompt {i}", prompt, 1, 0.3 * (i + 1)) for i in range(prompts)]
    found = simulate(requests, policy, cost, BlockManager(10_000, 16, prefix_caching=False))
    return percentile([1000 * gap for record in found.requests.values() for gap in record.itl], 99)


predicted_saving, predicted_at_night = (
    tail_under(Mine(True), my_run[prompts]) - tail_under(Mine(False), my_run[prompts])
    for prompts in ("prompts", "prompts at night")
)
"""


def test_the_packages_simulator_predicts_no_tail():
    exercise, drawn, said = exercise_of(LAB, "predicted_saving"), {}, {}
    run_exercise(LAB, exercise, exercise.answer, "student-01", drawn.update)
    given = {"my_run": drawn["my_run"]}
    exec(BY_THE_SIMULATOR, given)  # it would be an answer
    for name in ("predicted_saving", "predicted_at_night"):
        assert given[name] == pytest.approx(drawn[name], rel=1e-6)
    assert run_exercise(LAB, exercise, BY_THE_SIMULATOR, "student-01", said.update).score == 0
    assert "answers this exercise" in str(said["answer_error"])


def test_every_students_runs_tell_mistakes_from_the_right_tails():
    """For many ids, each named wrong prediction misses one of the two by more than the band."""
    exercise, names = exercise_of(LAB, "predicted_saving"), {}
    run_exercise(LAB, exercise, exercise.answer, "student-01", names.update)
    wrong = {
        answer.name: compile(answer.source, answer.name, "exec") for answer in read_answers(LAB).wrong(exercise.name)
    }
    right_code = compile(exercise.answer, "the reference", "exec")
    for number in range(300):
        names["my_run"] = names["draw_run"](student_rng(f"student-{number:02d}", LAB.name))
        exec(right_code, names)
        right = names["predicted_saving"], names["predicted_at_night"]
        assert right[1] < 0 < right[0]
        for name, code in wrong.items():
            exec(code, names)
            pairs = zip((names["predicted_saving"], names["predicted_at_night"]), right, strict=True)
            assert any(abs(got / saving - 1) > 0.012 for got, saving in pairs), (number, name)
