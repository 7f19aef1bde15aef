"""Requests, the state and the policies: schedules by hand, and what must hold of any schedule (invariants 15 to 21)."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.batching import LinearCost, Request, State, StepPlan, simulate
from llmlab.batching.policies import OrcaBatching, PrefillFirst, SplitFuse, StaticBatching
from llmlab.batching.workload import AzureLengths, make_requests
from llmlab.kv_cache import BlockManager, ContiguousReservation


def next_token(token_ids):
    """A stand-in for a model: the next token depends on all tokens before it, and on nothing else."""
    return (sum(position * token for position, token in enumerate(token_ids, 1)) + len(token_ids)) % 5


def expected_output(prompt, max_new_tokens):
    known = list(prompt)
    for _ in range(max_new_tokens):
        known.append(next_token(known))
    return known[len(prompt) :]


class Server:
    """Drives a policy as an engine does, and looks at everything after each step. Arrivals are step numbers."""

    def __init__(self, requests, policy, kv, max_num_seqs=64, ahead=False, budget=10**9):
        self.coming = deque(sorted(requests, key=lambda r: r.arrival))
        self.requests, self.policy, self.kv, self.ahead, self.budget = requests, policy, kv, ahead, budget
        self.state = State(kv, max_num_seqs)
        self.launched = None  # a step under way: who gets a token, and the place of that token
        self.steps = 0
        self.schedule = []  # for each step: ({id: tokens computed}, padding)
        self.first_tokens = []  # ids in the order of their first tokens
        self.discarded = 0

    @property
    def has_work(self):
        return bool(self.coming or self.state.waiting or self.state.running or self.launched)

    def step(self):
        while self.coming and self.coming[0].arrival <= self.steps:
            assert self.state.add(self.coming.popleft())
        before = [(r, r.computed_tokens, r.preemptions, r.output) for r in self.state.running]
        plan = self.policy.schedule(self.state)
        self.look(plan, before)
        previous, self.launched = self.launched, None
        if plan:
            last_chunks = [r for r, count in plan.chunks if r.computed_tokens + count == len(r.token_ids)]
            yielding = self.state.launch(plan)
            assert yielding == plan.decodes + last_chunks, "each gives one token, and other chunks give none"
            self.launched = (yielding, [r.num_tokens - 1 for r in yielding])
            work = {r.request_id: 1 for r in plan.decodes} | {r.request_id: n for r, n in plan.chunks}
            self.schedule.append((work, plan.padding))
        elif previous is None:
            assert self.coming, "nothing is computed, and nothing is to come"
        if not self.ahead:
            previous, self.launched = self.launched, None
        if previous:
            self.commit(*previous)
        self.kv.check()
        size = self.kv.block_size
        for r in self.state.running:
            known = min(r.computed_tokens, max(r.context, len(r.token_ids)))
            told = self.kv.num_tokens(r.request_id)  # of full blocks it learns when one is looked up
            assert min(r.computed_tokens, r.context) <= told <= known, "the cache knows other tokens"
            blocks = len(self.kv.block_table(r.request_id))
            assert blocks == -(-r.computed_tokens // size), "a block is held before its first token is computed"
            assert r.slots == blocks * size
        self.steps += 1

    def look(self, plan, before):
        state, running = self.state, self.state.running
        assert plan.num_tokens <= self.budget
        assert len(plan.requests) <= len(running) <= state.max_num_seqs
        assert len(set(plan.requests)) == len(plan.requests), "a request is in a step twice"
        for r, computed, preemptions, output in before:
            assert r.computed_tokens >= computed or r.preemptions > preemptions
            assert r.output == output, "scheduling touched an output"
        stayed = [r for r, *_ in before if r not in plan.preempted]
        assert stayed == running[: len(stayed)], "running requests changed places"
        if plan.preempted:
            assert plan.preempted == [r for r, *_ in reversed(before)][: len(plan.preempted)], "not the youngest"
            assert list(state.waiting)[: len(plan.preempted)] == plan.preempted[::-1], "not in front of the queue"
            assert running == stayed, "admitted beside a preemption"
        in_order = [*running, *state.waiting]
        assert in_order == sorted(in_order, key=self.requests.index), "somebody was overtaken in the queue"

    def commit(self, yielding, places):
        live = [r for r in yielding if not r.finish_reason]
        self.discarded += len(yielding) - len(live)
        tokens = [next_token(r.token_ids) for r in yielding]
        for r, place in zip(yielding, places, strict=True):
            assert r.finish_reason or len(r.token_ids) == place, "a token in the wrong place"
            if not r.finish_reason and not r.output:
                self.first_tokens.append(r.request_id)
        assert self.state.commit(yielding, tokens) == live

    def run(self):
        most = sum(r.arrival + r.num_prompt + 2 * r.max_new_tokens for r in self.requests)
        while self.has_work:
            self.step()
            assert self.steps <= 20 * most + 20, "it does not end"
        return self


def requests_of(*sizes, arrivals=None):
    """Requests "A", "B", … with (prompt, output) sizes and prompts that have nothing in common."""
    return [
        Request(chr(65 + i), [100 * i + 1] * prompt, output, arrivals[i] if arrivals else 0)
        for i, (prompt, output) in enumerate(sizes)
    ]


def schedule_of(policy, *sizes, arrivals=None, **options):
    requests = requests_of(*sizes, arrivals=arrivals)
    server = Server(requests, policy, BlockManager(100, 4), **options).run()
    assert all(r.finish_reason == "length" and len(r.output) == r.max_new_tokens for r in requests)
    return server.schedule


# Schedules by hand


def test_splitfuse_splits_and_fuses():
    """16: budget 1024, at most 400 tokens of a prompt: 400/400/224, then 400/400/224, then 1/1/352."""
    server = Server(requests_of(*[(800, 2)] * 3), SplitFuse(1024, 400), BlockManager(200, 16))
    for _ in range(3):
        server.step()
    assert [list(work.items()) for work, _ in server.schedule] == [
        [("A", 400), ("B", 400), ("C", 224)],
        [("A", 400), ("B", 400), ("C", 224)],
        [("A", 1), ("B", 1), ("C", 352)],
    ]
    server.run()
    assert server.schedule[3:] == [({"C": 1}, 0)]


THREE = ((4, 3), (7, 2), (2, 2))  # prompt and output of A, B and C; a step holds 8 tokens


@pytest.mark.parametrize(
    ("policy", "by_hand"),
    [
        (
            StaticBatching(2, 8),  # C's batch begins when the last of the first batch has ended
            [{"A": 4, "B": 4}, {"B": 3}, {"A": 1, "B": 1}, {"A": 1}, {"C": 2}, {"C": 1}],
        ),
        (
            OrcaBatching(2, 8),  # B is not cut to fill the first step; C has to wait for one of the two places
            [{"A": 4}, {"A": 1, "B": 7}, {"A": 1, "B": 1}, {"C": 2}, {"C": 1}],
        ),
        (
            OrcaBatching(3, 8),
            [{"A": 4}, {"A": 1, "B": 7}, {"A": 1, "B": 1, "C": 2}, {"C": 1}],
        ),
        (
            PrefillFirst(8),  # A waits for B and C before its second token
            [{"A": 4}, {"B": 7}, {"C": 2}, {"A": 1, "B": 1, "C": 1}, {"A": 1}],
        ),
        (
            SplitFuse(8),
            [{"A": 4, "B": 4}, {"A": 1, "B": 3, "C": 2}, {"A": 1, "B": 1, "C": 1}],
        ),
        (
            SplitFuse(8, 3),  # C overtakes: its prompt is shorter than a chunk
            [{"A": 3, "B": 3, "C": 2}, {"C": 1, "A": 1, "B": 3}, {"A": 1, "B": 1}, {"A": 1, "B": 1}],
        ),
    ],
)
def test_three_requests_step_by_step(policy, by_hand):
    assert [work for work, _ in schedule_of(policy, *THREE)] == by_hand


def test_static_batching_pads():
    """A's prompt of 2 is computed as if it had 5 tokens, and its one output token as if it had four."""
    padding = [padding for _, padding in schedule_of(StaticBatching(2, 100), (2, 1), (5, 4))]
    assert padding == [3, 1, 1, 1]
    split = schedule_of(StaticBatching(3, 4), (2, 1), (5, 2), (1, 1))
    assert split == [
        ({"A": 2, "B": 2}, 3), ({"B": 3, "C": 1}, 4), ({"B": 1}, 2),
    ]  # fmt: skip
    # B's prompt is cut; what it is padded by counts once, with its last chunk.
    assert schedule_of(StaticBatching(2, 6), (5, 1), (3, 1)) == [({"A": 5, "B": 1}, 0), ({"B": 2}, 2)]


def test_static_batching_makes_the_others_wait_for_the_longest():
    """B's place is empty from the second step on, and C, there from the start, gets it after A's last token."""
    schedule = [work for work, _ in schedule_of(StaticBatching(2), (1, 5), (1, 1), (1, 1))]
    assert schedule == [{"A": 1, "B": 1}, {"A": 1}, {"A": 1}, {"A": 1}, {"A": 1}, {"C": 1}]


def test_orca_replaces_a_finished_request_in_the_very_next_step():
    schedule = [work for work, _ in schedule_of(OrcaBatching(2), (1, 5), (1, 1), (1, 1))]
    assert schedule == [{"A": 1, "B": 1}, {"A": 1, "C": 1}, {"A": 1}, {"A": 1}, {"A": 1}]


def test_a_step_launched_ahead_does_not_see_who_has_ended():
    """B's only token is on its way when the second step is put together: C gets the place one step later than above."""
    schedule = [work for work, _ in schedule_of(OrcaBatching(2), (1, 5), (1, 1), (1, 1), ahead=True)]
    assert schedule == [{"A": 1, "B": 1}, {"A": 1}, {"A": 1, "C": 1}, {"A": 1}, {"A": 1}]


def test_orca_cuts_a_prompt_that_no_step_beside_the_decodes_could_hold():
    """B needs 8 of 8 tokens while A decodes: waiting for an empty step would be waiting for A to end."""
    schedule = [work for work, _ in schedule_of(OrcaBatching(2, 8), (1, 4), (8, 1), arrivals=[0, 1])]
    assert schedule == [{"A": 1}, {"A": 1, "B": 7}, {"A": 1, "B": 1}, {"A": 1}]


def test_prefill_first_stalls_decodes_while_prompts_wait():
    """A new prompt comes with every step: A gets its second token when no more come."""
    schedule = [work for work, _ in schedule_of(PrefillFirst(8), (2, 3), (5, 1), (5, 1), (5, 1), arrivals=[0, 1, 2, 3])]
    assert schedule == [{"A": 2}, {"B": 5}, {"C": 5}, {"D": 5}, {"A": 1}, {"A": 1}]
    fused = [work for work, _ in schedule_of(SplitFuse(8), (2, 3), (5, 1), (5, 1), (5, 1), arrivals=[0, 1, 2, 3])]
    assert fused == [{"A": 2}, {"A": 1, "B": 5}, {"A": 1, "C": 5}, {"D": 5}]


def test_splitfuse_schedules_decodes_first():
    """15: A and B decode in a step that their tokens fill; C's prompt gets what is left, and nothing here."""
    schedule = [work for work, _ in schedule_of(SplitFuse(2), (1, 3), (1, 3), (2, 1), arrivals=[0, 0, 1])]
    assert schedule == [{"A": 1, "B": 1}, {"A": 1, "B": 1}, {"A": 1, "B": 1}, {"C": 2}]
    server = Server(requests_of((1, 9), (8, 1), arrivals=[0, 1]), SplitFuse(4), BlockManager(9, 4)).run()
    assert [list(work.items()) for work, _ in server.schedule[1:4]] == [[("A", 1), ("B", 3)]] * 2 + [
        [("A", 1), ("B", 2)]
    ]


def test_preemption_by_hand():
    """19: the youngest goes, waits in front of C, keeps its two tokens, and is computed again with them.

    Four blocks of 2: A takes one and B two. In the second step A takes the last. In the third B wants another, and is
    the youngest itself; C would fit into what it frees, but is not admitted.
    """
    requests = requests_of((2, 5), (3, 5), (1, 1), arrivals=[0, 0, 2])
    server = Server(requests, SplitFuse(16), BlockManager(4, 2, prefix_caching=False))
    server.step()
    server.step()
    b, kept = requests[1], requests[1].output
    assert (len(kept), b.preemptions, b.is_running) == (2, 0, True)
    server.step()
    assert (b.output, b.preemptions, b.is_running, b.computed_tokens, b.slots) == (kept, 1, False, 0, 0)
    assert [r.request_id for r in server.state.waiting] == ["B", "C"]
    server.run()
    assert [work for work, _ in server.schedule] == [
        {"A": 2, "B": 3}, {"A": 1, "B": 1}, {"A": 1}, {"A": 1}, {"A": 1}, {"B": 5, "C": 1}, {"B": 1}, {"B": 1},
    ]  # fmt: skip
    assert b.output == expected_output([101] * 3, 5)
    assert b.output[:2] == kept


@pytest.mark.parametrize("policy", [SplitFuse(16), OrcaBatching(4, 16)], ids=repr)
def test_nobody_is_admitted_beside_a_preemption(policy):
    """19: B loses its two blocks to A, and could come back at once: A's prompt is the same, and holds two of its three.

    Both prompts are computed in the first step, so neither finds the other's blocks then.
    """
    requests = [Request("A", [1] * 4, 3), Request("B", [1] * 4, 3)]
    server = Server(requests, policy, BlockManager(4, 2)).run()
    assert [work for work, _ in server.schedule] == [{"A": 4, "B": 4}, {"A": 1}, {"A": 1, "B": 1}, {"B": 1}]
    assert [r.preemptions for r in requests] == [0, 1]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_next_turn_of_a_conversation_finds_the_last_one(ahead):
    """What was generated is hashed with the tokens that were sampled, known late or not: 11 of A's 12 were computed."""
    a = Request("A", [1, 2, 3], 9)
    kv = BlockManager(20, 2)
    Server([a], SplitFuse(16), kv, ahead=ahead).run()
    b = Request("B", [*a.token_ids, 7], 1)
    Server([b], SplitFuse(16), kv, ahead=ahead).run()
    assert b.cached_tokens == 10


# Any schedule

BLOCK_SIZES = st.integers(1, 4)


@st.composite
def servers(draw, policies=("static", "orca", "prefill_first", "splitfuse", "chunked")):
    """A random workload that the pool can hold, one request at a time if need be, before any policy."""
    sizes = st.tuples(st.integers(1, 12), st.integers(1, 10), st.integers(0, 6))
    drawn = sorted(draw(st.lists(sizes, min_size=1, max_size=8)), key=lambda size: size[2])
    # Of two kinds of token only, so that prompts have prefixes in common.
    prompts = [draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for n, _, _ in drawn]
    requests = [
        Request(i, prompt, output, arrival)
        for i, (prompt, (_, output, arrival)) in enumerate(zip(prompts, drawn, strict=True))
    ]
    longest = max(r.max_tokens - 1 for r in requests)
    if draw(st.sampled_from([True, True, True, False])):
        size = draw(BLOCK_SIZES)
        kv = BlockManager(-(-longest // size) + draw(st.integers(0, 4)), size, prefix_caching=draw(st.booleans()))
    else:
        kv = ContiguousReservation(longest * draw(st.integers(1, 3)) + draw(st.integers(0, 5)), longest)
    budget = draw(st.integers(1, 16))
    policy = {
        "static": StaticBatching(draw(st.integers(1, 4)), budget),
        "orca": OrcaBatching(draw(st.integers(1, 4)), budget),
        "prefill_first": PrefillFirst(budget),
        "splitfuse": SplitFuse(budget),
        "chunked": SplitFuse(budget, draw(st.integers(1, 5))),
    }[draw(st.sampled_from(policies))]
    return Server(requests, policy, kv, draw(st.sampled_from([6, 3, 2, 1])), draw(st.booleans()), budget)


def assert_all_is_free(server):
    server.kv.check()
    assert server.kv.num_free_blocks == server.kv.num_blocks
    assert not server.state.running
    assert not server.state.waiting


@given(servers())
@settings(max_examples=500, deadline=None)
def test_any_workload_ends_as_if_each_request_were_alone(server):
    """15, 17, 19, 20: all finish with the tokens they would get alone, whatever the policy, the pool and the order.

    ``Server`` looks at each step: the budget, the sequences, one token a request, computed tokens that only grow,
    the youngest preempted to the front of the queue with nobody admitted, blocks and counts that agree.
    """
    prompts = [list(r.token_ids) for r in server.requests]
    server.run()
    for r, prompt in zip(server.requests, prompts, strict=True):
        assert r.finish_reason == "length"
        assert r.token_ids == prompt + expected_output(prompt, r.max_new_tokens)
        assert (r.slots, r.in_flight, r.is_running) == (0, 0, False)
    assert server.discarded == 0
    assert_all_is_free(server)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    "policy",
    [StaticBatching(16, 64), OrcaBatching(16, 64), PrefillFirst(64), SplitFuse(64), SplitFuse(64, 7)],
    ids=repr,
)
def test_many_preemptions_change_no_token(policy, ahead):
    """19: forty requests in a pool that holds little more than one at its longest; each is computed as if alone."""
    draw = random.Random(7)
    prompts = [[draw.randrange(5) for _ in range(draw.randint(1, 40))] for _ in range(40)]
    requests = [Request(i, prompt, draw.randint(1, 60), i // 4) for i, prompt in enumerate(prompts)]
    server = Server(requests, policy, BlockManager(30, 4), ahead=ahead, budget=64).run()
    assert [r.output for r in requests] == [
        expected_output(r.token_ids[: r.num_prompt], r.max_new_tokens) for r in requests
    ]
    assert sum(r.preemptions for r in requests) >= 10
    assert_all_is_free(server)


@given(servers(policies=("static", "orca", "prefill_first", "splitfuse")))
@settings(max_examples=200, deadline=None)
def test_first_tokens_come_in_order_of_arrival(server):
    """18: for every policy but SplitFuse with a largest chunk, which lets a short prompt overtake a long one."""
    server.run()
    assert server.first_tokens == [r.request_id for r in server.requests]


def test_a_largest_chunk_lets_a_short_prompt_overtake():
    """18 does not hold here, on purpose: B's only chunk fits beside A's first."""
    server = Server(requests_of((6, 1), (2, 1)), SplitFuse(8, 3), BlockManager(10, 4)).run()
    assert server.first_tokens == ["B", "A"]


@given(servers(), st.data())
@settings(max_examples=300, deadline=None)
def test_ended_requests_are_freed_at_once(server, data):
    """21: aborted or stopped while waiting, running, in mid-prompt or under way: freed then, at most one token discarded."""
    ended = 0
    while server.has_work:
        server.step()
        alive = [*server.state.running, *server.state.waiting]
        for r in data.draw(st.lists(st.sampled_from(alive), unique_by=id, max_size=2)) if alive else ():
            output, used, slots = r.output, server.kv.num_used_blocks, r.slots
            server.state.finish(r, "aborted")
            server.kv.check()
            assert r not in server.state.running
            assert r not in server.state.waiting
            assert (r.finish_reason, r.output, r.slots, r.is_running) == ("aborted", output, 0, False)
            assert slots == 0 or server.kv.num_used_blocks <= used
            with pytest.raises(KeyError):
                server.kv.num_tokens(r.request_id)
            ended += 1
        assert server.steps < 1000
    assert server.discarded <= ended if server.ahead else server.discarded == 0
    assert_all_is_free(server)
    for r in server.requests:
        assert r.finish_reason in ("length", "aborted")
        assert r.output == expected_output(r.token_ids[: r.num_prompt], len(r.output))


# Ends, one by one


@pytest.mark.parametrize("ahead", [False, True])
def test_abort_while_waiting_running_and_in_mid_prompt(ahead):
    """21: what each of them held is free in the same step, and the others go on."""
    requests = requests_of((4, 9), (12, 9), (4, 9), (4, 2))
    server = Server(requests, SplitFuse(8), BlockManager(40, 4), ahead=ahead)
    server.step()
    server.step()
    a, b, c, d = requests
    assert (a.is_running, a.computed_tokens, b.computed_tokens, c.is_running) == (True, 5, 11, False)
    for request, blocks in ((b, 3), (c, 0), (a, 2)):
        used = server.kv.num_used_blocks
        server.state.finish(request, "aborted")
        assert server.kv.num_used_blocks == used - blocks
    server.run()
    assert (a.output, b.output, c.output) == (expected_output([1] * 4, len(a.output)), [], [])
    assert d.output == expected_output([301] * 4, 2)
    assert server.discarded == (1 if ahead else 0)  # A's token of the step that was under way
    assert_all_is_free(server)


def test_a_request_that_stops_by_itself_leaves_one_token_behind():
    """21: the host learns of A's end when the next step is launched already; that step's token of A is thrown away."""
    requests = requests_of((4, 9), (4, 3))
    server = Server(requests, SplitFuse(16), BlockManager(40, 4), ahead=True)
    server.step()
    server.step()
    a, b = requests
    assert (len(a.output), a.in_flight) == (1, 1)
    server.state.finish(a, "stop")
    assert server.kv.num_used_blocks == 2  # B's
    server.run()
    assert (a.finish_reason, len(a.output), server.discarded) == ("stop", 1, 1)
    assert b.output == expected_output([101] * 4, 3)


def test_ending_twice_or_elsewhere_is_an_error():
    server = Server(requests_of((1, 1), (1, 5)), SplitFuse(4), BlockManager(4, 4))
    server.step()
    done, stranger = server.requests[0], Request("X", [1], 1)
    with pytest.raises(ValueError, match="'A' has ended already: length"):
        server.state.finish(done, "aborted")
    with pytest.raises(ValueError, match="'X' neither runs nor waits"):
        server.state.finish(stranger, "aborted")
    assert (done.finish_reason, stranger.finish_reason) == ("length", "")


# The state's books


def test_a_request_larger_than_the_pool_is_refused_at_once():
    """20: the largest that fits has a slot for every token but its last; one more is refused, with numbers."""
    state = State(BlockManager(3, 4), 8)
    fits, large = Request("fits", [1] * 8, 5), Request("large", [1] * 8, 6)
    assert state.add(fits)
    assert not state.add(large)
    assert large.finish_reason == "refused: it may need 13 slots of the KV cache, which gives 12 to a request"
    assert list(state.waiting) == [fits]
    server = Server([fits], SplitFuse(4), state.kv).run()
    assert len(fits.output) == 5
    assert_all_is_free(server)
    assert not State(ContiguousReservation(100, 12), 8).add(Request("large", [1] * 8, 6))


def test_a_refused_prompt_is_looked_up_again_when_blocks_are_freed_and_not_before(monkeypatch):
    """Hashing a long prompt in every step, to find again that there is no room, would cost more than the scheduling."""
    asked = []
    can_allocate = BlockManager.can_allocate

    def counted(self, token_ids, owed):
        asked.append(len(token_ids))
        return can_allocate(self, token_ids, owed)

    monkeypatch.setattr(BlockManager, "can_allocate", counted)
    requests = requests_of((4, 6), (9, 1))
    server = Server(requests, SplitFuse(16), BlockManager(3, 4)).run()
    assert asked == [4, 9, 9]
    assert server.schedule[6] == ({"B": 9}, 0)


class ByHand:
    """A policy that does what a test says."""

    def __init__(self, *plans):
        self.plans = deque(plans)

    def schedule(self, state):
        return self.plans.popleft()(state)


def admit_all(state):
    plan = StepPlan()
    while request := state.admit():
        state.add_chunk(plan, request, request.remaining)
    return plan


def decoding_state(*sizes, kv=None):
    state = State(kv or BlockManager(20, 4), 8)
    for request in requests_of(*sizes):
        state.add(request)
    yielding = state.launch(admit_all(state))
    state.commit(yielding, [next_token(r.token_ids) for r in yielding])
    return state


def no_slot(state):
    return StepPlan(decodes=state.decoding())


def twice(state):
    plan = StepPlan()
    return StepPlan(decodes=state.with_slots(state.decoding(), plan) * 2)


def chunk_of_a_decode(state):
    return StepPlan(chunks=[(state.running[0], 1)])


def chunk_of_nothing(state):
    return StepPlan(chunks=[(state.running[0], 0)])


def not_admitted(state):
    state.add(Request("W", [1] * 4, 2))
    return StepPlan(chunks=[(state.waiting[0], 4)])


def not_admitted_again(state):
    """B was preempted: it has a context, and no blocks."""
    return StepPlan(chunks=[(state.preempt(), 4)])


def too_long(state):
    state.add(Request("W", [1] * 4, 2))
    plan = StepPlan()
    assert state.add_chunk(plan, state.admit(), 5) == 4
    return StepPlan(chunks=[(state.running[-1], 5)])


def chunk_without_blocks(state):
    state.add(Request("W", [1] * 4, 2))
    return StepPlan(chunks=[(state.admit(), 4)])


def more_than_the_chunk_that_has_blocks(state):
    state.add(Request("W", [1] * 9, 2))
    plan = StepPlan()
    assert state.add_chunk(plan, state.admit(), 4) == 4
    return StepPlan(chunks=[(state.running[-1], 5)])


def prompt_as_decode(state):
    state.add(Request("W", [1] * 4, 2))
    state.admit()
    return StepPlan(decodes=[state.running[-1]])


def past_its_end(state):
    """The last token of A is on its way: there is none after it."""
    plan = StepPlan()
    plan.decodes = state.with_slots(state.decoding(), plan)
    state.launch(plan)
    again = StepPlan()
    again.decodes = state.with_slots([state.running[0]], again)
    return again


def finished(state):
    request = state.running[0]
    plan = StepPlan()
    state.with_slots(state.decoding(), plan)
    state.finish(request, "aborted")
    return StepPlan(decodes=[request])


@pytest.mark.parametrize(
    "wrong",
    [
        no_slot,
        twice,
        chunk_of_a_decode,
        chunk_of_nothing,
        not_admitted_again,
        not_admitted,
        too_long,
        chunk_without_blocks,
        more_than_the_chunk_that_has_blocks,
        prompt_as_decode,
        past_its_end,
        finished,
    ],
)
def test_a_plan_that_computes_what_is_not_there_is_refused(wrong):
    """A student's policy cannot lose a request or a block without being told whose, and why."""
    state = decoding_state((4, 2), (4, 2))
    plan = wrong(state)
    with pytest.raises(ValueError, match=r"request '[ABW]'"):
        state.launch(plan)


def test_a_slot_that_a_policy_asked_for_and_left_is_kept():
    """B's slot of the first step serves its token in the second; the other decodes first, one a step."""
    state = decoding_state((4, 3), (4, 3))
    a, b = state.running
    for turn in (a, b, b, a):
        plan = StepPlan()
        assert state.with_slots(state.decoding(), plan)[:2]
        plan.decodes = [turn]
        state.launch(plan)
        state.commit([turn], [next_token(turn.token_ids)])
        state.kv.check()
    assert a.output == expected_output([1] * 4, 3)
    assert b.output == expected_output([101] * 4, 3)
    assert state.kv.num_used_blocks == 0


@pytest.mark.parametrize("num_blocks", [3, 4])
def test_slots_in_another_order_than_the_requests_came(num_blocks):
    """A policy may rank its decodes. For want of blocks the youngest still goes, though it is first in the list.

    Three blocks of 2 hold A's 4 and B's 2 tokens; each of them wants another block. A fourth goes to B before it leaves.
    """
    state = decoding_state((4, 3), (2, 3), kv=BlockManager(num_blocks, 2))
    a, b = state.running
    plan = StepPlan()
    plan.decodes = state.with_slots([b, a], plan)
    assert (plan.decodes, plan.preempted, list(state.waiting), state.running) == ([a], [b], [b], [a])
    assert len(state.kv.block_table("A")) == 3
    assert state.launch(plan) == [a]
    assert state.kv.num_tokens("A") == 4  # the fifth begins a block, which is told of when it is full
    state.kv.check()


def test_a_chunk_whose_request_was_preempted_afterwards_is_dropped():
    """A policy that plans prompts first may lose one of them to the decodes' slots."""
    state = decoding_state((4, 3), kv=BlockManager(3, 2))
    state.add(Request("W", [1] * 2, 1))
    plan = StepPlan()
    assert state.add_chunk(plan, state.admit(), 2) == 2
    plan.decodes = state.with_slots(state.decoding(), plan)
    assert [r.request_id for r in plan.preempted] == ["W"]
    assert [r.request_id for r in state.launch(plan)] == ["A"]
    assert plan.chunks == []
    state.kv.check()


def test_nobody_else_takes_the_place_of_a_preempted_request_whose_token_is_on_its_way():
    """Its tokens are not all known, so it cannot be admitted; those behind it do not overtake it."""
    state = decoding_state((2, 5), (2, 5), kv=BlockManager(4, 2))
    _, b = state.running
    plan = StepPlan()
    plan.decodes = state.with_slots(state.decoding(), plan)
    under_way = state.launch(plan)
    state.preempt()
    state.add(Request("W", [1], 1))
    assert (b.in_flight, state.admit()) == (1, None)
    state.commit(under_way, [next_token(r.token_ids) for r in under_way])
    assert (b.in_flight, state.admit()) == (0, b)
    assert (b.context, b.computed_tokens, b.remaining) == (4, 2, 2)  # its first block was still in the prefix cache
    assert b.cached_tokens == 0  # as it was when it came
    state.kv.check()


def test_cached_tokens_are_counted_at_admission():
    """Of an equal prompt of two blocks one is found: at least one token has to be computed."""
    state = decoding_state((8, 3))
    state.add(Request("same", [1] * 8, 3))
    second = state.admit()
    assert (second.cached_tokens, second.computed_tokens, second.remaining) == (4, 4, 4)


def test_slots_held_counts_what_has_keys_and_values():
    """Blocks of 4: A has 6 of its 10 computed, in two blocks; a request with its prefix shares the first of them."""
    state = State(BlockManager(20, 4), 8)
    state.add(Request("A", [1] * 10, 3))
    request, plan = state.admit(), StepPlan()
    assert state.slots_held() == (0, 0)
    state.add_chunk(plan, request, 6)
    assert state.slots_held() == (8, 0)
    state.launch(plan)
    assert state.slots_held() == (8, 6)
    state.add(Request("B", [1] * 5, 3))
    assert state.admit().slots == 4
    assert state.slots_held() == (8, 6)
    plan = StepPlan()
    assert [state.add_chunk(plan, r, 4) for r in state.in_context()] == [4, 1]
    state.launch(plan)
    assert state.slots_held() == (16, 11)
    plan = StepPlan()
    plan.decodes = state.with_slots(state.decoding(), plan)
    state.launch(plan)  # tokens that are not known yet, but written
    assert state.slots_held() == (16, 13)


# A prompt's blocks


def test_a_prompt_takes_its_blocks_as_it_is_computed_and_admission_counts_what_it_still_wants():
    """Ten blocks of 2. A wants eight and has three of them: a prompt of five tokens would fit beside three, and waits."""
    requests = requests_of((16, 1), (5, 1))
    server = Server(requests, SplitFuse(6), BlockManager(10, 2, prefix_caching=False))
    server.step()
    assert (server.kv.num_used_blocks, requests[1].is_running) == (3, False)
    assert server.state.admit() is None
    server.run()
    assert [work for work, _ in server.schedule] == [{"A": 6}, {"A": 6}, {"A": 4}, {"B": 5}]
    four = Server(requests_of((16, 1), (4, 1)), SplitFuse(6, 3), BlockManager(10, 2, prefix_caching=False))
    four.step()  # two blocks remain for B: both run
    assert [work for work, _ in four.schedule] == [{"A": 3, "B": 3}]
    four.run()


def test_the_youngest_gets_no_chunk_for_want_of_blocks_and_an_older_prompt_preempts():
    """Blocks of 2, five of them; A's prompt takes four, B's one. A is served by chunks of 2, and B decodes beside it.

    B, the youngest, takes the fifth block for its third token, so A's last chunk has none: B goes, though its decode is
    planned already; its place in the plan goes with it.
    """
    requests = [Request("A", [1] * 8, 2), Request("B", [2] * 2, 5)]
    state = State(BlockManager(5, 2, prefix_caching=False), 8)
    a, b = requests

    def step(*chunks):
        plan = StepPlan()
        plan.decodes = state.with_slots(state.decoding(), plan)
        got = [state.add_chunk(plan, r, most) for r, most in chunks]
        yielding = state.launch(plan)
        state.commit(yielding, [next_token(r.token_ids) for r in yielding])
        state.kv.check()
        return plan, got

    for request in requests:
        assert state.add(request)
        assert state.admit() is request
    assert step((a, 2), (b, 2))[1] == [2, 2]
    assert step((a, 2))[1] == [2]  # B decodes, in its second block
    assert step((a, 2))[1] == [2]
    assert (state.kv.num_free_blocks, a.remaining, len(b.output)) == (0, 2, 3)
    c = Request("C", [3], 1)
    state.add(c)
    plan, got = step((a, 2))
    assert (plan.preempted, plan.decodes, plan.chunks, got) == ([b], [], [(a, 2)], [2])
    assert list(state.waiting) == [b, c]
    assert state.add_chunk(StepPlan(), b, 2) == 0  # it does not run
    driver = Server([], SplitFuse(16), state.kv)
    driver.state, driver.requests = state, [a, b, c]
    driver.run()
    assert [r.output for r in driver.requests] == [
        expected_output([1] * 8, 2), expected_output([2] * 2, 5), expected_output([3], 1),
    ]  # fmt: skip
    assert_all_is_free(driver)


def test_the_youngest_waits_in_mid_prompt_while_older_ones_decode():
    """A's tokens take the blocks that B's prompt was to have: B keeps what it has and nobody else comes, until A has ended."""
    requests = requests_of((2, 5), (6, 1), (1, 1))
    server = Server(requests, SplitFuse(2, 1), BlockManager(5, 2, prefix_caching=False)).run()
    work = [work for work, _ in server.schedule]
    assert work == [{"A": 1, "B": 1}] * 4 + [{"A": 1}, {"A": 1}, {"B": 1, "C": 1}, {"B": 1}]
    assert [r.preemptions for r in requests] == [0, 0, 0]
    assert_all_is_free(server)


@pytest.mark.parametrize("policy", [SplitFuse(8, 3), SplitFuse(16, 4), SplitFuse(5), OrcaBatching(6, 8)], ids=repr)
def test_prompts_in_chunks_and_decodes_that_grow_compete_and_all_finish(policy, monkeypatch):
    """19, 20: short prompts that decode beside long ones that take several steps, in a pool of little more than one.

    Where prompts are in progress side by side, an older one comes to want what younger decodes have taken.
    """
    waits, preempting = [], []
    add_chunk = State.add_chunk

    def counted(state, plan, request, most):
        running, before = request.is_running, len(plan.preempted)
        count = add_chunk(state, plan, request, most)
        waits.append(running and count == 0)
        preempting.append(len(plan.preempted) > before)
        assert not waits[-1] or state.running[-1] is request, "an older one waits"
        return count

    monkeypatch.setattr(State, "add_chunk", counted)
    draw = random.Random(3)
    prompts = [[draw.randrange(5) for _ in range(draw.choice([2, 2, 2, 2, 2, 30]))] for _ in range(60)]
    requests = [Request(i, prompt, draw.randint(1, 20), i // 4) for i, prompt in enumerate(prompts)]
    server = Server(requests, policy, BlockManager(16, 4, prefix_caching=False), ahead=True).run()
    assert [r.output for r in requests] == [
        expected_output(r.token_ids[: r.num_prompt], r.max_new_tokens) for r in requests
    ]
    assert sum(waits) >= 3
    assert sum(preempting) >= (3 if getattr(policy, "max_prompt_chunk", None) else 0)
    assert_all_is_free(server)


@pytest.mark.parametrize("service", ["conversation", "code"])
def test_waste_on_real_lengths_is_less_than_one_percent(service):
    """Lengths of both Azure traces, blocks of 16: what is held without keys and values, counted in the block tables.

    A request wastes half a block on average; what its prompt takes ahead of its chunks would come on top.
    """
    bound = 0.007
    lengths, size = AzureLengths(service).sample(300, seed=0), 16
    kv, policy, cost = BlockManager(250_000, size), SplitFuse(2048), LinearCost(0.004, 1.5e-5)
    simulated = simulate(make_requests([0.0] * 300, lengths), policy, cost, kv, max_num_seqs=128, ahead=True)
    assert simulated.kv_waste < bound
    state, held, used = State(kv, 128), 0.0, 0.0
    for request in make_requests([0.0] * 300, lengths):
        state.add(request)
    while state.running or state.waiting:
        plan = policy.schedule(state)
        yielding = state.launch(plan)
        slots, written = state.slots_held()
        assert slots == size * sum(len(kv.block_table(r.request_id)) for r in state.running)
        assert written == sum(r.computed_tokens for r in state.running)
        seconds = cost.seconds(plan, 0)
        held, used = held + slots * seconds, used + written * seconds
        state.commit(yielding, [-1] * len(yielding))
    assert 1 - used / held < bound


# Arguments


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Request("r", [], 1), ValueError, "token_ids of request 'r': expected at least one"),
        (lambda: Request("r", "text", 1), TypeError, "expected token ids, got a text"),
        (
            lambda: Request("r", [1], 0),
            ValueError,
            "max_new_tokens of request 'r': expected a whole number of at least 1",
        ),
        (lambda: Request("r", [1], 1.5), TypeError, "max_new_tokens"),
        (lambda: Request("r", [1], 1, float("nan")), ValueError, "arrival of request 'r'"),
        (lambda: State(BlockManager(1, 1), 0), ValueError, "max_num_seqs"),
        (lambda: SplitFuse(0), ValueError, "max_num_batched_tokens"),
        (lambda: SplitFuse(8, 0), ValueError, "max_prompt_chunk"),
        (lambda: SplitFuse(8, 1.5), TypeError, "max_prompt_chunk"),
        (lambda: PrefillFirst(0), ValueError, "max_num_batched_tokens"),
        (lambda: OrcaBatching(0), ValueError, "max_batch_size"),
        (lambda: OrcaBatching(1, 0), ValueError, "max_num_batched_tokens"),
        (lambda: StaticBatching(0), ValueError, "batch_size"),
        (lambda: StaticBatching(1, 0), ValueError, "max_num_batched_tokens"),
    ],
)
def test_wrong_arguments_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_request_keeps_a_list_of_its_own():
    prompt = [1, 2]
    request = Request("r", prompt, 1)
    request.token_ids.append(3)
    assert (prompt, list(request.output)) == ([1, 2], [3])
