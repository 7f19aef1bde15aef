"""Pipeline schedules against formulas, an exhaustive search, a longest path, torch's own orders, and broken ones."""

import random
import re
from collections import Counter
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.parallel.schedules import (
    Costs,
    Operation,
    Programs,
    Receive,
    Schedule,
    ScheduleError,
    Send,
    activations_closed_form,
    activations_in_flight,
    bubble_bound,
    bubble_closed_form,
    bubble_fraction,
    forward_only,
    gpipe,
    interleaved,
    lower,
    lower_naively,
    one_f_one_b,
    partition_layers,
    simulate,
    simulate_blocking,
    validate,
    zero_bubble,
)


def every_schedule(p, m):
    yield from (gpipe(p, m), one_f_one_b(p, m), forward_only(p, m))
    yield from (interleaved(p, m, v) for v in (1, 2, 3))
    yield from (zero_bubble(p, m, kind) for kind in ("H1", "H2", "V"))


def orders(text):
    """The orders of a schedule written as text: a line a rank, "F1.0" the forward of micro-batch 1 on chunk 0."""
    read = []
    for line in text.strip().splitlines():
        numbers = [(word[0], *map(int, word[1:].split("."))) for word in line.split()]
        read.append(tuple(Operation(*operation) for operation in numbers))
    return tuple(read)


# The oracle: what must come before what, from the definition of a pipeline, without the package's own rules.


def homes(schedule):
    """For each stage the rank and chunk where it lies."""
    if schedule.placement == "v":
        return [(r, 0) for r in range(schedule.p)] + [(r, 1) for r in reversed(range(schedule.p))]
    return [(r, c) for c in range(schedule.v) for r in range(schedule.p)]


def graph(schedule):
    """For each operation, as (rank, operation), those that it waits for: by the model, and by its rank's order."""
    where, before = homes(schedule), {}
    for j, stage in product(range(schedule.m), range(len(where))):
        rank, chunk = where[stage]
        for kind in schedule.kinds:
            before[rank, Operation(kind, j, chunk)] = set()
        if stage:
            before[rank, Operation("F", j, chunk)].add(
                (where[stage - 1][0], Operation("F", j, where[stage - 1][1])),
            )
        if "B" in schedule.kinds:
            before[rank, Operation("B", j, chunk)].add((rank, Operation("F", j, chunk)))
            if stage + 1 < len(where):
                before[rank, Operation("B", j, chunk)].add(
                    (where[stage + 1][0], Operation("B", j, where[stage + 1][1])),
                )
        if "W" in schedule.kinds:
            before[rank, Operation("W", j, chunk)].add((rank, Operation("B", j, chunk)))
    for rank, order in enumerate(schedule.orders):
        for first, second in pairwise(order):
            before[rank, second].add((rank, first))
    return before


def can_run(schedule):
    """Whether each operation is there once and the graph has no circle."""
    where = homes(schedule)
    for rank, order in enumerate(schedule.orders):
        chunks = [chunk for r, chunk in where if r == rank]
        expected = Counter(Operation(*o) for o in product(schedule.kinds, range(schedule.m), chunks))
        if Counter(order) != expected:
            return False
    try:
        TopologicalSorter(graph(schedule)).prepare()
    except CycleError:
        return False
    return True


def longest_paths(schedule, cost, delay):
    """When each operation starts and ends: the longest path to it. cost(kind, stage) -> time."""
    before, ends, starts = graph(schedule), {}, {}
    stages = {home: stage for stage, home in enumerate(homes(schedule))}
    for node in TopologicalSorter(before).static_order():
        rank, (kind, _, chunk) = node
        starts[node] = max((ends[other] + delay * (other[0] != rank) for other in before[node]), default=Fraction(0))
        ends[node] = starts[node] + cost(kind, stages[rank, chunk])
    return starts, ends


def fewest_steps(p, m, v=1, placement="loop", split=True):
    """The least makespan of any order, by breadth-first search over what is done; F, B and W of a chunk take a step.

    A backward that is not split is two steps, of which only the second serves the stage before; it may be interrupted
    here, so that the search finds a lower bound. With steps of one length it never helps to idle where one can be done.
    """
    stages = p * v
    rank_of = [s % p if placement == "loop" else min(s, 2 * p - 1 - s) for s in range(stages)]
    # One micro-batch is a bit mask: F of stage s is bit s, B bit stages + s, W or the backward's second half after it.
    needs = []
    for bit in range(3 * stages):
        kind, s = divmod(bit, stages)
        serves = 1 if split else 2
        if kind == 0:
            needs.append(1 << (s - 1) if s else 0)
        elif kind == 1:
            needs.append(1 << s | (1 << (serves * stages + s + 1) if s + 1 < stages else 0))
        else:
            needs.append(1 << (stages + s))
    full = (1 << 3 * stages) - 1
    level, steps = {(0,) * m}, 0
    while (full,) * m not in level:
        following = set()
        for state in level:
            choices = []
            for rank in range(p):
                ready = {
                    (state.index(done), bit)
                    for done in state
                    for bit in range(3 * stages)
                    if rank_of[bit % stages] == rank and not done >> bit & 1 and needs[bit] & ~done == 0
                }
                choices.append(ready or {None})
            for chosen in product(*choices):
                for moved in spread(state, [c for c in chosen if c]):
                    following.add(tuple(sorted(moved)))
        level, steps = following, steps + 1
    return steps


def spread(state, chosen):
    """The states after each (micro-batch, bit) is done, where the number stands for all micro-batches in its state."""
    alike = [[k for k, done in enumerate(state) if done == state[j]] for j, _ in chosen]
    for picked in product(*alike):
        moved = list(state)
        for k, (_, bit) in zip(picked, chosen, strict=True):
            moved[k] |= 1 << bit
        yield moved


# The orders


def test_gpipe_does_all_forwards_first():
    assert gpipe(2, 3).orders == orders("F0 F1 F2 B0 B1 B2\nF0 F1 F2 B0 B1 B2")


def test_1f1b_is_the_drawn_order():
    """Megatron-LM's figure 4 in small: p - r - 1 forwards ahead, then one forward, one backward."""
    assert one_f_one_b(3, 4).orders == orders("""
        F0 F1 F2 B0 F3 B1 B2 B3
        F0 F1 B0 F2 B1 F3 B2 B3
        F0 B0 F1 B1 F2 B2 F3 B3
    """)


def test_zb_h1_is_the_drawn_order():
    """1F1B's forwards and backwards, with W put off by r on rank r (figure 3 of the paper, top, in small)."""
    schedule = zero_bubble(3, 4, "H1")
    assert schedule.orders == orders("""
        F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3
        F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
        F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3
    """)


@pytest.mark.parametrize(("p", "m"), [(1, 1), (3, 2), (3, 4), (4, 4), (4, 9)])
def test_one_chunk_a_rank_is_1f1b(p, m):
    assert interleaved(p, m, 1).orders == one_f_one_b(p, m).orders
    without_w = [tuple(o for o in order if o.kind != "W") for order in zero_bubble(p, m, "H1").orders]
    assert tuple(without_w) == one_f_one_b(p, m).orders


def torch_orders(name, p, m, stages_a_rank):
    """The orders that torch.distributed.pipelining makes; "3I0" is stage 3's backward for the input, micro-batch 0."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    read = []
    for actions in get_schedule_ops(name, p, m, stages_a_rank):
        found = [re.fullmatch(r"(\d+)([FBIW])(\d+)", str(action)) for action in actions]
        read.append(tuple(Operation(f[2].replace("I", "B"), int(f[3]), int(f[1]) // p) for f in found if f))
    return tuple(read)


def test_orders_are_those_of_torch():
    """GPipe, ZB-V, interleaved where p divides m, and 1F1B but for its last rank: torch 2.13 lists forwards 1 to m."""
    for p, m in ((2, 1), (2, 4), (3, 4), (3, 6), (4, 8), (4, 12)):
        assert torch_orders("GPipe", p, m, 1) == gpipe(p, m).orders
        assert torch_orders("ZBVZeroBubble", p, m, 2) == zero_bubble(p, m, "V").orders
        if m >= p:
            assert torch_orders("1F1B", p, m, 1)[:-1] == one_f_one_b(p, m).orders[:-1]
        if m % p == 0:
            for v in (2, 3):
                assert torch_orders("Interleaved1F1B", p, m, v) == interleaved(p, m, v).orders


def test_torchs_own_schedules_are_valid_and_timed_alike():
    """Orders that are not ours: torch's interleaved zero bubble runs, and does not get below the bound."""
    for p, m in ((2, 4), (3, 6), (4, 8)):
        schedule = Schedule("torch", p, m, 2, torch_orders("InterleavedZeroBubble", p, m, 2), kinds="FBW")
        validate(schedule)
        assert (
            bubble_bound(p, m, 2) <= bubble_fraction(schedule, "ideal") <= bubble_closed_form("1f1b", p, m, of="ideal")
        )


# Formulas

GRID = [(p, m) for p in range(1, 6) for m in (1, 2, 3, p, p + 1, 2 * p - 1, 2 * p, 3 * p, 3 * p + 2)]


@pytest.mark.parametrize(("p", "m"), sorted(set(GRID)))
def test_every_schedule_is_valid_and_has_its_closed_forms(p, m):
    """Any p and m, multiples or not: the bubble exactly, of both kinds, flushed and steady, and the activations."""
    for s in every_schedule(p, m):
        validate(s)
        timeline = simulate(s)
        for of, steady in product(("total", "ideal"), (False, True)):
            expected = bubble_closed_form(s.name, p, m, s.v, of, steady)
            assert float(timeline.bubble(of, steady)) == expected, (s, of, steady)
        for rank, held in enumerate(timeline.activations):
            expected = tuple(
                activations_closed_form(s.name, p, m, rank, s.v, until) for until in ("backward", "weight")
            )
            assert held == expected, (s, rank)


@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 5), (4, 1), (4, 2), (4, 4), (4, 8), (3, 7), (8, 32)])
def test_the_bubble_of_the_textbook(p, m):
    """GPipe and 1F1B: (p - 1)/(m + p - 1) of the total, (p - 1)/m over the ideal; interleaved: (p - 1)/(v·m)."""
    for make in (gpipe, one_f_one_b):
        assert bubble_fraction(make(p, m)) == (p - 1) / (m + p - 1)
        assert bubble_fraction(make(p, m), of="ideal") == (p - 1) / m
        assert bubble_fraction(make(p, m), of="ideal", steady=True) == (p - 1) / m
    if m >= p:
        for v in (1, 2, 4):
            assert bubble_fraction(interleaved(p, m, v), of="ideal") == (p - 1) / (v * m)
    assert bubble_fraction(forward_only(p, m)) == (p - 1) / (m + p - 1)
    assert bubble_fraction(forward_only(p, m), steady=True) == 0


@pytest.mark.parametrize("p", range(1, 6))
def test_zero_bubble_reaches_the_bound_of_a_flushed_iteration_from_a_known_m_on(p):
    """H1 and H2 from m = p on, V from 2m = 3p - 1 on; with one micro-batch fewer they do not."""
    first = {"H1": p, "H2": p, "V": -(-(3 * p - 1) // 2)}
    for kind, v in (("H1", 1), ("H2", 1), ("V", 2)):
        for m in range(1, 3 * p + 1):
            over = bubble_fraction(zero_bubble(p, m, kind), of="ideal")
            assert (over == (p - 1) / (3 * v * m)) == (m >= first[kind] or p == 1)
            assert over >= bubble_bound(p, m, v)


@pytest.mark.parametrize("p", range(2, 6))
def test_zero_bubble_in_steady_state(p):
    """H2 has none at 2p - 1 activations, V none at p (2p chunks), from m = 2p - 1 on; H1 keeps p, and its bubble."""
    for m in (2 * p - 1, 2 * p, 3 * p + 1):
        assert bubble_fraction(zero_bubble(p, m, "H1"), of="ideal", steady=True) == (p - 1) / (3 * m)
        assert bubble_fraction(zero_bubble(p, m, "H2"), steady=True) == 0
        assert bubble_fraction(zero_bubble(p, m, "V"), steady=True) == 0
        h1, h2, v = (activations_in_flight(zero_bubble(p, m, kind)) for kind in ("H1", "H2", "V"))
        assert h1 == tuple((p - r, p) for r in range(p))
        assert h2 == tuple((2 * (p - r) - 1, 2 * p - 1) for r in range(p))
        assert v == ((2 * p, 2 * p),) * p
    for kind in ("H2", "V"):
        assert bubble_fraction(zero_bubble(p, 2 * p - 2, kind), steady=True) > 0


def test_activations_of_the_textbook():
    """GPipe keeps m on each rank, 1F1B min(p - r, m) on rank r: min(p, m) on the first."""
    assert activations_in_flight(gpipe(4, 8)) == ((8, 8),) * 4
    assert activations_in_flight(one_f_one_b(4, 8)) == ((4, 4), (3, 3), (2, 2), (1, 1))
    assert activations_in_flight(one_f_one_b(4, 2)) == ((2, 2), (2, 2), (2, 2), (1, 1))
    assert activations_in_flight(forward_only(4, 8)) == ((1, 1),) * 4


@pytest.mark.parametrize(("p", "m"), [(2, 3), (3, 6), (4, 9)])
def test_the_steady_length_is_what_one_more_iteration_takes(p, m):
    """Iterations in a row, no rank waiting for another between them: the third adds that length."""
    for s in every_schedule(p, m):
        rows = {}
        for times in (2, 3):
            again = [
                [Operation(o.kind, o.micro_batch + i * m, o.chunk) for i in range(times) for o in order]
                for order in s.orders
            ]
            rows[times] = simulate(Schedule(s.name, p, times * m, s.v, again, s.kinds, s.placement)).makespan
        assert rows[3] - rows[2] == max(simulate(s).lengths), s


@given(
    p=st.integers(1, 5), m=st.integers(1, 9), forward=st.integers(1, 9), backward=st.integers(0, 9), w=st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_the_classic_bubble_does_not_depend_on_how_long_a_backward_takes(p, m, forward, backward, w):
    costs = Costs(forward, backward, w)
    for s in (gpipe(p, m), one_f_one_b(p, m), interleaved(p, m + p, 2)):
        assert bubble_fraction(s, costs=costs) == bubble_closed_form(s.name, s.p, s.m, s.v)


# An exhaustive search


@pytest.mark.parametrize(("p", "m"), [(2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2)])
def test_no_order_beats_zb_h(p, m):
    """Of all orders with one chunk a rank none is faster than H1 and H2, few micro-batches or many."""
    best = fewest_steps(p, m)
    assert best == max(3 * m + p - 1, 2 * (m + p) - 1)
    assert simulate(zero_bubble(p, m, "H1")).makespan == simulate(zero_bubble(p, m, "H2")).makespan == best


@pytest.mark.parametrize(("p", "m"), [(2, 1), (2, 2), (2, 3), (3, 2)])
def test_no_order_without_a_split_backward_beats_1f1b(p, m):
    best = fewest_steps(p, m, split=False)
    assert simulate(one_f_one_b(p, m)).makespan == simulate(gpipe(p, m)).makespan == best == 3 * (m + p - 1)


def test_no_order_in_a_v_beats_zb_v_but_for_few_micro_batches():
    """p = 2, in halves of a unit: 10 where 9 would do, 14 for 13; for m = 3, where 2m ≥ 3p - 1, the bound."""
    assert [fewest_steps(2, m, v=2, placement="v") for m in (1, 2)] == [9, 13]
    assert [2 * simulate(zero_bubble(2, m, "V")).makespan for m in (1, 2, 3)] == [10, 14, 6 * 3 + 1]


# The simulator


def random_schedule(draw, p, m, v, kinds, placement):
    """A random order that can run: operations in turn, each when its inputs are done."""
    empty = Schedule("random", p, m, v, [()] * p, kinds, placement)
    before, made = graph(empty), [[] for _ in range(p)]
    left = dict(before)
    while left:
        done = before.keys() - left.keys()
        rank, operation = draw.choice(sorted(node for node, needs in left.items() if needs <= done))
        made[rank].append(operation)
        del left[rank, operation]
    return Schedule("random", p, m, v, made, kinds, placement)


def random_shape(draw):
    """p, m, v, kinds and placement of a small schedule."""
    placement = draw.choice(["loop", "v"])
    v = 2 if placement == "v" else draw.randint(1, 3)
    return draw.randint(1, 4), draw.randint(1, 4), v, draw.choice(["F", "FB", "FBW"]), placement


@given(seed=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_any_possible_order_runs_as_its_longest_paths_say(seed):
    """Starts and ends equal the longest path's, for random costs of each stage; the bubble is not below its bound."""
    draw = random.Random(seed)
    s = random_schedule(draw, *random_shape(draw))
    validate(s)
    per_stage = [[Fraction(draw.randint(0, 9), draw.randint(1, 5)) for _ in range(s.num_stages)] for _ in "FBW"]
    delay = Fraction(draw.randint(0, 3), 2)
    costs = Costs(*per_stage, communication=delay)
    timeline = simulate(s, costs)

    def cost(kind, stage):
        whole = kind == "B" and s.kinds == "FB"
        return per_stage["FBW".index(kind)][stage] + (per_stage[2][stage] if whole else 0)

    starts, ends = longest_paths(s, cost, delay)
    for rank, spans in enumerate(timeline.spans):
        assert tuple(span.operation for span in spans) == s.orders[rank]
        for operation, start, end in spans:
            assert (start, end) == (starts[rank, operation], ends[rank, operation])
        assert timeline.busy[rank] == sum(span.end - span.start for span in spans)
        assert timeline.idle[rank] == max(ends.values()) - timeline.busy[rank]
    assert timeline.makespan == max(ends.values())
    if s.kinds != "F":
        assert bubble_fraction(s, of="ideal") >= bubble_bound(s.p, s.m, s.v)
        assert bubble_fraction(s, steady=True) <= bubble_fraction(s)


@given(seed=st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_activations_are_those_of_the_timeline(seed):
    """The peak, counted at each start of a forward: forwards begun whose backward (whose weight step) has not ended."""
    draw = random.Random(seed)
    s = random_schedule(draw, *random_shape(draw))
    for rank, spans in enumerate(simulate(s).spans):
        held = []
        for last in (s.kinds[:2][-1], s.kinds[-1]):
            ends = {(o.micro_batch, o.chunk): end for o, _, end in spans if o.kind == last}
            forwards = [(o, start) for o, start, _ in spans if o.kind == "F"]
            held.append(
                max(sum(start <= now < ends[o.micro_batch, o.chunk] for o, start in forwards) for _, now in forwards)
            )
        assert activations_in_flight(s)[rank] == tuple(held)


def test_costs_are_for_a_ranks_layers_or_for_each_stage():
    """A chunk takes 1/v of a rank's cost, a whole backward B + W; a busiest rank sets the ideal."""
    spans = simulate(interleaved(1, 1, 2), Costs(2, 3, 5)).spans[0]
    assert [end - start for _, start, end in spans] == [1, 1, 4, 4]
    timeline = simulate(gpipe(2, 2), Costs([1, 3], [1, 3], [0, 0]))
    assert timeline.busy == (4, 12)
    assert timeline.makespan == 1 + 6 + 6 + 1
    assert timeline.bubble("ideal") == Fraction(2, 12)
    assert timeline.bubble("ideal", steady=True) == Fraction(2, 12)


def test_communication_delays_but_takes_no_rank():
    """A forward and a backward over three ranks: four transfers of a half on the way."""
    assert simulate(gpipe(3, 1), Costs(communication=0.5)).makespan == 3 * 3 + 4 * Fraction(1, 2)
    assert simulate(zero_bubble(1, 1, "V"), Costs(communication=9)).makespan == 3


def test_times_are_exact():
    """A third of a float is a fraction, so that sums of chunks do not drift."""
    timeline = simulate(interleaved(3, 6, 3), Costs(0.1, 0.1, 0.1))
    assert timeline.bubble("ideal") == Fraction(2, 18)


# Programs


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 1), (2, 4), (3, 5), (4, 8)])
def test_lowered_programs_keep_the_order_and_run_where_sends_block(p, m):
    """The operations are the schedule's, two ranks see their transfers in one order, and the run ends, no sooner.

    Where sending takes no time, blocking costs none either, but to interleaved: its ranks are in mid-operation then.
    """
    for s in every_schedule(p, m):
        programs = lower(s)
        assert programs.operations() == s
        for one, other in combinations(range(p), 2):
            mine = [
                (type(x) is Send, x.kind, x.micro_batch, x.stage)
                for x in programs.steps[one]
                if getattr(x, "peer", None) == other
            ]
            theirs = [
                (type(x) is Receive, x.kind, x.micro_batch, x.stage)
                for x in programs.steps[other]
                if getattr(x, "peer", None) == one
            ]
            assert mine == theirs
        sends = sum(isinstance(step, Send) for steps in programs.steps for step in steps)
        crossings = sum(homes(s)[i][0] != homes(s)[i + 1][0] for i in range(s.num_stages - 1))
        assert sends == crossings * m * (1 if s.kinds == "F" else 2)
        blocking = simulate_blocking(programs)
        late = blocking.makespan - simulate(s).makespan
        assert late >= 0 if s.name == "interleaved" else late == 0
        assert [[span.operation for span in spans] for spans in blocking.spans] == [list(order) for order in s.orders]


def test_zb_v_sends_nothing_at_its_turning_point():
    """The last rank holds both stages where the V turns."""
    last = lower(zero_bubble(3, 4, "V")).steps[-1]
    assert {step.stage for step in last if isinstance(step, Send | Receive)} == {1, 2, 3, 4}
    received = {(step.kind, step.stage) for step in last if isinstance(step, Receive)}
    assert received == {("F", 2), ("B", 3)}


@given(seed=st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_any_possible_order_can_be_lowered(seed):
    """Random orders, which no one has thought about, run to their ends with blocking sends."""
    draw = random.Random(seed)
    s = random_schedule(draw, *random_shape(draw))
    programs = lower(s)
    validate(programs)
    assert simulate_blocking(programs, Costs(communication=1)).makespan >= simulate(s).makespan


def test_blocking_sends_are_timed():
    """Rank 0 sends after 1, rank 1 takes it then; the backward comes back at 1 + 1 + 1 + 2 + 1."""
    spans = simulate_blocking(lower(one_f_one_b(2, 1)), Costs(communication=1)).spans
    assert [(str(s.operation), s.start, s.end) for s in spans[0]] == [("F0", 0, 1), ("B0", 6, 8)]
    assert [(str(s.operation), s.start, s.end) for s in spans[1]] == [("F0", 2, 3), ("B0", 3, 5)]


def test_the_naive_program_of_1f1b_deadlocks_and_the_circle_is_named():
    """Receive just before, send just after: a forward goes down while a backward comes up, and both wait."""
    with pytest.raises(ScheduleError) as error:
        validate(lower_naively(one_f_one_b(2, 3)))
    assert str(error.value) == (
        "1f1b: deadlock where sends block: "
        "rank 0 waits for rank 1 to take the activation of micro-batch 1 for stage 1; "
        "rank 1 waits for rank 0 to take the gradient of micro-batch 0 for stage 0"
    )


@pytest.mark.parametrize("p", [2, 3, 5])
def test_which_naive_programs_deadlock(p):
    """Those of GPipe and of inference do not: all go one way at a time. The others do from two micro-batches on."""
    for s in every_schedule(p, 2 * p):
        if s.name in ("gpipe", "forward-only"):
            validate(lower_naively(s))
        else:
            with pytest.raises(ScheduleError, match=r"deadlock where sends block: rank . waits for rank . to"):
                validate(lower_naively(s))


def edited(programs, rank, edit):
    steps = [list(of_rank) for of_rank in programs.steps]
    edit(steps[rank])
    return Programs(programs.schedule, tuple(map(tuple, steps)))


def swap(a, b):
    def edit(steps):
        steps[a], steps[b] = steps[b], steps[a]

    return edit


@pytest.mark.parametrize(
    ("rank", "edit", "says"),
    [
        (1, lambda s: s.pop(0), "rank 1 receives from rank 0 the activation of micro-batch 0 for stage 1 0 times"),
        (1, lambda s: s.insert(0, s[0]), "receives from rank 0 the activation of micro-batch 0 for stage 1 2 times"),
        (0, lambda s: s.insert(2, Send(1, "B", 0, 1)), "rank 1 the gradient .* for stage 1, which no operation needs"),
        (0, lambda s: s.insert(2, Send(7, "F", 0, 1)), "rank 7 the activation .* which no operation needs"),
        (0, lambda s: s.insert(2, Operation("F", 0)), "rank 0 does the forward of micro-batch 0 2 times"),
        (1, lambda s: s.remove(Operation("B", 1)), "the backward of micro-batch 1 is missing on rank 1"),
        (1, swap(0, 1), "rank 1 does the forward of micro-batch 0 before it receives from rank 0 the activation"),
        (0, swap(0, 1), "sends to rank 1 the activation of micro-batch 0 for stage 1 before it does the forward"),
    ],
)  # fmt: skip
def test_wrong_programs_are_named(rank, edit, says):
    """GPipe with p = 2, m = 2: rank 0 F0, send, F1, send, …; rank 1 receive, F0, receive, F1, …"""
    programs = lower(gpipe(2, 2))
    validate(programs)
    with pytest.raises(ScheduleError, match=says):
        validate(edited(programs, rank, edit))


def test_a_program_for_too_few_ranks_is_named():
    programs = lower(gpipe(2, 2))
    with pytest.raises(ScheduleError, match="expected an order for each of 2 ranks, got 1"):
        validate(Programs(programs.schedule, programs.steps[:1]))


def test_transfers_of_a_pair_in_another_order_at_each_end_are_a_deadlock():
    """Both receives come before the operations that use them, but not in the order of the sends."""

    def other_way_round(steps):
        receives = [step for step in steps if isinstance(step, Receive)]
        steps[:] = receives[::-1] + [step for step in steps if not isinstance(step, Receive)]

    with pytest.raises(
        ScheduleError,
        match=r"rank 0 waits for rank 1 to take .* micro-batch 0 .*; rank 1 waits for rank 0 to send .* micro-batch 1",
    ):
        validate(edited(lower(gpipe(2, 2)), 1, other_way_round))


def test_a_rank_that_waits_for_one_that_has_ended_is_named():
    """Without the checks before it, a blocking run says so too."""
    programs = edited(lower(forward_only(2, 1)), 1, lambda steps: steps.pop(0))
    with pytest.raises(ScheduleError, match=r"rank 0 waits for rank 1 to take the activation .*; but rank 1 has ended"):
        simulate_blocking(programs)


# Wrong schedules


def mutate(draw, schedule):
    """One operation dropped, doubled, moved in its rank or to another one, or exchanged with another."""
    changed = [list(order) for order in schedule.orders]
    order = draw.choice(changed)
    i, j = draw.randrange(len(order)), draw.randrange(len(order))
    how = draw.choice(["drop", "double", "move", "swap", "away"])
    if how == "swap":
        order[i], order[j] = order[j], order[i]
    else:
        target = draw.choice(changed) if how == "away" else order
        operation = order[i] if how == "double" else order.pop(i)
        if how != "drop":
            target.insert(draw.randint(0, len(target)), operation)
    return Schedule(schedule.name, schedule.p, schedule.m, schedule.v, changed, schedule.kinds, schedule.placement)


@given(seed=st.integers(0, 10**9))
@settings(max_examples=150, deadline=None)
def test_a_changed_schedule_is_refused_exactly_where_it_cannot_run(seed):
    """By the oracle: each operation once, and no circle. A weight step, say, may move; a dropped one never passes."""
    draw = random.Random(seed)
    schedule = mutate(draw, draw.choice(list(every_schedule(draw.randint(1, 4), draw.randint(1, 5)))))
    if can_run(schedule):
        validate(schedule)
    else:
        with pytest.raises(ScheduleError):
            validate(schedule)


def test_every_single_drop_doubling_and_dependent_swap_is_caught():
    """All of them, of one schedule of each kind; the message names the operation."""
    for s in every_schedule(3, 4):
        for rank, order in enumerate(s.orders):
            for i, operation in enumerate(order):
                for wrong, says in (
                    (order[:i] + order[i + 1 :], "is missing"),
                    (order[: i + 1] + order[i:], "2 times"),
                ):
                    orders = [*s.orders[:rank], wrong, *s.orders[rank + 1 :]]
                    with pytest.raises(ScheduleError) as error:
                        Schedule(s.name, s.p, s.m, s.v, orders, s.kinds, s.placement).check_operations()
                    assert says in str(error.value)
                    assert f"the {operation.describe()} " in str(error.value)
                    assert f"rank {rank}" in str(error.value)
                for k in range(i + 1, len(order)):
                    if order[k][1:] == operation[1:]:
                        swapped = list(order)
                        swapped[i], swapped[k] = swapped[k], swapped[i]
                        orders = [*s.orders[:rank], swapped, *s.orders[rank + 1 :]]
                        with pytest.raises(ScheduleError, match=r"no rank can go on: .*waits for"):
                            validate(Schedule(s.name, s.p, s.m, s.v, orders, s.kinds, s.placement))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("F0 B0\nB0 F0", "rank 1 waits for itself to do the forward of micro-batch 0, which its own backward"),
        ("F0\nF0 B0", "the backward of micro-batch 0 is missing on rank 0"),
        ("F0 F0 B0\nF0 B0", "rank 0 does the forward of micro-batch 0 2 times"),
        ("F0 B0 F1\nF0 B0", "the forward of micro-batch 1, which is none of kinds FB, 1 micro-batches and 1 chunks"),
        ("F0 B0 W0\nF0 B0", "rank 0 does the weight step of micro-batch 0, which is none"),
        ("F0 B0 F0.1\nF0 B0", "rank 0 does the forward of micro-batch 0 on chunk 1, which is none"),
        ("F0 B0 X0\nF0 B0", "rank 0 does the 'X' of micro-batch 0, which is none"),
        ("F0 B0", "expected an order for each of 2 ranks, got 1"),
    ],
)  # fmt: skip
def test_wrong_schedules_are_named(text, says):
    schedule = Schedule("drawn", 2, 1, 1, orders(text))
    for look in (validate, simulate, lower, bubble_fraction):
        with pytest.raises(ScheduleError, match=says):
            look(schedule)


def test_who_only_waits_for_the_circle_is_left_out_of_it():
    """Rank 0 waits for rank 1, which waits for rank 2 and that for it: a backward too early, or a forward too late."""
    schedule = Schedule("drawn", 3, 2, 1, orders("F0 F1 B0 B1\nF0 B0 F1 B1\nF0 F1 B0 B1"))
    with pytest.raises(ScheduleError) as error:
        validate(schedule)
    assert str(error.value) == (
        "drawn: no rank can go on: "
        "rank 1 waits for rank 2 to do the backward of micro-batch 0, which its own backward of micro-batch 0 needs; "
        "rank 2 waits for rank 1 to do the forward of micro-batch 1, which its own forward of micro-batch 1 needs"
    )


def test_a_schedule_is_plain_data():
    """Lists and tuples become tuples of operations; equal schedules are equal, and it prints as a grid."""
    schedule = Schedule("drawn", 2, 1, 1, [[("F", 0), ("B", 0)], [("F", 0), ("B", 0)]])
    assert schedule.orders == orders("F0 B0\nF0 B0")
    assert hash(schedule) == hash(Schedule("drawn", 2, 1, 1, orders("F0 B0\nF0 B0")))
    assert str(zero_bubble(2, 1, "V")).splitlines() == [
        "zb-v, p = 2, m = 1, v = 2",
        "rank 0: F0   F0.1 B0.1 W0.1 B0   W0",
        "rank 1: F0   F0.1 B0.1 W0.1 B0   W0",
    ]  # fmt: skip
    assert [zero_bubble(2, 1, kind).splits_backward for kind in ("H1", "V")] == [True, True]
    assert not gpipe(2, 1).splits_backward


@pytest.mark.parametrize("s", every_schedule(3, 3), ids=lambda s: f"{s.name}-{s.v}")
def test_stages_lie_where_they_are_drawn(s):
    assert [(s.rank_of(stage), s.chunk_of(stage)) for stage in range(s.num_stages)] == homes(s)
    assert [s.stage_of(rank, chunk) for rank, chunk in homes(s)] == list(range(s.num_stages))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: gpipe(0, 1), ValueError, "p: expected a whole number of at least 1, got 0"),
        (lambda: gpipe(1, 0), ValueError, "m: "),
        (lambda: one_f_one_b(2.0, 1), TypeError, "p: expected a whole number, got float"),
        (lambda: one_f_one_b(2, "4"), TypeError, "m: "),
        (lambda: interleaved(2, 4, 0), ValueError, "v: "),
        (lambda: forward_only(True, 1), ValueError, "p: "),
        (lambda: zero_bubble(2, -1, "H1"), ValueError, "m: "),
        (lambda: zero_bubble(2, 4, "H3"), ValueError, "kind: expected one of 'H1', 'H2', 'V', got 'H3'"),
        (lambda: Schedule("s", 2, 1, 1, [], placement="v"), ValueError, "v: the placement 'v' needs 2 chunks"),
        (lambda: Schedule("s", 2, 1, 1, [], placement="ring"), ValueError, "placement: "),
        (lambda: Schedule("s", 2, 1, 1, [], kinds="FW"), ValueError, "kinds: "),
        (lambda: Schedule("s", 2, 1, 1, [[3]]), TypeError, "orders: expected"),
        (lambda: Programs(gpipe(1, 1), [[("F", 0)]]), TypeError, "steps: expected operations, sends"),
        (lambda: validate("gpipe"), TypeError, "schedule: expected a Schedule or Programs, got str"),
        (lambda: simulate("gpipe"), TypeError, "schedule: "),
        (lambda: lower(lower(gpipe(1, 1))), TypeError, "schedule: "),
        (lambda: simulate(gpipe(1, 1), 3), TypeError, "costs: "),
        (lambda: simulate(gpipe(2, 1), Costs([1, 2, 3])), ValueError, "forward: expected a cost for each of the 2"),
        (lambda: Costs(-1), ValueError, "forward: "),
        (lambda: Costs(weight=[1, float("nan")]), ValueError, r"weight\[1\]: "),
        (lambda: Costs(backward="12"), TypeError, "backward: "),
        (lambda: Costs(communication=-1), ValueError, "communication: "),
        (lambda: bubble_fraction(gpipe(2, 2), of="ideel"), ValueError, "of: expected one of 'total', 'ideal'"),
        (lambda: bubble_fraction(gpipe(2, 2), steady=1), TypeError, "steady: "),
        (lambda: bubble_fraction(gpipe(2, 2), costs=Costs(0, 0, 0)), ValueError, "costs: expected an operation"),
        (lambda: bubble_closed_form("1f1", 2, 2), ValueError, "name: expected one of .*did you mean '1f1b'"),
        (lambda: bubble_bound(2, 0), ValueError, "m: "),
        (lambda: activations_closed_form("gpipe", 2, 2, 2), ValueError, "rank: expected one of the 2 ranks"),
        (lambda: activations_closed_form("gpipe", 2, 2, 0, until="end"), ValueError, "until: "),
        (lambda: activations_in_flight([]), TypeError, "schedule: "),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, error, says):
    with pytest.raises(error, match=says):
        make()


# Layers to stages


@given(costs=st.lists(st.integers(0, 20), min_size=1, max_size=8), data=st.data())
@settings(max_examples=100, deadline=None)
def test_layers_are_cut_best(costs, data):
    """By trying all cuts: none has a cheaper dearest stage, and of those as cheap the first stage is the shortest."""
    p = data.draw(st.integers(1, len(costs)))
    cuts = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), p - 1)]
    dearest = {cut: max(sum(costs[a:b]) for a, b in pairwise(cut)) for cut in cuts}
    sizes = partition_layers(costs, p)
    cut = tuple(sum(sizes[:i]) for i in range(p + 1))
    assert len(sizes) == p
    assert min(sizes) >= 1
    assert dearest[cut] == min(dearest.values())
    assert sizes[0] == min(c[1] for c in cuts if dearest[c] == dearest[cut])
    assert partition_layers(costs, p) == sizes


def test_layers_of_equal_cost_and_a_dear_head():
    assert partition_layers([1.0] * 30, 4) == [6, 8, 8, 8]
    assert partition_layers([1, 1, 1, 1, 4], 2) == [4, 1]
    assert partition_layers([5], 1) == [1]


@pytest.mark.parametrize(
    ("costs", "p", "error", "says"),
    [
        ([1, 2], 3, ValueError, "p: expected at most one stage for each of the 2 layers, got 3"),
        ([], 1, ValueError, "p: expected at most one stage for each of the 0 layers, got 1"),
        ([1, -2], 1, ValueError, r"costs\[1\]: "),
        ([1, "2"], 1, TypeError, r"costs\[1\]: "),
        ([float("nan")], 1, ValueError, r"costs\[0\]: "),
        (7, 1, TypeError, "costs: expected a sequence of numbers, got int"),
        ([1], 0, ValueError, "p: "),
    ],
)
def test_wrong_layers_are_named(costs, p, error, says):
    with pytest.raises(error, match=says):
        partition_layers(costs, p)
