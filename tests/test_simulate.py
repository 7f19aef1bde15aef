"""The simulator against hand arithmetic and queueing theory, and what must hold of any run."""

import dataclasses
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.batching import FittedCost, LinearCost, Request, RooflineCost, StepPlan, simulate
from llmlab.batching.policies import OrcaBatching, PrefillFirst, SplitFuse, StaticBatching
from llmlab.batching.workload import make_requests, poisson_arrivals
from llmlab.kv_cache import BlockManager, ContiguousReservation

POLICIES = [StaticBatching(4, 16), OrcaBatching(4, 16), PrefillFirst(16), SplitFuse(16), SplitFuse(16, 5)]
# A comes at 0 with 10 tokens and wants 3, B comes at 0.5 with 5 and wants 2.
TWO = make_requests([0.0, 0.5], [(10, 3), (5, 2)])
COST = LinearCost(fixed=1.0, per_token=0.1)


class Recording:
    """A cost model that also keeps what it was asked."""

    def __init__(self, cost):
        self.cost, self.asked = cost, []

    def seconds(self, plan, kv_tokens):
        self.asked.append((plan.num_tokens, plan.padding, kv_tokens))
        return self.cost.seconds(plan, kv_tokens)


def test_two_requests_by_hand():
    """A's prompt takes 2.0 s; then one token of A and B's prompt 1.6 s; then one of each 1.2 s."""
    cost = Recording(COST)
    metrics = simulate(TWO, SplitFuse(100), cost, BlockManager(10, 16))
    a, b = metrics.requests[0], metrics.requests[1]
    assert a.times == pytest.approx([2.0, 3.6, 4.8])
    assert b.times == pytest.approx([3.6, 4.8])
    assert (a.ttft, b.ttft) == pytest.approx((2.0, 3.1))
    assert (a.itl, b.itl) == (pytest.approx([1.6, 1.2]), pytest.approx([1.2]))
    assert cost.asked == [(10, 0, 10), (6, 0, 11 + 5), (2, 0, 12 + 6)]
    assert metrics.throughput == pytest.approx(5 / 4.8)
    # A block has 16 slots: A uses 10, 11 and 12 of its own, B 5 and 6.
    assert metrics.kv_waste == pytest.approx((6 * 2.0 + 16 * 1.6 + 14 * 1.2) / (16 * 2.0 + 32 * 1.6 + 32 * 1.2))


def test_two_requests_by_hand_with_steps_launched_ahead():
    """The second step is put together at 0, before B comes; B's prompt goes into the third, which begins at 3.1 s."""
    metrics = simulate(TWO, SplitFuse(100), COST, BlockManager(10, 16), ahead=True)
    assert metrics.requests[0].times == pytest.approx([2.0, 3.1, 4.7])
    assert metrics.requests[1].times == pytest.approx([4.7, 5.8])
    assert [step.start for step in metrics.steps] == pytest.approx([0.0, 2.0, 3.1, 4.7])
    waste = 6 * 2.0 + 5 * 1.1 + (4 + 11) * 1.6 + 10 * 1.1
    assert metrics.kv_waste == pytest.approx(waste / (16 * 2.0 + 16 * 1.1 + 32 * 1.6 + 16 * 1.1))


def test_requests_come_when_they_arrive_whatever_their_order_in_the_list():
    in_order = simulate(TWO, SplitFuse(100), COST, BlockManager(10, 16)).summary()
    assert simulate(TWO[::-1], SplitFuse(100), COST, BlockManager(10, 16)).summary() == in_order


def test_the_timeline_shows_each_step():
    """Static batching: both prompts as if they had 10 tokens, then two tokens, then A's last beside B's empty row."""
    together = make_requests([1.0, 1.0], [(10, 3), (5, 2)])
    metrics = simulate(together, StaticBatching(2), COST, BlockManager(10, 16))
    assert [(s.tokens, s.padding) for s in metrics.steps] == [
        ([(0, 10), (1, 5)], 5), ([(0, 1), (1, 1)], 0), ([(0, 1)], 1),
    ]  # fmt: skip
    assert [s.start for s in metrics.steps] == pytest.approx([1.0, 4.0, 5.2])
    assert [s.seconds for s in metrics.steps] == pytest.approx([3.0, 1.2, 1.2])
    assert metrics.padding_fraction == pytest.approx(6 / 24)


def test_contiguous_reservation_wastes_what_it_reserves():
    """One request of 4 tokens in a region of 100 slots: 4 used for 1.4 s, 5 for 1.1 s."""
    metrics = simulate(make_requests([0.0], [(4, 2)]), OrcaBatching(1), COST, ContiguousReservation(200, 100))
    assert metrics.kv_waste == pytest.approx((96 * 1.4 + 95 * 1.1) / (100 * 2.5))


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_at_a_time_waits_as_queueing_theory_says(load):
    """M/D/1: Poisson arrivals, one server, a service of 1 s: the mean time to the only token is 1 + load / (2·(1 - load)).

    Source: the Pollaczek-Khinchine formula.
    """
    requests = make_requests(poisson_arrivals(load, 20_000, seed=3), [(1, 1)] * 20_000)
    metrics = simulate(requests, OrcaBatching(1), LinearCost(1.0), BlockManager(1, 16))
    assert metrics.summary()["ttft_mean_seconds"] == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_requests_given_are_not_changed(policy, ahead):
    """The same list serves several runs, also a list that an engine has worked on."""
    used = Request("used", [1, 2, 3, -7], 2)
    used.num_prompt, used.max_tokens, used.finish_reason = 3, 5, "length"
    requests = [*TWO, used]
    before = [dataclasses.asdict(r) for r in requests]
    runs = [simulate(requests, policy, COST, BlockManager(10, 16), ahead=ahead).summary() for _ in range(2)]
    assert [dataclasses.asdict(r) for r in requests] == before
    assert runs[0] == runs[1]
    assert runs[0]["output_tokens"] == 3 + 2 + 2
    assert simulate([used], policy, COST, BlockManager(10, 16)).requests["used"].num_prompt == 3


def test_a_request_larger_than_the_pool_is_refused_when_it_arrives_and_hangs_nobody():
    """20: 2 blocks of 4 have no place for the 9 tokens of "large"; those around it are served."""
    requests = [Request("a", [1] * 4, 2, 0.0), Request("large", [2] * 8, 2, 0.0), Request("b", [3] * 4, 2, 0.0)]
    for ahead in (False, True):
        metrics = simulate(requests, SplitFuse(16), COST, BlockManager(2, 4), ahead=ahead)
        reasons = {name: record.finish_reason for name, record in metrics.requests.items()}
        assert reasons["large"] == "refused: it may need 9 slots of the KV cache, which gives 8 to a request"
        assert (reasons["a"], reasons["b"]) == ("length", "length")
        assert metrics.requests["large"].times == []
    assert simulate(requests[1:2], SplitFuse(16), COST, BlockManager(2, 4)).summary()["requests_completed"] == 0


class Lazy:
    """A student's policy that computes prompts and forgets the tokens after them."""

    def schedule(self, state):
        plan = StepPlan()
        while request := state.admit():
            state.add_chunk(plan, request, request.remaining)
        return plan


@pytest.mark.parametrize("ahead", [False, True])
def test_a_policy_that_makes_no_progress_is_reported(ahead):
    with pytest.raises(RuntimeError, match=r"Lazy computes nothing, 0 request\(s\) wait, 2 run"):
        simulate(TWO, Lazy(), COST, BlockManager(10, 16), ahead=ahead)


class InFours:
    """A student's policy: it waits until four have come, then serves them to the end."""

    def __init__(self):
        self.inner = StaticBatching(4)

    def schedule(self, state):
        return self.inner.schedule(state) if state.running or len(state.waiting) == 4 else StepPlan()


def test_a_policy_may_wait_for_requests_that_are_still_to_come():
    """Nothing is computed before 3 s, when the fourth comes; a fifth would wait for ever, and is reported."""
    requests = make_requests([0.0, 1.0, 2.0, 3.0], [(4, 1)] * 4)
    metrics = simulate(requests, InFours(), COST, BlockManager(10, 16))
    assert [step.start for step in metrics.steps] == [3.0]
    assert metrics.requests[0].ttft == pytest.approx(3.0 + 1 + 1.6)
    with pytest.raises(RuntimeError, match=r"InFours computes nothing, 1 request\(s\) wait, 0 run"):
        simulate([*requests, Request(4, [1], 1, 9.0)], InFours(), COST, BlockManager(10, 16))


def test_made_prompts_share_nothing_and_real_ones_do():
    """Prefix caching hits on equal prompts only, and never on what a simulated request generates."""
    made = make_requests([0.0, 9.0, 18.0], [(12, 9)] * 3)
    metrics = simulate(made, SplitFuse(64), COST, BlockManager(30, 4))
    assert [record.cached_tokens for record in metrics.requests.values()] == [0, 0, 0]
    real = [Request(i, [1, 2, 3, 4, 5, 6, 7, 8, i], 9, 20.0 * i) for i in range(3)]
    metrics = simulate(real, SplitFuse(64), COST, BlockManager(30, 4))
    assert [record.cached_tokens for record in metrics.requests.values()] == [0, 8, 8]
    outputs = set()

    class Watching(SplitFuse):
        def schedule(self, state):
            outputs.update((r.request_id, token) for r in state.running for token in r.output)
            return super().schedule(state)

    simulate(made, Watching(64), COST, BlockManager(30, 4))
    tokens = [token for _, token in outputs]
    assert len(set(tokens)) == len(tokens) == 3 * 8  # the last of each is not seen before it ends
    assert max(tokens) < 0


def test_wrong_runs_are_named():
    with pytest.raises(ValueError, match="request_id: expected a new one, got 0 again"):
        simulate([*TWO, *TWO], SplitFuse(64), COST, BlockManager(30, 4))
    with pytest.raises(ValueError, match="seconds of the cost model"):
        simulate(TWO, SplitFuse(64), Recording(Backwards()), BlockManager(30, 4))
    with pytest.raises(TypeError, match="ahead"):
        simulate(TWO, SplitFuse(64), COST, BlockManager(30, 4), ahead=1)
    with pytest.raises(ValueError, match="max_num_seqs"):
        simulate(TWO, SplitFuse(64), COST, BlockManager(30, 4), max_num_seqs=0)


class Backwards:
    def seconds(self, plan, kv_tokens):
        return -1.0


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@given(seed=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_any_run_ends_with_a_timeline_that_fits(policy, ahead, seed):
    """20: everyone is served, steps follow each other, tokens come at their ends, and the cache is empty again."""
    draw = random.Random(seed)
    sizes = [(draw.randint(1, 20), draw.randint(1, 12)) for _ in range(draw.randint(1, 12))]
    requests = make_requests([draw.random() * 10 for _ in sizes], sizes)
    longest = max(prompt + output - 1 for prompt, output in sizes)
    size = draw.randint(1, 4)
    if draw.random() < 0.7:
        kv = BlockManager(-(-longest // size) + draw.randint(0, 4), size)
    else:
        kv = ContiguousReservation(longest + draw.randint(0, 30), longest)
    cost = LinearCost(draw.random(), 0.01 + draw.random() / 10, draw.random() / 1000)
    metrics = simulate(requests, policy, cost, kv, max_num_seqs=draw.randint(1, 6), ahead=ahead)
    kv.check()
    assert kv.num_used_blocks == 0
    ends = [step.start + step.seconds for step in metrics.steps]
    assert all(before <= after.start + 1e-9 for before, after in zip(ends, metrics.steps[1:], strict=False))
    computed = {r.request_id: 0 for r in requests}
    for step in metrics.steps:
        for request_id, count in step.tokens:
            computed[request_id] += count
            assert step.start >= metrics.requests[request_id].arrival
    for request, (prompt, output) in zip(requests, sizes, strict=True):
        record = metrics.requests[request.request_id]
        assert (record.finish_reason, len(record.times), record.num_prompt) == ("length", output, prompt)
        assert all(before < after for before, after in pairwise(record.times))
        assert set(record.times) <= set(ends)
        if not record.preemptions:
            assert computed[request.request_id] == prompt + output - 1
    assert 0 <= metrics.kv_waste < 1


# Cost models


def plan_of(decodes, chunks=(), padding=0):
    requests = make_requests([0.0] * (decodes + len(chunks)), [(99, 1)] * (decodes + len(chunks)))
    return StepPlan(requests[:decodes], list(zip(requests[decodes:], chunks, strict=True)), padding=padding)


def test_linear_cost():
    """1 + 0.1·(2 + 30 + 8) + 0.5·4 sequences + 0.001·500."""
    cost = LinearCost(1.0, per_token=0.1, per_kv_token=0.001, per_sequence=0.5)
    assert cost.seconds(plan_of(2, [10, 20], padding=8), 500) == pytest.approx(1 + 4 + 2 + 0.5)


def test_roofline_cost_is_flat_and_then_linear():
    """Up to 200 tokens the weights' 0.02 s; from there 10,000 tokens a second."""
    cost = RooflineCost(floor=0.02, rate=10_000, per_kv_token=1e-6, fixed=0.001)
    seconds = {tokens: cost.seconds(plan_of(0, [tokens]), 1000) - 0.002 for tokens in (1, 200, 300, 10_000)}
    assert seconds == {
        1: pytest.approx(0.02),
        200: pytest.approx(0.02),
        300: pytest.approx(0.03),
        10_000: pytest.approx(1),
    }
    assert cost.seconds(plan_of(0, [200], padding=100), 1000) == pytest.approx(0.032)
    rates = [tokens / cost.seconds(plan_of(0, [tokens]), 0) for tokens in range(10, 2000, 10)]
    gains = [after - before for before, after in pairwise(rates)]
    assert min(gains) > 0
    assert all(before >= after - 1e-9 for before, after in pairwise(gains)), "tokens a second are not concave"


@pytest.mark.parametrize(("tokens", "seconds"), [(1, 2.0), (10, 2.0), (15, 2.5), (20, 3.0), (40, 9.0), (50, 12.0)])
def test_fitted_cost_follows_its_points(tokens, seconds):
    """Through (10, 2), (20, 3) and (30, 6): flat before the first, 1 s for 10 tokens, 3 s for 10 from there on."""
    cost = FittedCost([(10, 2.0), (20, 3.0), (30, 6.0)], per_kv_token=0.01)
    assert cost.seconds(plan_of(0, [tokens]), 100) == pytest.approx(seconds + 1)
    assert cost.seconds(plan_of(0, [1], padding=tokens - 1), 100) == pytest.approx(seconds + 1)


def test_fitted_cost_with_one_point_is_constant():
    cost = FittedCost([(10, 2.0)])
    assert [cost.seconds(plan_of(0, [tokens]), 5) for tokens in (1, 10, 99)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LinearCost(-1.0), "fixed"),
        (lambda: LinearCost(1.0, per_sequence=-1.0), "per_sequence"),
        (lambda: LinearCost(1.0, per_kv_token=float("inf")), "per_kv_token"),
        (lambda: RooflineCost(1.0, 0.0), "rate"),
        (lambda: RooflineCost(-1.0, 1.0), "floor"),
        (lambda: FittedCost([]), "points: expected at least one"),
        (lambda: FittedCost([(0, 1.0)]), "tokens of a point"),
        (lambda: FittedCost([(1, 0.0)]), "seconds of a point"),
        (lambda: FittedCost([(2, 1.0), (1, 2.0)]), "points: expected more tokens"),
        (lambda: FittedCost([(1, 1.0), (1, 2.0)]), "points: expected more tokens"),
        (lambda: FittedCost([(1, 2.0), (2, 1.0)]), "points: expected more tokens"),
    ],
)
def test_wrong_costs_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
