# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lab: fill the budget
#
# | | |
# |---|---|
# | **Device** | any; a laptop's CPU is enough, and a GPU would have nothing to do |
# | **Time** | about 75 minutes; the whole notebook runs in under half a minute |
# | **Difficulty** | moderate: short functions, in which the order of things matters |
# | **Needs** | the chapter *Dynamic SplitFuse* |
#
# A server computes step after step, and in each step it may run so many tokens through the model: the *budget*. You will
# write the policy that decides whose tokens those are. Long prompts are cut, short ones share a step, and whoever is
# already being answered gets a token in every step. Then you choose a budget for bounds on latency, predict
# the tail of the gaps between tokens, and measure it with your own policy, step by step.
#
# You write each answer in one cell, in place of `raise NotImplementedError()`. The cell after it checks your answer
# property by property; when you hand in, hidden checks run the same functions on other inputs. The five exercises
# are worth 3, 3, 5, 4 and 2 points.
#
# Three words. A request is **in context** while tokens of its prompt are still to be computed; the step that computes the
# last of them yields its first output token. From then on it is **decoding**: each step computes one token of it and
# yields the next. A **chunk** is as much of one prompt as one step computes.
#
# First, say who you are. One exercise draws its workload from your id, so that everyone predicts another number.

# %%
student_id = "student-00"  # your id, as your instructor knows it

# %% nbgrader={"grade_id": "given", "locked": true}
from llmlab.batching.metrics import percentile
from llmlab.grading.checks import CheckFailed, Checks, close, equal, measured, student_rng
from llmlab.grading.withhold import withhold

# These names of the package are the exercises, or answer them, so here they raise. The rest of llmlab works.
withhold(
    [
        "llmlab.batching.metrics.Metrics",
        "llmlab.batching.metrics.RequestRecord",
        "llmlab.batching.policies.splitfuse.SplitFuse",
        "llmlab.batching.policies.orca.OrcaBatching",
        "llmlab.batching.policies.prefill_first.PrefillFirst",
        "llmlab.batching.policies.static.StaticBatching",
        "llmlab.batching.policies.fill.fill_with_context",
        "llmlab.batching.policies.fill.admit_and_fill",
        "llmlab.batching.simulate.simulate",
        "llmlab.engine.engine.Engine",
    ]
)


def seconds_of(points, tokens):
    """How long a step of so many tokens takes, on straight lines through measured points.

    points: a list of (tokens, seconds), both rising. Below the first point a step takes as long as at the first; beyond
    the last the last line goes on.
    """
    if tokens <= points[0][0] or len(points) == 1:
        return points[0][1]
    right = next((i for i, (x, _) in enumerate(points) if x >= tokens), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def is_count(number):
    """Whether this is a whole number, as an int or as a float such as 4.0; True and False are none."""
    return type(number) is int or (type(number) is float and number.is_integer())


def as_counts(got, what):
    """This as a list of plain ints; fails where it is none."""
    if type(got) not in (list, tuple) or not all(map(is_count, got)):
        raise CheckFailed(got, f"a list of whole numbers: {what}")
    return [int(count) for count in got]


# %% [markdown]
# ## 1. Split a prompt
#
# While `decodes` requests are decoding, each of them takes one token of every step. What is left of the budget is for
# prompts. How is one prompt cut, if there is no other?
#
# <details><summary>Hint: which chunk is the short one?</summary>
#
# The last. Every step before it is full: it costs about as much as a full one, so it should do as much.
# </details>


# %% nbgrader={"grade_id": "split_prompt", "solution": true}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    """The chunks in which the prompt of one request is computed, one for each step.

    num_tokens: the prompt's length, 1 or more. budget: tokens of a step, of all requests together. decodes: requests that
    decode meanwhile, one token of the budget each. most: no chunk is longer than this, 1 or more; None for no limit.
    Returns a list of whole numbers, all above 0, that add up to num_tokens. Each is as long as it can be.

    1. Work out how many tokens of a step the prompt can have. Raise ValueError if the decodes leave less than one.
    2. Take full chunks, and then what is left, if anything is.
    """
    ### BEGIN SOLUTION
    room = budget - decodes
    if most is not None:
        room = min(room, most)
    if room < 1:
        raise ValueError(f"a budget of {budget} leaves no room for a prompt")
    full, rest = divmod(num_tokens, room)
    return [room] * full + [rest] * (rest > 0)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_split_prompt", "grade": true}
check = Checks("split_prompt")


def chunks_are(expected, *arguments):
    """Fail unless the answer is this list of chunks."""
    got = as_counts(split_prompt(*arguments), "the chunks, one for each step")
    if got != expected:
        if sum(got) != sum(expected):
            raise CheckFailed(got, f"{expected}: the chunks must add up to the prompt, {sum(expected)}")
        if 0 in got:
            raise CheckFailed(got, f"{expected}: a chunk of no tokens is no chunk")
        raise CheckFailed(got, f"{expected}")


@check("1,000 tokens with a budget of 400: 400, 400, 200", points=0.25)
def _(rng):
    chunks_are([400, 400, 200], 1000, 400)


@check("30 decodes leave 370 of it: 370, 370, 260; a limit of 390 to a chunk changes nothing", points=0.25)
def _(rng):
    chunks_are([370, 370, 260], 1000, 400, 30)
    chunks_are([370, 370, 260], 1000, 400, 30, 390)


@check("a limit of 300 to a chunk: 300, 300, 300, 100", points=0.25)
def _(rng):
    chunks_are([300, 300, 300, 100], 1000, 400, 30, 300)


@check("800 tokens with a budget of 400: two chunks, and no third one of nothing", points=0.25)
def _(rng):
    chunks_are([400, 400], 800, 400)


@check("30 decodes with a budget of 30, or of 20, leave nothing: ValueError", points=0.25)
def _(rng):
    for budget in (30, 20):
        try:
            got = split_prompt(100, budget, 30)
        except ValueError:
            continue
        raise CheckFailed(got, f"a ValueError: a budget of {budget} leaves the prompt no token")


### BEGIN HIDDEN TESTS
def in_single_tokens(num_tokens, room):
    """The chunks, filled token by token."""
    chunks = [0]
    for _ in range(num_tokens):
        if chunks[-1] == room:
            chunks.append(0)
        chunks[-1] += 1
    return chunks


@check.hidden("any length and budget, without decodes", points=0.5)
def _(rng):
    for budget in (1, 7, rng.randrange(20, 90)):
        for num_tokens in (1, budget, budget + 1, 3 * budget, rng.randrange(100, 400)):
            chunks_are(in_single_tokens(num_tokens, budget), num_tokens, budget)


@check.hidden("decodes come off the budget in every step, the last one too", points=0.5)
def _(rng):
    for _ in range(8):
        decodes, room, num_tokens = rng.randrange(1, 60), rng.randrange(1, 60), rng.randrange(2, 500)
        chunks_are(in_single_tokens(num_tokens, room), num_tokens, room + decodes, decodes)


@check.hidden("no chunk is longer than `most`, nor than what the decodes leave", points=0.5)
def _(rng):
    for _ in range(8):
        decodes, budget, num_tokens = rng.randrange(1, 60), rng.randrange(70, 200), rng.randrange(2, 500)
        most = rng.randrange(1, 10)
        chunks_are(in_single_tokens(num_tokens, most), num_tokens, budget, decodes, most)
        most = budget - decodes + rng.randrange(1, decodes + 30)
        chunks_are(in_single_tokens(num_tokens, budget - decodes), num_tokens, budget, decodes, most)


@check.hidden("no room for a single token: ValueError; room for one: it goes on, token by token", points=0.25)
def _(rng):
    decodes = rng.randrange(5, 30)
    chunks_are([1] * 9, 9, decodes + 1, decodes)
    for budget in (decodes, decodes - 1, 1):
        try:
            got = split_prompt(9, budget, decodes)
        except ValueError:
            continue
        raise CheckFailed(got, "a ValueError")


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 2. Fill a step
#
# Now several prompts want to be computed. They get their tokens in the order in which they came, and the step is filled
# to the budget, exactly: short prompts share it, and the one that does not fit is cut.
#
# <details><summary>Hint: what does the fourth of four prompts get?</summary>
#
# What the three before it have left, and that may be nothing. Keep a count of what is left, and take from it.
# </details>


# %% nbgrader={"grade_id": "fill_budget", "solution": true}
def fill_budget(prompts, budget, most=None):
    """How many tokens of each prompt one step computes.

    prompts: a list of how many tokens of each are still to be computed, in the order of arrival. budget: tokens that are
    left in this step for prompts. most: of one prompt in a step, 1 or more; None for no such limit.
    Returns a list as long as ``prompts``; 0 for those that get nothing in this step.

    Go through the prompts once, in order. Each gets as much as it needs, as there is left, and as ``most`` allows.
    """
    ### BEGIN SOLUTION
    counts = []
    for left in prompts:
        count = min(left, budget, left if most is None else most)
        counts.append(count)
        budget -= count
    return counts
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_fill_budget", "grade": true}
check = Checks("fill_budget")


def counts_are(expected, prompts, budget, most=None):
    """Fail unless the answer is this list of counts."""
    got = as_counts(fill_budget(list(prompts), budget, most), "one for each prompt")
    if got != expected:
        if len(got) != len(prompts):
            raise CheckFailed(got, f"{expected}, with a number for each of the {len(prompts)} prompts")
        if sum(got) > budget:
            raise CheckFailed(got, f"{expected}, which is no more than the budget of {budget}")
        if any(count > left for count, left in zip(got, prompts, strict=True)):
            raise CheckFailed(got, f"{expected}: no prompt has more to compute than it has left, {list(prompts)}")
        raise CheckFailed(got, f"{expected}")


@check("prompts of 300, 50 and 400 in a budget of 512: 300, 50, and 162 of the third", points=0.25)
def _(rng):
    counts_are([300, 50, 162], [300, 50, 400], 512)


@check("prompts of 600 and 100 in a budget of 512: the first is cut, the second waits", points=0.25)
def _(rng):
    counts_are([512, 0], [600, 100], 512)


@check("three prompts of 800, at most 400 of each, in a budget of 1,024: 400, 400, 224", points=0.25)
def _(rng):
    counts_are([400, 400, 224], [800, 800, 800], 1024, 400)


@check("prompts of 20 and 30 do not fill a budget of 512: 20, 30", points=0.25)
def _(rng):
    counts_are([20, 30], [20, 30], 512)


### BEGIN HIDDEN TESTS
def token_by_token(prompts, budget, most):
    """The same, given out one token at a time."""
    counts = [0] * len(prompts)
    for i, left in enumerate(prompts):
        while budget > 0 and counts[i] < left and (most is None or counts[i] < most):
            counts[i] += 1
            budget -= 1
    return counts


@check.hidden("drawn prompts: filled in order, and exactly", points=0.75)
def _(rng):
    for _ in range(10):
        prompts = [rng.randrange(1, 60) for _ in range(rng.randrange(3, 9))]
        budget = rng.randrange(5, sum(prompts))
        counts_are(token_by_token(prompts, budget, None), prompts, budget)


@check.hidden("the budget runs out, on the last token of a prompt or within it: those behind get 0", points=0.5)
def _(rng):
    for _ in range(4):
        prompts = [rng.randrange(2, 60) for _ in range(6)]
        counts_are([*prompts[:3], 0, 0, 0], prompts, sum(prompts[:3]))
        counts_are([*prompts[:3], 1, 0, 0], prompts, sum(prompts[:3]) + 1)


@check.hidden("at most so many tokens of each prompt: those behind get what is left over", points=0.5)
def _(rng):
    for _ in range(10):
        prompts = [rng.randrange(1, 60) for _ in range(rng.randrange(3, 9))]
        budget, most = rng.randrange(5, 150), rng.randrange(2, 50)
        counts_are(token_by_token(prompts, budget, most), prompts, budget, most)


@check.hidden("more budget than there is to compute, and prompts of one token", points=0.25)
def _(rng):
    prompts = [rng.randrange(2, 60) for _ in range(5)] + [1]
    counts_are(prompts, prompts, sum(prompts) + rng.randrange(1, 100))
    counts_are(prompts, prompts, sum(prompts))
    counts_are([1] * 6, prompts, 100, 1)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 3. The whole policy
#
# One step of a server, from what is running and what waits. The order is the point:
#
# 1. every request that **decodes** gets its one token, so that nobody who is reading waits for a stranger's prompt;
# 2. prompts that were **begun** go on, in the order in which they were admitted;
# 3. what is left goes to those who **wait**, first come, first served.
#
# Admission is also a matter of memory: the keys and values of every token need a slot in the KV cache. A request is
# admitted only if there are free slots for its *whole* prompt, and from then on these are promised to it, however
# little of it the first step computes. If the first that waits does not fit, nobody overtakes it.
# (That everybody who decodes has a slot for the next token is seen to elsewhere.)
#
# <details><summary>Hint: how do I see whether a request decodes?</summary>
#
# It has computed its whole prompt: <code>computed >= prompt</code>. It stands in <code>running</code> among others that have not,
# in the order of admission. So go through <code>running</code> twice.
# </details>
#
# <details><summary>Hint: how many are running?</summary>
#
# Those in <code>running</code>, decoding or not, and those that this step has admitted.
# </details>


# %% nbgrader={"grade_id": "schedule", "solution": true}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    """What one step computes: a list of (request_id, tokens), in the order decodes, prompts begun, prompts new.

    running: a list of (request_id, prompt, computed) in the order of admission: the prompt's length, and how many tokens
    of the request have been computed. waiting: a list of (request_id, prompt) in the order of arrival.
    budget: tokens of the step, at least as many as there are decodes. free_slots: slots of the KV cache that are neither
    used nor promised; what runs has its own. max_running: requests that may run at a time. most: tokens of one prompt in
    a step, 1 or more, or None.
    No request stands in the list twice, none with 0 tokens.

    1. One token of each request that decodes.
    2. Of each running request in context what it needs, as far as budget and ``most`` allow.
    3. While budget is left: admit the first that waits, if one more may run and its whole prompt fits into the free
       slots; take these, and give it its first chunk. Stop at the first that cannot be admitted.
    """
    ### BEGIN SOLUTION
    plan = [(request_id, 1) for request_id, prompt, computed in running if computed >= prompt]
    left = budget - len(plan)
    admitted = len(running)
    for request_id, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((request_id, count))
            left -= count
    for request_id, prompt in waiting:
        if left == 0 or admitted >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((request_id, count))
        left -= count
        free_slots -= prompt
        admitted += 1
    return plan
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_schedule", "grade": true}
check = Checks("schedule")

PLENTY = 10**9  # of slots, or of requests that may run


def as_plan(plan, budget):
    """The step as a list of (request_id, tokens); fails where it has another form, or is more than the budget."""
    form = "a list of tuples (request_id, tokens), such as [('a', 1), ('b', 200)]"
    if type(plan) not in (list, tuple) or any(type(entry) not in (list, tuple) or len(entry) != 2 for entry in plan):
        raise CheckFailed(plan, form)
    if not all(type(request_id) is str and is_count(count) for request_id, count in plan):
        raise CheckFailed(plan, form)
    if any(count < 1 for _, count in plan):
        raise CheckFailed(plan, "no request with fewer than one token")
    if len({request_id for request_id, _ in plan}) < len(plan):
        raise CheckFailed(plan, "each request once")
    if sum(count for _, count in plan) > budget:
        raise CheckFailed(
            sum(int(count) for _, count in plan), f"tokens in the step, {budget} at most: that is its budget"
        )
    return [(request_id, int(count)) for request_id, count in plan]


def plan_is(expected, running, waiting, budget, free_slots=PLENTY, max_running=PLENTY, most=None):
    """Fail unless the step is this one."""
    got = as_plan(schedule(list(running), list(waiting), budget, free_slots, max_running, most), budget)
    if got != expected:
        same = sorted(got) == sorted(expected)
        raise CheckFailed(got, f"{expected}" + (": the order is decodes, prompts begun, prompts new" if same else ""))


@check("decodes first, one token each, then the prompt that was begun, then those that wait", points=0.25)
def _(rng):
    running = [("a", 100, 104), ("b", 900, 512), ("c", 40, 40)]
    plan_is([("a", 1), ("c", 1), ("b", 388), ("d", 70), ("e", 52)], running, [("d", 70), ("e", 300)], 512)


@check(
    "three prompts of 800 that wait, at most 400 tokens of each, budget 1,024: 400, 400, 224; and if two were begun",
    points=0.25,
)
def _(rng):
    plan_is([("a", 400), ("b", 400), ("c", 224)], [], [("a", 800), ("b", 800), ("c", 800)], 1024, most=400)
    plan_is([("a", 400), ("b", 400), ("c", 224)], [("a", 900, 1), ("b", 900, 9)], [("c", 800)], 1024, most=400)


@check("the first that waits does not fit into the free slots: nobody overtakes it", points=0.25)
def _(rng):
    plan_is([("a", 1)], [("a", 10, 12)], [("b", 600), ("c", 20)], 512, free_slots=500)


@check("a prompt's slots are all promised when it is admitted, not only those of its first chunk", points=0.25)
def _(rng):
    plan_is([("a", 200), ("b", 200)], [], [("a", 400), ("b", 500), ("c", 300)], 1024, free_slots=1000, most=200)


@check("three requests may run: two do, so a third is admitted and a fourth waits", points=0.25)
def _(rng):
    plan_is([("a", 1), ("b", 10), ("c", 30)], [("a", 9, 9), ("b", 20, 10)], [("c", 30), ("d", 40)], 512, max_running=3)


@check("500 free slots are enough for a prompt of 500, since those that run have theirs already", points=0.25)
def _(rng):
    plan_is([("a", 1), ("b", 200), ("c", 500)], [("a", 10, 12), ("b", 300, 100)], [("c", 500)], 1024, free_slots=500)


@check("the budget is used up: who gets no token is not in the list, and nobody is admitted", points=0.25)
def _(rng):
    running = [("a", 5, 5), ("b", 100, 50), ("c", 80, 10)]
    plan_is([("a", 1), ("b", 50)], running, [("d", 20)], 51)
    plan_is([("a", 1)], running, [("d", 20)], 1)


### BEGIN HIDDEN TESTS
def drawn_server(rng):
    """Requests that run, some of them decoding, and some that wait, with a budget that some of them do not fit into."""
    running, names = [], iter(rng.sample([f"r{number}" for number in range(100, 999)], 30))
    for _ in range(rng.randrange(4, 9)):
        prompt = rng.randrange(20, 200)
        computed = prompt + rng.randrange(0, 50) if rng.random() < 0.5 else rng.randrange(0, prompt)
        running.append((next(names), prompt, computed))
    waiting = [(next(names), rng.randrange(5, 200)) for _ in range(rng.randrange(4, 9))]
    return running, waiting


def by_hand(running, waiting, budget, free_slots, max_running, most):
    """The same step, given out one token at a time."""
    given = {}

    def give(request_id, wanted):
        while wanted > 0 and sum(given.values()) < budget and (most is None or given.get(request_id, 0) < most):
            given[request_id] = given.get(request_id, 0) + 1
            wanted -= 1

    for request_id, prompt, computed in running:
        if not computed < prompt:
            given[request_id] = 1
    for request_id, prompt, computed in running:
        give(request_id, prompt - computed)
    queue, slots, number = list(waiting), free_slots, len(running)
    while queue and queue[0][1] <= slots and number < max_running and sum(given.values()) < budget:
        request_id, prompt = queue.pop(0)
        slots, number = slots - prompt, number + 1
        give(request_id, prompt)
    return list(given.items())


def same_as_by_hand(running, waiting, budget, free_slots=PLENTY, max_running=PLENTY, most=None):
    expected = by_hand(running, waiting, budget, free_slots, max_running, most)
    plan_is(expected, running, waiting, budget, free_slots, max_running, most)


@check.hidden("drawn servers: the budget is filled in the right order, and exactly", points=0.75)
def _(rng):
    for _ in range(12):
        running, waiting = drawn_server(rng)
        in_context = sum(max(0, prompt - computed) for _, prompt, computed in running)
        for budget in (10, in_context + rng.randrange(10, 300), rng.randrange(20, 900)):
            same_as_by_hand(running, waiting, budget)


@check.hidden(
    "free slots: the whole prompt must fit, to the last slot; whoever does not fit holds up all behind", points=0.5
)
def _(rng):
    for _ in range(6):
        running, waiting = drawn_server(rng)
        first, second, third = (prompt for _, prompt in waiting[:3])
        for free_slots in (first - 1, first, first + second - 1, first + second, first + second + third + 1):
            same_as_by_hand(running, waiting, 2000, free_slots)
            same_as_by_hand(running, waiting, 2000, free_slots, most=rng.randrange(2, 30))
        small = [*waiting[:1], (waiting[1][0], 900), ("small", 2), ("smaller", 1)]
        same_as_by_hand(running, small, 2000, first + 500)


@check.hidden("requests that may run: those in context and those just admitted count too", points=0.5)
def _(rng):
    for _ in range(6):
        running, waiting = drawn_server(rng)
        for more in (0, 1, 2, 3):
            same_as_by_hand(running, waiting, 3000, max_running=len(running) + more)


@check.hidden("at most so many tokens of one prompt: begun or new, and the rest goes to those behind", points=0.5)
def _(rng):
    for _ in range(8):
        running, waiting = drawn_server(rng)
        same_as_by_hand(running, waiting, rng.randrange(40, 400), most=rng.randrange(1, 40))


@check.hidden("a budget that the decodes use up: no prompt goes on, and nobody is admitted", points=0.25)
def _(rng):
    running, waiting = drawn_server(rng)
    running = [*running, ("y", 10, 12), ("z", 10, 10), ("x", 10, 9)]
    decodes = [(request_id, 1) for request_id, prompt, computed in running if computed >= prompt]
    plan_is(decodes, running, waiting, len(decodes))
    plan_is(decodes, running, waiting, len(decodes), most=5)


def serve(prompts, outputs, budget, slots, max_running):
    """All steps until every request has its tokens; fails where one that decodes gets no token in a step."""
    lengths = {f"r{number}": prompt for number, prompt in enumerate(prompts)}
    wanted = {f"r{number}": output for number, output in enumerate(outputs)}
    waiting, running, firsts, steps = list(lengths.items()), {}, [], 0
    while waiting or running:
        promised = sum(lengths[name] + wanted[name] for name in running)
        state = [(name, lengths[name], computed) for name, computed in running.items()]
        plan = as_plan(schedule(state, list(waiting), budget, slots - promised, max_running, None), budget)
        decoding = {name for name, prompt, computed in state if computed >= prompt}
        missed = decoding - {name for name, _ in plan}
        if missed or not plan:
            raise CheckFailed(plan, f"a token of each request that decodes, {sorted(decoding)}, and some of a prompt")
        for name, count in plan:
            if name not in running:
                equal(name, waiting.pop(0)[0])
                running[name] = 0
            if count > max(1, lengths[name] - running[name]):
                raise CheckFailed(count, "no more tokens than the prompt has left")
            running[name] += count
            if running[name] == lengths[name]:
                firsts.append(name)
            if running[name] - lengths[name] == wanted[name] - 1:
                del running[name]
        steps += 1
    return firsts, steps


@check.hidden("a run from start to end: first tokens come in the order of arrival, and no step is wasted", points=0.75)
def _(rng):
    prompts = [rng.randrange(1, 120) for _ in range(12)]
    outputs = [rng.randrange(1, 9) for _ in prompts]
    firsts, steps = serve(prompts, outputs, rng.randrange(30, 60), PLENTY, PLENTY)
    equal(firsts == [f"r{number}" for number in range(12)], True)
    prompts = [rng.randrange(40, 90) for _ in range(8)]
    firsts, steps = serve(prompts, [1] * 8, 50, PLENTY, PLENTY)
    equal(steps, -(-sum(prompts) // 50))
    firsts, steps = serve(prompts, [4] * 8, 50, 200, 3)
    equal(firsts == [f"r{number}" for number in range(8)], True)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 4. A budget for a service level
#
# A large budget computes prompts fast, and makes every step long: whoever is decoding waits for it. A small budget keeps
# steps short, but a prompt needs many of them. A *service level* bounds both. You have measured how long a step takes, by
# its tokens, and ask which budget to set.
#
# `seconds_of(points, tokens)`, given above, reads a step's time off the measured points. For example:

# %%
measured_points = [(64, 0.010), (256, 0.012), (1024, 0.036)]
for tokens in (1, 64, 128, 256, 640, 2048):
    print(f"{tokens:5} tokens: {1000 * seconds_of(measured_points, tokens):.1f} ms")

# %% [markdown]
# <details><summary>Hint: how long is the gap between two tokens at worst?</summary>
#
# As long as a step with a full budget.
# </details>
#
# <details><summary>Hint: when does the first token come?</summary>
#
# When the step with the last chunk has ended. The steps before it are full. The last one holds what is left of the
# prompt, and the decodes, and it is shorter if that is less than the budget. If nothing is left over, there is no such step.
# </details>


# %% nbgrader={"grade_id": "choose_budget", "solution": true}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    """The budget that computes prompts fastest among those that keep a service level; None if none does.

    points: measured (tokens, seconds) of steps, for ``seconds_of``. candidates: a list of budgets, in any order.
    prompt: tokens of a prompt that arrives when nobody else waits. decodes: requests that decode all the while.
    most_ttft, most_itl: seconds, bounds that may be reached but not exceeded.

    A budget B leaves B - decodes tokens of each step for prompts. Leave out each B for which
    1. that is less than one;
    2. a full step takes longer than ``most_itl``;
    3. the steps that compute the prompt, full ones and the last one, take longer than ``most_ttft`` together.
    Of the others return the one with the most prompt tokens a second in full steps, (B - decodes) / seconds of B; where
    two are equal, the smaller budget.
    """
    ### BEGIN SOLUTION
    best, fastest = None, 0.0
    for budget in sorted(candidates):
        room = budget - decodes
        if room < 1:
            continue
        step = seconds_of(points, budget)
        full, rest = divmod(prompt, room)
        ttft = full * step
        if rest:
            ttft += seconds_of(points, rest + decodes)
        if step <= most_itl and ttft <= most_ttft and room / step > fastest:
            best, fastest = budget, room / step
    return best
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_choose_budget", "grade": true}
check = Checks("choose_budget")

MEASURED = [(64, 0.010), (256, 0.012), (1024, 0.036), (4096, 0.136)]
BUDGETS = [2048, 64, 128, 256, 512, 1024, 4096]


def numbers_of(budget, points, candidates, prompt, decodes, most_ttft, most_itl):
    """What a budget comes to, in words; ``points`` as for ``seconds_of``."""
    if budget not in candidates:
        return "is none of the candidates"
    if budget <= decodes:
        return "leaves no token for a prompt"
    step, ttft, left = seconds_of(points, budget), 0.0, prompt
    while left > 0:
        chunk = min(left, budget - decodes)
        ttft, left = ttft + seconds_of(points, chunk + decodes), left - chunk
    return (
        f"has steps of {1e3 * step:.1f} ms ({1e3 * most_itl:.1f} allowed), a first token after {1e3 * ttft:.1f} ms "
        f"({1e3 * most_ttft:.1f} allowed), and {(budget - decodes) / step:,.0f} prompt tokens a second"
    )


def budget_is(expected, *arguments):
    """Fail unless this budget is chosen."""
    got = choose_budget(*arguments)
    if got is None or (type(got) in (int, float) and got == expected):
        if got == expected:
            return
        raise CheckFailed(got, f"{expected:,}, which {numbers_of(expected, *arguments)}")
    if type(got) not in (int, float):
        raise CheckFailed(got, "one of the candidates (a plain int) or None")
    right = "None, since no budget keeps both bounds" if expected is None else f"{expected:,}"
    its = "" if expected is None else f", which {numbers_of(expected, *arguments)}"
    raise CheckFailed(got, f"{right}{its}; {got:,} {numbers_of(got, *arguments)}")


@check("loose bounds: the largest budget computes prompts fastest", points=0.25)
def _(rng):
    budget_is(4096, MEASURED, BUDGETS, 2000, 32, 9.0, 9.0)


@check("gaps of 40 ms at most: 1,024", points=0.25)
def _(rng):
    budget_is(1024, MEASURED, BUDGETS, 2000, 32, 9.0, 0.040)


@check("gaps of 15 ms: 256. A prompt of 2,000 then takes 8 full steps and one of 240 tokens: 107.8 ms", points=0.25)
def _(rng):
    budget_is(256, MEASURED, BUDGETS, 2000, 32, 0.1079, 0.015)
    budget_is(None, MEASURED, BUDGETS, 2000, 32, 0.1077, 0.015)


@check("a prompt of 2,016 takes 9 full steps of 256 tokens, 12 ms each, and there is no tenth", points=0.25)
def _(rng):
    budget_is(256, MEASURED, [256], 2016, 32, 0.1081, 0.015)


@check("bounds may be reached: a prompt of 96 in one step of 0.5 s, where both bounds are 0.5 s", points=0.25)
def _(rng):
    budget_is(128, [(64, 0.25), (128, 0.5)], [64, 128], 96, 32, 0.5, 0.5)


@check("a step of 512 tokens takes 60 ms, one of 256 12 ms: 256 computes prompts faster", points=0.25)
def _(rng):
    budget_is(256, [(64, 0.010), (256, 0.012), (512, 0.060)], [256, 512], 2000, 32, 9.0, 9.0)


@check("the decodes come off: with 32 of them 128 in 22 ms is faster for prompts than 64 in 10 ms", points=0.25)
def _(rng):
    budget_is(128, [(64, 0.010), (128, 0.022)], [64, 128], 500, 32, 9.0, 9.0)


@check("132 tokens in 1 s and 232 in 2 s are equally fast beside 32 decodes: the smaller, 132", points=0.25)
def _(rng):
    budget_is(132, [(132, 1.0), (232, 2.0)], [232, 132], 100, 32, 9.0, 9.0)


@check("64 decodes use a budget of 64 up: it computes no prompt", points=0.25)
def _(rng):
    budget_is(None, MEASURED, [64], 100, 64, 9.0, 9.0)
    budget_is(128, MEASURED, [64, 128], 100, 64, 9.0, 9.0)


### BEGIN HIDDEN TESTS
def step_by_step(points, budget, prompt, decodes):
    """Seconds until the prompt is computed, one step after the other."""
    seconds = 0.0
    while prompt > 0:
        chunk = min(prompt, budget - decodes)
        seconds += seconds_of(points, chunk + decodes)
        prompt -= chunk
    return seconds


def right_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    kept = [
        (-(budget - decodes) / seconds_of(points, budget), budget)
        for budget in candidates
        if budget > decodes and seconds_of(points, budget) <= most_itl
        if step_by_step(points, budget, prompt, decodes) <= most_ttft
    ]
    return min(kept)[1] if kept else None


def drawn_points(rng):
    """Steps that are nearly free up to some tokens, and then cost more and more; in whole 1,024ths of a second."""
    floor, knee = rng.randrange(6, 14), rng.choice([128, 256, 384])
    points = [(32, floor / 1024), (knee, (floor + 1) / 1024)]
    slope = rng.randrange(2, 5)
    for tokens in (2 * knee, 4 * knee, 16 * knee):
        (x, y), slope = points[-1], slope + rng.randrange(0, 2)
        points.append((tokens, y + slope * (tokens - x) / 128 / 1024))
    return points


@check.hidden("the bound on the gaps decides: of the budgets that keep it the fastest", points=0.25)
def _(rng):
    for _ in range(6):
        points, decodes = drawn_points(rng), rng.randrange(1, 40)
        candidates = rng.sample(range(64, 3000), 9)
        for budget in rng.sample(candidates, 3):
            most_itl = seconds_of(points, budget) * 1.0001
            arguments = points, candidates, 1000, decodes, 99.0, most_itl
            budget_is(right_budget(*arguments), *arguments)


@check.hidden("the bound on the first token decides: the last step is shorter, or is none", points=0.75)
def _(rng):
    for _ in range(8):
        points, decodes = drawn_points(rng), rng.randrange(20, 60)
        budget = rng.randrange(200, 700)
        room = budget - decodes
        for prompt in (3 * room, 4 * room + rng.randrange(1, room), rng.randrange(1, room)):
            ttft = step_by_step(points, budget, prompt, decodes)
            budget_is(budget, points, [budget], prompt, decodes, ttft * 1.001, 99.0)
            budget_is(None, points, [budget], prompt, decodes, ttft * 0.999, 99.0)


@check.hidden("decodes come off each budget, and a budget that they use up is none", points=0.25)
def _(rng):
    for _ in range(6):
        points, decodes = drawn_points(rng), rng.randrange(40, 200)
        candidates = [decodes + 1, decodes, decodes - 7, rng.randrange(decodes + 2, 2 * decodes), decodes - 1]
        arguments = points, candidates, rng.randrange(10, 900), decodes, 1e9, 1e9
        budget_is(right_budget(*arguments), *arguments)
        budget_is(decodes + 1, points, candidates[:3], 10, decodes, 1e9, 1e9)
        budget_is(decodes + 1, [(8, 4.0), (4096, 40.0)], candidates[:3], 10, decodes, 1e9, 1e9)


@check.hidden("more is not always faster: prompt tokens a second may fall with the budget", points=0.25)
def _(rng):
    for _ in range(4):
        knee, decodes = rng.randrange(200, 400), rng.randrange(1, 30)
        points = [(64, 0.01), (knee, 0.012), (2 * knee, 0.012 * rng.uniform(2.5, 4)), (4 * knee, 0.2)]
        candidates = [*rng.sample(range(64, knee), 4), knee, 2 * knee, 4 * knee]
        rng.shuffle(candidates)
        budget_is(knee, points, candidates, 500, decodes, 99.0, 99.0)


@check.hidden("bounds are reached exactly, and of two budgets that are equally fast the smaller is taken", points=0.25)
def _(rng):
    d = rng.randrange(1, 30)
    points = [(100 + d, 1.0), (200 + d, 2.0), (400 + d, 8.0)]
    budget_is(100 + d, points, [200 + d, 100 + d], 400, d, 99.0, 99.0)
    budget_is(100 + d, points, [400 + d, 200 + d, 100 + d], 400, d, 99.0, 1.0)
    budget_is(200 + d, points, [400 + d, 200 + d, 50], 400, d, 4.0, 2.0)
    budget_is(None, points, [400 + d, 200 + d], 400, d, 3.999, 2.0)
    budget_is(None, points, [400 + d, 200 + d], 400, d, 4.0, 1.999)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 5. Predict the tail, then measure
#
# Some requests decode, each with a first token at the end of step 1 and another at the end of each step after it. Meanwhile long
# prompts arrive, far enough apart that each is done before the next one comes, and each for one single token of output. A
# step of $T$ tokens takes, in milliseconds,
#
# $$ \text{fixed} + \max(\text{floor},\; T / \text{rate}) $$
#
# whatever is in the KV cache; the rate is in tokens a millisecond. Two policies serve the same requests: yours, with the
# drawn budget; and *prefill first*, which computes a prompt whole in a step of its own, without the decodes, and
# then lets them go on in the next step.
#
# Look at the gaps between tokens, all gaps of all requests. By how many **milliseconds** is their 99th percentile shorter
# under your policy than under prefill first? Below are the numbers drawn from your id, of two runs: at night fewer
# prompts come than by day. **Before** you run the measuring cell, commit to an answer for each; it is negative where the
# percentile is longer under your policy. Each is graded within 1 % of the right value.
#
# <details><summary>Hint: where do I begin?</summary>
#
# With one request that decodes. It has <code>outputs - 1</code> gaps. How many of them are longer than usual under each
# policy? If more than 1 % are, the 99th percentile is one of these; if fewer, it is as long as the usual gap.
# </details>
#
# <details><summary>Hint: how long is a gap under prefill first, when a prompt comes in between?</summary>
#
# From a token to the next one the request waits for two steps: that with the prompt, and the one that decodes.
# </details>


# %% nbgrader={"grade_id": "draw", "locked": true}
def draw_run(rng):
    """A step's cost in milliseconds and tokens a millisecond, a budget, requests that decode, and long prompts of two runs."""
    return {
        "fixed": rng.randrange(30, 50) / 10,
        "floor": rng.randrange(60, 90) / 10,
        "rate": rng.randrange(14, 20),
        "budget": rng.choice([256, 320, 384, 448]),
        "decodes": rng.randrange(40, 60),
        "outputs": rng.randrange(340, 420),
        "prompts": rng.randrange(5, 10),
        "prompts at night": rng.randrange(2, 4),
        "tokens of a prompt": rng.randrange(1400, 2400),
    }


my_run = draw_run(student_rng(student_id, "splitfuse"))
my_run

# %% nbgrader={"grade_id": "predicted_saving", "solution": true}
# Set predicted_saving to your prediction by day, and predicted_at_night to that at night: milliseconds, plain numbers.
### BEGIN SOLUTION
decode_step = my_run["fixed"] + my_run["floor"]
stalled = decode_step + my_run["fixed"] + my_run["tokens of a prompt"] / my_run["rate"]
full_step = my_run["fixed"] + my_run["budget"] / my_run["rate"]
predicted_saving, predicted_at_night = (
    (stalled if my_run[prompts] / my_run["outputs"] > 0.01 else decode_step) - full_step
    for prompts in ("prompts", "prompts at night")
)
### END SOLUTION

# %% nbgrader={"grade_id": "test_predicted_saving", "grade": true}
check = Checks("predicted_saving")


@check("student_id (first code cell) is your own", points=0)
def _(rng):
    student_rng(student_id, "splitfuse")
    assert student_id != "student-00", "it is still the placeholder student-00"


@check("two predictions are committed, as plain numbers; whether they are right shows when they are graded", points=0)
def _(rng):
    for saving in (predicted_saving, predicted_at_night):
        assert type(saving) in (int, float), "expected an int or a float; float(...) makes one of most numbers"


@check("they can be: neither saves or costs more than one prompt and two decode steps take", points=0)
def _(rng):
    run = draw_run(student_rng(student_id, "splitfuse"))
    most = 3 * run["fixed"] + 2 * run["floor"] + run["tokens of a prompt"] / run["rate"]
    for saving in (predicted_saving, predicted_at_night):
        if type(saving) not in (int, float) or not -most < saving < most:
            raise CheckFailed(saving, f"more than {-most:.1f} ms and less than {most:.1f} ms")


### BEGIN HIDDEN TESTS
def tail_of(run, prompts, whole):
    """The 99th percentile of one request's gaps, step by step; the prompts come every 30 tokens. whole: prompts first."""
    gaps, left, waited = [], 0, 0.0
    while len(gaps) < run["outputs"] - 1:
        if len(gaps) % 30 == 29 and len(gaps) < 30 * prompts and not left:
            left = run["tokens of a prompt"]
        if whole and left:
            waited, left = run["fixed"] + max(run["floor"], left / run["rate"]), 0
        chunk = min(left, run["budget"] - run["decodes"])
        left -= chunk
        gaps.append(waited + run["fixed"] + max(run["floor"], (run["decodes"] + chunk) / run["rate"]))
        waited = 0.0
    return sorted(gaps)[round(0.99 * (len(gaps) - 1))]


def saved(run, prompts):
    return tail_of(run, prompts, True) - tail_of(run, prompts, False)


@check.hidden("the prediction by day is right within 1 %", points=1)
def _(rng):
    run = draw_run(student_rng(student_id, "splitfuse"))
    close(predicted_saving, saved(run, run["prompts"]), relative=0.01)


@check.hidden("and that at night, with fewer prompts, is right too", points=1)
def _(rng):
    run = draw_run(student_rng(student_id, "splitfuse"))
    close(predicted_saving, saved(run, run["prompts"]), relative=0.01)
    close(predicted_at_night, saved(run, run["prompts at night"]), relative=0.01)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# Now serve the requests of both runs step by step, once with your `schedule` and once with prefill first. It is worth no
# points. Look at the median too, and at the longest gap.


# %%
def yours(running, waiting):
    return schedule(running, waiting, my_run["budget"], 10**9, 10**9)


def prefill_first(running, waiting):
    """Whole prompts in a step of their own; then those that decode go on."""
    return waiting or [(name, 1) for name, prompt, computed in running]


def gaps_under(fill, run, prompts):
    """All gaps between tokens, in milliseconds, where ``fill`` says what each step computes."""
    coming = [(0.0, f"decode {i}", 1, run["outputs"]) for i in range(run["decodes"])]
    coming += [(300.0 * (i + 1), f"prompt {i}", run["tokens of a prompt"], 1) for i in range(prompts)]
    prompt, outputs = {name: n for _, name, n, _ in coming}, {name: n for _, name, _, n in coming}
    now, computed, latest, gaps = 0.0, {}, {}, []
    while coming or computed:
        if not computed:
            now = max(now, coming[0][0])  # nobody is there: wait
        waiting = [(name, n) for arrival, name, n, _ in coming if arrival <= now]
        step = fill([(name, prompt[name], computed[name]) for name in computed], waiting)
        now += run["fixed"] + max(run["floor"], sum(count for _, count in step) / run["rate"])
        for name, count in step:
            computed[name] = computed.get(name, 0) + count
            if computed[name] >= prompt[name]:  # a token comes out
                if name in latest:
                    gaps.append(now - latest[name])
                latest[name] = now
            if computed[name] == prompt[name] + outputs[name] - 1:
                del computed[name]
        coming = [request for request in coming if request[1] not in dict(step)]
    return gaps


def saved_by(prompts):
    """How much shorter the 99th percentile is under your policy, with so many prompts; prints what it comes from."""
    tails = []
    for name, fill in (("prefill first", prefill_first), ("yours", yours)):
        gaps = gaps_under(fill, my_run, prompts)
        tails.append(percentile(gaps, 99))
        found = f"p50 {percentile(gaps, 50):6.1f} ms, p99 {tails[-1]:6.1f} ms, longest {max(gaps):6.1f} ms"
        print(f"{prompts} prompts, {name:14} {found}")
    return tails[0] - tails[1]


by_day, at_night = saved_by(my_run["prompts"]), saved_by(my_run["prompts at night"])
measured("99th percentile of the gaps, prefill first less yours", predicted_saving, by_day, "ms")
print(f"at night: predicted {predicted_at_night:.1f} ms, measured {at_night:.1f} ms")

# %% [markdown]
# ## Explain
#
# Two sentences for yourself; they are not graded. At night, who notices prefill first all the same, and in which number
# would you see it? What would a budget twice as large do to your percentile, and what to the time in
# which a prompt is done?
