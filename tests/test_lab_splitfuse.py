"""The lab on SplitFuse: the package answers no exercise."""

import pytest
from lab_runs import LABS, refuses

LAB = LABS["splitfuse"]
SCORES = {  # of 17 points, for the example class
    "student-01": 17,
    "student-02": 0,
    "student-03": 6,
    "student-04": 7,
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
