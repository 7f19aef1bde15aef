# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lab: fill the pipeline
#
# | | |
# |---|---|
# | **Device** | any; a laptop's CPU is enough, and a GPU would have nothing to do |
# | **Time** | about 90 minutes; the whole notebook runs in under half a minute |
# | **Difficulty** | moderate: short functions, but each has an edge that is easy to miss |
# | **Needs** | the chapter *Pipeline parallelism* |
#
# A model is cut into stages, each rank holds one, and the batch goes through them in micro-batches. You will write
# what decides how well that goes: which layers make a stage, in which order a rank works, how long it waits, and how
# much it must keep in memory meanwhile. At the end you predict how long one such schedule takes, and then you run it.
#
# You write each answer in one cell, in place of `raise NotImplementedError()`. The cell after it checks your answer
# property by property; when you hand in, hidden checks run the same functions on other inputs.
#
# The letters are the book's notation: $p$ ranks, $m$ micro-batches, $v$ chunks of layers that each rank holds. Ranks,
# micro-batches and layers are counted from 0.
#
# First, say who you are. One exercise draws its schedule from your id, so that everyone predicts another number.

# %%
student_id = "student-00"  # your id, as your instructor knows it

# %% nbgrader={"grade_id": "given", "locked": true}
import math
from itertools import accumulate, combinations, pairwise

from llmlab.grading.checks import CheckFailed, Checks, close, equal, instance, measured, student_rng
from llmlab.grading.withhold import withhold
from llmlab.parallel.schedules import Schedule, validate

# These names of the package are the exercises, or answer them, so here they raise. The rest of llmlab works.
withhold(WITHHELD)
withhold(
    [
        "llmlab.parallel.schedules.activations.activations_in_flight",
        "llmlab.parallel.schedules.classic.gpipe",
        "llmlab.parallel.schedules.classic.one_f_one_b",
        "llmlab.parallel.schedules.classic.interleaved",
        "llmlab.parallel.schedules.closed_forms.bubble_closed_form",
        "llmlab.parallel.schedules.closed_forms.activations_closed_form",
        "llmlab.parallel.schedules.closed_forms.bubble_bound",
        "llmlab.parallel.schedules.rendezvous.simulate_blocking",
        "llmlab.parallel.schedules.simulate.Timeline",
        "llmlab.parallel.schedules.simulate.bubble_fraction",
        "llmlab.parallel.schedules.simulate.simulate",
        "llmlab.parallel.schedules.zero_bubble._h_phases",
        "llmlab.parallel.schedules.zero_bubble.zero_bubble",
    ]
)


def is_whole(number):
    """Whether this is a whole number, as an int or as a float such as 4.0."""
    return type(number) is int or (type(number) is float and number.is_integer())


def as_orders(orders, p, m):
    """These orders as lists of (kind, micro_batch), one list for each rank; fails where they have another form."""
    if type(orders) not in (list, tuple) or len(orders) != p or any(type(o) not in (list, tuple) for o in orders):
        raise CheckFailed(orders, f"a list of {p} lists, one for each rank")
    for rank, operation in ((rank, operation) for rank, order in enumerate(orders) for operation in order):
        form = f'on rank {rank} tuples such as ("F", 0): the kind, "F" or "B", and then the micro-batch, a plain int'
        if type(operation) not in (list, tuple) or len(operation) != 2:
            raise CheckFailed(operation, form)
        if operation[0] not in ("F", "B") or not is_whole(operation[1]):
            raise CheckFailed(operation, form)
        if not 0 <= operation[1] < m:
            raise CheckFailed(operation, f"on rank {rank} only micro-batches from 0 to {m - 1}")
    return [[(kind, int(micro_batch)) for kind, micro_batch in order] for order in orders]


def runnable(orders, p, m):
    """The same, if each rank does everything once and all of them come to their ends."""
    orders = as_orders(orders, p, m)
    try:
        validate(Schedule("order", p, m, 1, orders))
    except ValueError as error:
        told = str(error).removeprefix("order: ")
        raise CheckFailed(" | ".join(map(in_words, orders)), f"orders that can run: {told}") from None
    return orders


def in_words(order):
    """One rank's order, as F0 F1 B0 and so on."""
    return " ".join(f"{kind}{micro_batch}" for kind, micro_batch in order)


# %% [markdown]
# ## 1. Cut the layers into stages
#
# Each stage is a run of consecutive layers. In the steady part of the pipeline every rank waits for the slowest one, so
# the aim is not equal numbers of layers but a dearest stage that is as cheap as it can be. A layer's cost may be
# measured in milliseconds or in operations. The output head is often worth several layers.
#
# <details><summary>Hint: which stage ends where?</summary>
#
# Suppose the first stage takes the layers 0 to j - 1. The others then share the rest, and the same question is asked
# again for fewer layers and one stage less. Try each j that leaves a layer for every other stage.
# </details>
#
# <details><summary>Hint: right for a few layers, but for 81 it takes for ever</summary>
#
# There are more than $10^{15}$ ways to cut 81 layers into 16 stages, so not all of them can be tried. But whatever the
# stages before have taken, what is left is always "the layers from i on, in k stages": no more than 81 · 16 different
# questions, which come up again and again. Answer each of them once and keep the answer, in a dictionary with the key
# (i, k) or in a table that you fill from k = 1 up. That is dynamic programming.
# </details>
#
# <details><summary>Hint: why does it not do to close a stage once it has its share?</summary>
#
# Four layers of 3, 3, 4 and 2 make 6 a stage for two stages, and that works. Of 1, 1, 9, 1 and 6, two stages should
# have 9 each; no cut gives that, and what one stage leaves over the other must take.
# </details>


# %% nbgrader={"grade_id": "partition_layers", "solution": true}
def partition_layers(costs, p):
    """How many consecutive layers each of p stages gets, so that the dearest stage is as cheap as it can be.

    costs: a list with a number for each layer, in any unit, none below 0. p: the number of stages.
    Returns a list of p whole numbers, each 1 or more, that add up to the number of layers. A stage costs the sum of its
    layers' costs. Where several cuts are best, any of them will do.
    Sizes: up to 100 layers in up to 16 stages, in about a second. To try every cut would take years.

    1. Raise ValueError if there are fewer layers than stages.
    2. One stage takes all layers that there are.
    3. More stages: for each layer at which the second stage may start, compare what the first stage costs with the
       dearest stage of the best cut of the rest into p - 1 stages; the larger counts. Take a start for which it is least.
    """
    ### BEGIN SOLUTION llmlab.parallel.schedules.partition.partition_layers
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_partition_layers", "grade": true}
check = Checks("partition_layers")


def dearest(costs, p):
    """What the dearest stage of the answer costs; fails where the answer is no cut into p stages, or takes too long."""
    try:
        sizes = partition_layers(costs, p)
    except TimeoutError:
        sized = f"no answer for {len(costs)} layers in {p} stages in the time that a check has"
        raise TimeoutError(f"{sized}; are the same questions answered again and again?") from None
    instance(sizes, list)
    if not all(map(is_whole, sizes)) or len(sizes) != p or min(sizes) < 1 or sum(sizes) != len(costs):
        raise CheckFailed(sizes, f"{p} whole numbers (plain ints) from 1 on that add up to {len(costs)}")
    ends = [0, *accumulate(map(int, sizes))]
    return max(sum(costs[start:end]) for start, end in pairwise(ends))


@check("eight equal layers in four stages: 2 layers each", points=0.25)
def _(rng):
    equal(dearest([1] * 8, 4), 2)


@check("eight layers of 1 and a head of 4 in three stages: the dearest costs 4", points=0.25)
def _(rng):
    equal(dearest([1, 1, 1, 1, 1, 1, 1, 1, 4], 3), 4)


@check("layers of 4, 1, 2, 7 and 1 in three stages: the dearest costs 7", points=0.25)
def _(rng):
    equal(dearest([4, 1, 2, 7, 1], 3), 7)


@check("layers of 0.5, 0, 0 and 0.25 in four stages: one each; four layers of 0.4 in two: 0.8", points=0.25)
def _(rng):
    equal(dearest([0.5, 0, 0, 0.25], 4), 0.5)
    close(dearest([0.4, 0.4, 0.4, 0.4], 2), 0.8)


@check("three layers do not make four stages: ValueError", points=0.25)
def _(rng):
    try:
        sizes = partition_layers([1, 2, 3], 4)
    except ValueError:
        return
    raise CheckFailed(sizes, "a ValueError")


@check("80 layers of 1 and a head of 4 in 16 stages, in time: the dearest costs 6", points=0.25)
def _(rng):
    equal(dearest([1] * 80 + [4], 16), 6)


### BEGIN HIDDEN TESTS
def least(costs, p):
    """The dearest stage of the best cut, found by trying them all."""
    cuts = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), p - 1))
    return min(max(sum(costs[a:b]) for a, b in pairwise(cut)) for cut in cuts)


def can_do(costs, p, bound):
    """Whether p stages can be had that cost no more than ``bound`` each: fill one after the other."""
    stages, cost = 1, 0
    for layer in costs:
        if cost + layer > bound:
            stages, cost = stages + 1, 0
        cost += layer
    return stages <= p


@check.hidden("drawn costs: no other cut has a cheaper dearest stage", points=1)
def _(rng):
    for _ in range(100):
        costs, p = [rng.randrange(1, 20) for _ in range(rng.randrange(6, 12))], rng.randrange(2, 6)
        equal(dearest(costs, p), least(costs, p))


@check.hidden("one dear layer, early or late: the stages around it make up for it", points=0.5)
def _(rng):
    for place in (0, 1, 4, 8, 9):
        costs = [rng.randrange(2, 6) for _ in range(10)]
        costs[place] = rng.randrange(15, 30)
        for p in (3, 4, 5):
            equal(dearest(costs, p), least(costs, p))


@check.hidden("each stage gets a layer: as many stages as layers, one stage, layers that cost nothing", points=0.25)
def _(rng):
    costs = [rng.randrange(1, 20) for _ in range(6)]
    equal(dearest(costs, 6), max(costs))
    equal(dearest(costs, 1), sum(costs))
    costs = [rng.randrange(5, 20), 0, 0, rng.randrange(1, 5), 0, 0]
    for p in (3, 4, 5, 6):
        equal(dearest(costs, p), costs[0])
    costs = [1, 1, 1, 1, 1, rng.randrange(20, 30)]
    for p in (2, 3, 4):
        equal(dearest(costs, p), costs[5])


@check.hidden("costs that are no whole numbers", points=0.25)
def _(rng):
    for _ in range(20):
        costs, p = [rng.uniform(0.1, 1.0) for _ in range(rng.randrange(6, 10))], rng.randrange(2, 5)
        close(dearest(costs, p), least(costs, p), relative=1e-9)


@check.hidden("as many layers and stages as the sizes allow, in time", points=0.5)
def _(rng):
    for layers, p in ((rng.randrange(60, 90), rng.randrange(8, 16)), (100, 16)):
        costs = [rng.randrange(1, 50) for _ in range(layers)]
        bound = max(costs)
        while not can_do(costs, p, bound):
            bound += 1
        equal(dearest(costs, p), bound)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 2. GPipe's order
#
# A schedule says in which order each rank does its operations: a forward `F` and a backward `B` for each micro-batch.
# When they run follows from the order. `F` of a micro-batch needs the same `F` on the rank before; `B` needs the rank's
# own `F`, and the same `B` on the rank after.
#
# GPipe is the simplest: every rank does all its forwards, and then all its backwards.
#
# <details><summary>Hint: in which order do the backwards come?</summary>
#
# From micro-batch 0 on, or from the last one down: both are right, as long as every rank does the same. If two
# ranks take them in different orders, one waits for the other.
# </details>


# %% nbgrader={"grade_id": "gpipe_orders", "solution": true}
def gpipe_orders(p, m):
    """What each of p ranks does for m micro-batches, in order: all forwards, then all backwards.

    Returns a list of p lists, one for each rank. Its elements are tuples (kind, micro_batch): kind is "F" or "B",
    micro_batch a whole number from 0 to m - 1. The first rank's order begins with ("F", 0), ("F", 1).
    """
    ### BEGIN SOLUTION llmlab.parallel.schedules.classic.gpipe_orders
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_gpipe_orders", "grade": true}
check = Checks("gpipe_orders")


def kinds(order):
    """One rank's order without the micro-batches."""
    return "".join(kind for kind, *_ in order)


def in_turn(orders, kind):
    """The micro-batches of one kind of operation, in the order in which each rank takes them."""
    return [[micro_batch for which, micro_batch in order if which == kind] for order in orders]


def same_on_all(orders):
    """Fails unless all ranks take the forwards in one order, and the backwards in one order."""
    for kind, name in (("F", "forwards"), ("B", "backwards")):
        first, *others = in_turn(orders, kind)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise CheckFailed(f"the {name} {other} on rank {rank}", f"{first}, as on rank 0: else one waits")


@check("2 ranks and 3 micro-batches can run: three forwards, then three backwards", points=0.5)
def _(rng):
    for order in runnable(gpipe_orders(2, 3), 2, 3):
        equal(kinds(order), "FFFBBB")


@check("3 ranks and 4 micro-batches: all ranks take the micro-batches in one order", points=0.25)
def _(rng):
    same_on_all(as_orders(gpipe_orders(3, 4), 3, 4))


### BEGIN HIDDEN TESTS
@check.hidden("any p and m: each rank does everything once, and all ranks come to their ends", points=0.75)
def _(rng):
    for p, m in ((1, 2), (rng.randrange(2, 7), rng.randrange(2, 12)), (rng.randrange(5, 8), 2)):
        runnable(gpipe_orders(p, m), p, m)


@check.hidden("no backward before the last forward, on any rank", points=0.5)
def _(rng):
    for p, m in ((rng.randrange(2, 7), rng.randrange(2, 12)), (rng.randrange(5, 8), 3)):
        for order in runnable(gpipe_orders(p, m), p, m):
            equal(kinds(order), "F" * m + "B" * m)


@check.hidden("no rank waits without need: all take the micro-batches in one order", points=0.5)
def _(rng):
    for p, m in ((rng.randrange(2, 7), rng.randrange(3, 12)), (rng.randrange(5, 8), 3)):
        same_on_all(runnable(gpipe_orders(p, m), p, m))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 3. The order of 1F1B
#
# GPipe keeps the activations of all $m$ micro-batches until the backwards begin. 1F1B begins them as soon as it can.
# Rank $r$ first does the forwards that it takes until a backward can come back to it, no more: one for each rank
# behind it. From then on it does one forward, one backward in turns; when the forwards are used up, it does the
# backwards that are left.
#
# <details><summary>Hint: how many forwards come first?</summary>
#
# Rank r has p - r - 1 ranks behind it: so many forwards come before the turns. The last rank has none, and begins with
# F0 B0. There may be fewer micro-batches than that.
# </details>
#
# <details><summary>Hint: the checks say that a rank waits for another, around a circle</summary>
#
# Look at the two orders that the message names. Both kinds count their own micro-batches, each from 0: in the turns the
# backward is of an earlier micro-batch than the forward before it, on all ranks but the last.
# </details>


# %% nbgrader={"grade_id": "one_f_one_b_orders", "solution": true}
def one_f_one_b_orders(p, m):
    """What each of p ranks does for m micro-batches, in order: 1F1B, with a flush at the end.

    Returns a list of p lists of tuples (kind, micro_batch), as ``gpipe_orders`` does.

    1. Ahead: rank r does p - r - 1 forwards, or all m if there are fewer.
    2. Turns: one forward, then one backward, until no forward is left.
    3. The backwards that are left.

    Forwards take the micro-batches from 0 on, and so do backwards.
    """
    ### BEGIN SOLUTION llmlab.parallel.schedules.classic.one_f_one_b_orders
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_one_f_one_b_orders", "grade": true}
check = Checks("one_f_one_b_orders")


@check("4 ranks, 5 micro-batches: the orders of rank 0 and of rank 3", points=0.25)
def _(rng):
    orders = as_orders(one_f_one_b_orders(4, 5), 4, 5)
    equal(in_words(orders[0]), "F0 F1 F2 F3 B0 F4 B1 B2 B3 B4")
    equal(in_words(orders[3]), "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4")


@check("2 ranks and 3 micro-batches can run", points=0.25)
def _(rng):
    runnable(one_f_one_b_orders(2, 3), 2, 3)


@check("5 ranks and no more than 2 micro-batches: rank 0 does both forwards, then both backwards", points=0.25)
def _(rng):
    equal(in_words(as_orders(one_f_one_b_orders(5, 2), 5, 2)[0]), "F0 F1 B0 B1")


### BEGIN HIDDEN TESTS
def earliest_backwards(p, m, rank):
    """A backward whenever as many activations are held as may be, or no forward is left."""
    order, forwards, backwards = [], 0, 0
    while backwards < m:
        if forwards < m and forwards - backwards < p - rank:
            order.append(f"F{forwards}")
            forwards += 1
        else:
            order.append(f"B{backwards}")
            backwards += 1
    return " ".join(order)


def last_end(orders, forward, backward):
    """When the last operation ends, on ranks that take equally long: step by step, whatever can be done next."""
    ends, free, waiting = {}, [0] * len(orders), [list(order) for order in orders]
    while any(waiting):
        for rank, order in enumerate(waiting):
            if order:
                kind, j = order[0]
                before = rank - 1 if kind == "F" else rank + 1
                if not 0 <= before < len(orders) or (before, kind, j) in ends:
                    start = max(free[rank], ends.get((before, kind, j), 0))
                    free[rank] = ends[rank, kind, j] = start + (forward if kind == "F" else backward)
                    order.pop(0)
    return max(free)


@check.hidden("any p and m: each rank does everything once, and all ranks come to their ends", points=0.5)
def _(rng):
    for p, m in ((1, 2), (rng.randrange(2, 7), rng.randrange(6, 12)), (rng.randrange(3, 8), 8)):
        runnable(one_f_one_b_orders(p, m), p, m)


@check.hidden("rank r holds p - r activations at a time, and no more", points=0.75)
def _(rng):
    p = rng.randrange(3, 7)
    m = rng.randrange(p + 1, 12)
    for rank, order in enumerate(runnable(one_f_one_b_orders(p, m), p, m)):
        equal(max(accumulate(1 if kind == "F" else -1 for kind, _ in order)), p - rank)


@check.hidden("it takes no longer than GPipe: m + p - 1 forwards and backwards, one after the other", points=0.75)
def _(rng):
    p = rng.randrange(3, 7)
    m = rng.randrange(p + 1, 12)
    forward, backward = rng.randrange(1, 9), rng.randrange(1, 9)
    orders = runnable(one_f_one_b_orders(p, m), p, m)
    equal(last_end(orders, forward, backward), (m + p - 1) * (forward + backward))


@check.hidden("fewer micro-batches than ranks", points=0.75)
def _(rng):
    p = rng.randrange(5, 8)
    for m in (2, rng.randrange(3, p)):
        for rank, order in enumerate(runnable(one_f_one_b_orders(p, m), p, m)):
            equal(in_words(order), earliest_backwards(p, m, rank))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# Your two schedules beside each other. Count in each line how many micro-batches have had their `F` and not yet their
# `B`, at the place where they are most: so many a rank must keep in memory. When the operations run, and which of the
# two takes longer, the order alone does not show; at the end of the lab you let both run.

# %%
for name, orders in (("GPipe", gpipe_orders(3, 5)), ("1F1B", one_f_one_b_orders(3, 5))):
    for rank, order in enumerate(runnable(orders, 3, 5)):
        print(f"{name:5} rank {rank}: {in_words(order)}")

# %% [markdown]
# ## 4. The bubble
#
# The time in which a rank waits is the bubble. Count in units of one forward and one backward of a micro-batch on
# **one chunk** of layers. With $v$ chunks on each rank a chunk has $1/v$ of the rank's layers, so that a rank works for
# $v \cdot m$ units. GPipe and 1F1B have $v = 1$; interleaved 1F1B has more, and a micro-batch goes around all ranks $v$
# times.
#
# The same bubble is published as two different fractions: of the **total** time that goes by, or over the **ideal**, the
# time that a rank works. Always say which.
#
# <details><summary>Hint: where do the p - 1 units come from?</summary>
#
# The last rank waits p - 1 forwards until the first micro-batch reaches it. After its last backward, it waits p - 1
# backwards until the first rank has done its own. That is p - 1 of each.
# </details>
#
# <details><summary>Hint: why is it more if there are fewer micro-batches than ranks?</summary>
#
# A round of the first micro-batch takes p units. A rank has only m to do before the first comes back, and waits for the
# other p - m. This happens between one round and the next: v - 1 times, and never for v = 1.
# </details>


# %% nbgrader={"grade_id": "classic_bubble", "solution": true}
def classic_bubble(p, m, v=1, of="total"):
    """The bubble of GPipe and of 1F1B (v = 1), and of 1F1B interleaved (v above 1), as a fraction.

    p, m, v: ranks, micro-batches, chunks a rank. of: "total", the fraction of the time that goes by, or "ideal", the
    ratio to the time that a rank works. Returns a number. All chunks take the same time, transfers take none.

    1. Work: v·m units.
    2. Idle: p - 1 units, and where m is less than p, another p - m for each of the v - 1 rounds after the first.
    3. "ideal": idle / work. "total": idle / (work + idle).
    """
    ### BEGIN SOLUTION llmlab.parallel.schedules.closed_forms.classic_bubble
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_classic_bubble", "grade": true}
check = Checks("classic_bubble")


@check("4 ranks, 8 micro-batches: 3/11 of the total, 3/8 over the ideal", points=0.25)
def _(rng):
    close(classic_bubble(4, 8), 3 / 11)
    close(classic_bubble(4, 8, of="ideal"), 3 / 8)


@check("4 ranks, 8 micro-batches, two chunks a rank: 3/16 over the ideal, 3/19 of the total", points=0.25)
def _(rng):
    close(classic_bubble(4, 8, 2, "ideal"), 3 / 16)
    close(classic_bubble(4, 8, 2), 3 / 19)


@check("4 ranks, 2 micro-batches: 3/2 over the ideal; with two chunks a rank 5/4", points=0.25)
def _(rng):
    close(classic_bubble(4, 2, 1, "ideal"), 3 / 2)
    close(classic_bubble(4, 2, 2, "ideal"), 5 / 4)


### BEGIN HIDDEN TESTS
@check.hidden("one chunk a rank, any p and m: of the total and over the ideal", points=0.75)
def _(rng):
    for p, m in ((rng.randrange(2, 9), rng.randrange(10, 99)), (rng.randrange(5, 9), rng.randrange(1, 5))):
        ideal, total = m, m + p - 1
        close(classic_bubble(p, m), 1 - ideal / total)
        close(classic_bubble(p, m, 1, "ideal"), total / ideal - 1)
    equal(classic_bubble(1, rng.randrange(1, 9)), 0)


@check.hidden("several chunks a rank: the work grows with them and the idle time does not", points=0.75)
def _(rng):
    for _ in range(3):
        p, v = rng.randrange(2, 9), rng.randrange(2, 6)
        m = rng.randrange(p, 40)
        ideal = sum(m for _ in range(v))
        close(classic_bubble(p, m, v), 1 - ideal / (ideal + p - 1))
        close(classic_bubble(p, m, v, "ideal"), (p - 1) / ideal)


@check.hidden("several chunks a rank and fewer micro-batches than ranks", points=0.75)
def _(rng):
    for short in (1, rng.randrange(2, 5)):
        p, v = rng.randrange(6, 12), rng.randrange(2, 6)
        m = p - short
        ideal = v * m
        # Each round but the last takes until the first micro-batch is back; the last one ends with the last.
        total = (v - 1) * p + m + p - 1
        close(classic_bubble(p, m, v), 1 - ideal / total)
        close(classic_bubble(p, m, v, "ideal"), total / ideal - 1)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# One bubble, two fractions, for more and more micro-batches on 8 ranks:

# %%
print("p = 8    of the total   over the ideal   over the ideal, v = 4")
for m in (2, 8, 32, 128):
    bubbles = classic_bubble(8, m), classic_bubble(8, m, of="ideal"), classic_bubble(8, m, 4, "ideal")
    print(f"m = {m:3}", *(f"{bubble:14.1%}" for bubble in bubbles))

# %% [markdown]
# ## 5. Activations in flight
#
# From its forward to its backward a micro-batch's activations stay in memory. What a rank must hold at a time, at the
# most, follows from its order alone. Count one for each micro-batch **on each chunk**.
#
# An interleaved schedule sends the micro-batches in groups: a group goes through a chunk, then through the next
# chunk of the same rank. If $p$ divides $m$, a group is $p$ micro-batches. Here $m$ may be any number: it is cut into
# $\lfloor m/p \rfloor$ groups (or one, if $m < p$) as even as can be.
#
# <details><summary>Hint: from the forwards ahead to the peak</summary>
#
# In the turns a rank does a forward and then a backward. While it does the forward it holds one more than it did
# ahead; the backward then frees one. Where all forwards are ahead, there are no turns.
# </details>
#
# <details><summary>Hint: how large is the largest group?</summary>
#
# Cut 11 into 3 groups as even as can be: 4, 4 and 3. The largest is 11/3 rounded up.
# </details>


# %% nbgrader={"grade_id": "classic_activations", "solution": true}
def classic_activations(name, p, m, rank, v=1):
    """The most activations that a rank holds at a time, each of one micro-batch on one chunk.

    name: "gpipe", "1f1b" or "interleaved". p, m: ranks and micro-batches. rank: 0 to p - 1. v: chunks a rank, 1 unless
    the schedule is interleaved. Returns a whole number.

    1. "gpipe": no backward comes before the last forward.
    2. "1f1b", and "interleaved" where v = 1: p - rank - 1 forwards come ahead of the turns.
    3. "interleaved" with more chunks: 2·(p - rank - 1) + (v - 1)·g forwards come ahead, g the size of the largest group.
    4. Never more than the v·m forwards that there are.
    """
    ### BEGIN SOLUTION llmlab.parallel.schedules.closed_forms.classic_activations
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_classic_activations", "grade": true}
check = Checks("classic_activations")


@check("4 ranks, 8 micro-batches: GPipe holds 8 on each rank, 1F1B 4, 3, 2 and 1", points=0.25)
def _(rng):
    for rank in range(4):
        equal(classic_activations("gpipe", 4, 8, rank), 8)
        equal(classic_activations("1f1b", 4, 8, rank), 4 - rank)


@check("2 micro-batches are no more than 2: 1F1B on rank 0 of 4", points=0.25)
def _(rng):
    equal(classic_activations("1f1b", 4, 2, 0), 2)


@check("interleaved on rank 0 of 4: 11 with two chunks a rank, and with one chunk 4 as 1F1B", points=0.25)
def _(rng):
    equal(classic_activations("interleaved", 4, 8, 0, 2), 11)
    equal(classic_activations("interleaved", 4, 8, 0, 1), 4)


@check("3 ranks, 11 micro-batches, two chunks a rank: groups of 4, 4 and 3, and 9 on rank 0", points=0.25)
def _(rng):
    equal(classic_activations("interleaved", 3, 11, 0, 2), 9)


### BEGIN HIDDEN TESTS
def peak(ahead, forwards):
    """The most that is held where so many forwards come before the turns, counted step by step."""
    ahead = min(ahead, forwards)
    held = most = 0
    for kind in "F" * ahead + "FB" * (forwards - ahead) + "B" * ahead:
        held += 1 if kind == "F" else -1
        most = max(most, held)
    return most


def largest_group(p, m):
    groups = max(number for number in range(1, m + 1) if number == 1 or number * p <= m)
    return max(len(range(first, m, groups)) for first in range(groups))


@check.hidden("GPipe and 1F1B, any p and m", points=0.5)
def _(rng):
    p = rng.randrange(3, 9)
    m = rng.randrange(p + 1, 40)
    for rank in range(p):
        equal(classic_activations("gpipe", p, m, rank), m)
        equal(classic_activations("1f1b", p, m, rank), peak(p - rank - 1, m))
        equal(classic_activations("interleaved", p, m, rank, 1), peak(p - rank - 1, m))


@check.hidden("no more than there are: few micro-batches", points=0.5)
def _(rng):
    p = rng.randrange(6, 10)
    for m in (2, rng.randrange(3, p - 1)):
        for rank in range(p):
            equal(classic_activations("1f1b", p, m, rank), peak(p - rank - 1, m))
            equal(classic_activations("interleaved", p, m, rank, 2), peak(2 * (p - rank - 1) + m, 2 * m))


@check.hidden("interleaved, where p divides m", points=0.5)
def _(rng):
    p, v = rng.randrange(2, 7), rng.randrange(2, 6)
    m = p * rng.randrange(2, 6)
    for rank in range(p):
        ahead = 2 * (p - rank - 1) + (v - 1) * p
        equal(classic_activations("interleaved", p, m, rank, v), peak(ahead, v * m))


@check.hidden("interleaved, where p does not divide m: the largest group counts", points=0.5)
def _(rng):
    for p in (*range(3, 8), *range(3, 8)):
        v = rng.randrange(2, 6)
        m = p * rng.randrange(1, 4) + rng.randrange(1, p)
        for rank in range(p):
            ahead = 2 * (p - rank - 1) + (v - 1) * largest_group(p, m)
            equal(classic_activations("interleaved", p, m, rank, v), peak(ahead, v * m))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# What it comes to on the first rank, in activations of all of its layers. Interleaving makes the bubble smaller and is
# paid for in memory: where $p$ divides $m$, the rank holds $p + (p - 1)/v$ of them, and with 1F1B it holds $p$.

# %%
print("p = 8, m = 64     bubble over the ideal   held by rank 0")
for name, v in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)):
    held = classic_activations(name, 8, 64, 0, v) / v
    print(f"{name:11} v = {v}  {classic_bubble(8, 64, v, 'ideal'):21.1%}   {held:14.4g}")

# %% [markdown]
# ## 6. Predict, then run
#
# Here is a run of 1F1B, drawn from your id. Its stages are **not** equal: each has its own time for a forward and for a
# backward. And its links are slow: what one rank hands to another is there for it a while after the operation has
# ended. A transfer keeps no rank busy, and any number of them may be under way at a time.
#
# **Before** you run the cells behind it, commit to a number: how many milliseconds go by from the start of the first
# operation to the end of the last, the makespan? Neither the chapter's formulas nor yours answer this; they are for
# equal stages, or for transfers that take no time. Work it out on paper, or with a program of your own. It is graded
# within 1 % of the right value.
#
# <details><summary>Hint: on paper</summary>
#
# Draw a line for each rank, and on it the rank's operations in its order. Begin with F0 on rank 0. An operation starts
# when two things are done: the operation before it on the same line, and the arrival of what it needs from another
# rank, if it needs something. Whichever comes later decides. A program does the same; it needs the end of each
# operation, and takes them in an order in which what is needed comes first.
# </details>
#
# <details><summary>Hint: my short formula is a few percent off</summary>
#
# Most short formulas take the dearest stage for the one that sets the pace. Look at rank 0: it does p forwards, and
# then needs the gradient of micro-batch 0. Where has that one been meanwhile, and how long did it take? If that is
# longer than p turns of the dearest stage, then every rank waits.
# </details>


# %% nbgrader={"grade_id": "draw", "locked": true}
def draw_run(rng):
    """p, m, what a forward and a backward take on each stage, and what a transfer takes, in milliseconds."""
    p = rng.choice([3, 4])
    m = rng.choice([5, 6, 8] if p == 3 else [6, 7, 8])
    forward = rng.sample(range(20, 30), p)
    # A backward takes two forwards' time, or three on a stage that keeps no activations and computes them again.
    return p, m, forward, [rng.choice([2, 3]) * cost for cost in forward], rng.randrange(20, 40)


my_p, my_m, my_forward, my_backward, my_transfer = draw_run(student_rng(student_id, "pipeline_parallelism"))
print(f"1F1B, p = {my_p}, m = {my_m}")
print(f"forward  {my_forward} ms\nbackward {my_backward} ms\ntransfer {my_transfer} ms")

# %% nbgrader={"grade_id": "predicted_makespan", "solution": true}
# Set predicted_makespan to your prediction: milliseconds, a plain number.
### BEGIN SOLUTION
from functools import cache

orders = one_f_one_b_orders(my_p, my_m)


@cache
def end_of(rank, place):
    """When the operation at this place of the rank's order ends: it starts when the last thing it needs is there."""
    kind, micro_batch = orders[rank][place]
    there = [end_of(rank, place - 1)] if place else []
    other = {"F": rank - 1, "B": rank + 1}[kind]
    if other in range(my_p):
        there.append(end_of(other, orders[other].index((kind, micro_batch))) + my_transfer)
    return max(there, default=0) + {"F": my_forward, "B": my_backward}[kind][rank]


predicted_makespan = max(end_of(rank, 2 * my_m - 1) for rank in range(my_p))
### END SOLUTION

# %% nbgrader={"grade_id": "test_predicted_makespan", "grade": true}
check = Checks("predicted_makespan")


@check("student_id (first code cell) is your own", points=0)
def _(rng):
    student_rng(student_id, "pipeline_parallelism")
    assert student_id != "student-00", "it is still the placeholder student-00"


@check("a prediction is committed, as a plain number; whether it is right shows below, and when it is graded", points=0)
def _(rng):
    assert type(predicted_makespan) in (int, float), "expected an int or a float; float(...) makes one of most numbers"


@check("it can be: more than the dearest stage works, less than one micro-batch after another takes", points=0)
def _(rng):
    p, m, forward, backward, transfer = draw_run(student_rng(student_id, "pipeline_parallelism"))
    works = m * max(map(sum, zip(forward, backward, strict=True)))
    one_by_one = m * (sum(forward) + sum(backward) + 2 * (p - 1) * transfer)
    if type(predicted_makespan) not in (int, float) or not works < predicted_makespan < one_by_one:
        raise CheckFailed(predicted_makespan, f"more than {works:,} ms and less than {one_by_one:,} ms")


### BEGIN HIDDEN TESTS
def run_out(p, m, forward, backward, transfer):
    """When the last operation ends, from the dependencies alone: each rank takes what is next as soon as it can."""
    ends, free, done = {}, [0] * p, [[0, 0] for _ in range(p)]
    while len(ends) < 2 * p * m:
        for rank in range(p):
            forwards, backwards = done[rank]
            if forwards < m and forwards - backwards < p - rank:
                step, other, cost = ("F", forwards), rank - 1, forward[rank]
            else:
                step, other, cost = ("B", backwards), rank + 1, backward[rank]
            if backwards < m and (not 0 <= other < p or (*step, other) in ends):
                arrived = ends[*step, other] + transfer if 0 <= other < p else 0
                free[rank] = ends[*step, rank] = max(free[rank], arrived) + cost
                done[rank]["FB".index(step[0])] += 1
    return max(free)


@check.hidden("the prediction for your schedule is right within 1 %", points=2)
def _(rng):
    drawn = draw_run(student_rng(student_id, "pipeline_parallelism"))
    close(predicted_makespan, run_out(*drawn), relative=0.01)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# Now run it. Each rank is a thread that goes through your order: it waits until what an operation needs has arrived,
# sleeps for as long as the operation takes, and says that it is done. It is worth no points. A sleep lasts a little
# longer than it was asked to, and so does the run; what is graded is compared with the exact end of your schedule, not
# with this run. In the picture a character is 10 ms, and blanks are time in which a rank waits.

# %%
import threading
import time


def run_on_threads(orders, forward, backward, transfer):
    """Play each rank by a thread; for each rank its operations as (name, start, end), in milliseconds."""
    done = {(rank, *operation): threading.Event() for rank, order in enumerate(orders) for operation in order}
    spans, ends, begin = [[] for _ in orders], {}, time.perf_counter()

    def now():
        return 1000 * (time.perf_counter() - begin)

    def play(rank):
        for kind, micro_batch in orders[rank]:
            needed = (rank - 1 if kind == "F" else rank + 1, kind, micro_batch)
            if needed in done:
                done[needed].wait()
                time.sleep(max(0, ends[needed] + transfer - now()) / 1000)
            start = now()
            time.sleep((forward if kind == "F" else backward)[rank] / 1000)
            ends[rank, kind, micro_batch] = now()
            spans[rank].append((f"{kind}{micro_batch}", start, ends[rank, kind, micro_batch]))
            done[rank, kind, micro_batch].set()

    ranks = [threading.Thread(target=play, args=(rank,), daemon=True) for rank in range(len(orders))]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    return spans


def draw(spans):
    """A line for each rank, a character for 10 ms."""
    for rank, operations in enumerate(spans):
        line = ""
        for name, start, end in operations:
            line = line.ljust(round(start / 10)) + name
            line = line.ljust(round(end / 10), "-")
        print(f"rank {rank}: {line}")


def makespan(spans):
    """When the last operation of any rank ended."""
    return max(operations[-1][2] for operations in spans)


spans = run_on_threads(runnable(one_f_one_b_orders(my_p, my_m), my_p, my_m), my_forward, my_backward, my_transfer)
draw(spans)
measured(f"1F1B on {my_p} threads", predicted_makespan, makespan(spans), "ms")

# %% [markdown]
# And your two schedules on equal stages, with transfers that take no time. They take equally long, and their bubble is
# the one of your formula; what they hold meanwhile differs.

# %%
for name, make in (("gpipe", gpipe_orders), ("1f1b", one_f_one_b_orders)):
    spans = run_on_threads(runnable(make(3, 5), 3, 5), [20] * 3, [40] * 3, 0)
    idle = 1 - sum(end - start for _, start, end in spans[0]) / makespan(spans)
    held = [classic_activations(name, 3, 5, rank) for rank in range(3)]
    print(f"{name}: idle {idle:.1%}, by your formula {classic_bubble(3, 5):.1%}; the ranks hold {held}")
    draw(spans)

# %% [markdown]
# ## Explain
#
# Two sentences for yourself; they are not graded. In your drawn run, which of the two would have saved more: a dearest
# stage that is 5 ms faster, or transfers that are? How could rank 0 have had something to do while it waited?
