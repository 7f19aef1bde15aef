# %% [markdown]
# Answers to the lab `splitfuse`, to try its grader with: the mistakes that the chapter warns of, and other ways to be
# right.

# %% answer={"exercise": "split_prompt", "name": "the decodes do not count", "fails": "30 decodes leave 370"}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    room = budget if most is None else min(budget, most)
    if budget <= decodes:
        raise ValueError("no room")
    return [min(room, num_tokens - start) for start in range(0, num_tokens, room)]

# %% answer={"exercise": "split_prompt", "name": "the decodes come off the first chunk only", "fails": "decodes come off the budget"}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    if budget <= decodes:
        raise ValueError("no room")
    chunks, room = [], budget - decodes
    while num_tokens > 0:
        chunks.append(min(num_tokens, room if most is None else min(room, most)))
        num_tokens -= chunks[-1]
        room = budget
    return chunks

# %% answer={"exercise": "split_prompt", "name": "equal chunks", "fails": "1,000 tokens with a budget of 400"}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    room = budget - decodes if most is None else min(budget - decodes, most)
    if room < 1:
        raise ValueError("no room")
    steps = -(-num_tokens // room)
    return [num_tokens // steps + (i < num_tokens % steps) for i in range(steps)]

# %% answer={"exercise": "split_prompt", "name": "the short chunk first", "fails": "1,000 tokens with a budget of 400"}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    room = budget - decodes if most is None else min(budget - decodes, most)
    if room < 1:
        raise ValueError("no room")
    full, rest = divmod(num_tokens, room)
    return ([rest] if rest else []) + [room] * full

# %% answer={"exercise": "split_prompt", "name": "the rest always appended, even where it is nothing", "fails": "800 tokens with a budget of 400"}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    room = budget - decodes if most is None else min(budget - decodes, most)
    if room < 1:
        raise ValueError("no room")
    return [room] * (num_tokens // room) + [num_tokens % room]

# %% answer={"exercise": "split_prompt", "name": "the last chunk filled up to the budget", "fails": "1,000 tokens with a budget of 400"}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    room = budget - decodes if most is None else min(budget - decodes, most)
    if room < 1:
        raise ValueError("no room")
    return [room] * -(-num_tokens // room)

# %% answer={"exercise": "split_prompt", "name": "the longest chunk instead of what the decodes leave", "fails": "no chunk is longer than `most`"}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    room = budget - decodes if most is None else most
    if budget <= decodes:
        raise ValueError("no room")
    return [min(room, num_tokens - start) for start in range(0, num_tokens, room)]

# %% answer={"exercise": "split_prompt", "name": "`most` is not minded", "fails": "a limit of 300"}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    room = budget - decodes
    if room < 1:
        raise ValueError("no room")
    return [min(room, num_tokens - start) for start in range(0, num_tokens, room)]

# %% answer={"exercise": "split_prompt", "name": "ValueError only where nothing is left exactly", "fails": "30 decodes with a budget of 30"}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    room = budget - decodes if most is None else min(budget - decodes, most)
    if budget == decodes:
        raise ValueError("no room")
    return [min(room, num_tokens - start) for start in range(0, num_tokens, room)]

# %% answer={"exercise": "split_prompt", "name": "no room, and one token all the same", "fails": "30 decodes with a budget of 30"}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    room = max(1, budget - decodes)
    room = room if most is None else min(room, most)
    return [min(room, num_tokens - start) for start in range(0, num_tokens, room)]

# %% answer={"exercise": "split_prompt", "name": "chunk after chunk", "right": true}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    if budget <= decodes:
        raise ValueError("the decodes take the whole budget")
    chunks = []
    while sum(chunks) < num_tokens:
        chunk = min(budget - decodes, num_tokens - sum(chunks))
        chunks.append(chunk if most is None or chunk <= most else most)
    return chunks

# %% answer={"exercise": "split_prompt", "name": "from where each chunk begins", "right": true}
def split_prompt(num_tokens, budget, decodes=0, most=None):
    room = min(budget - decodes, num_tokens if most is None else most)
    if room <= 0:
        raise ValueError("no room")
    import itertools

    starts = [*range(0, num_tokens, room), num_tokens]
    return [float(end - start) for start, end in itertools.pairwise(starts)]

# %% equivalent={"exercise": "split_prompt", "mutant": "min(room, most) → min(most, room)", "because": "the smaller of two numbers is the same either way around"}

# %% answer={"exercise": "fill_budget", "name": "whole prompts only", "fails": "prompts of 300, 50 and 400"}
def fill_budget(prompts, budget, most=None):
    counts = []
    for left in prompts:
        wanted = left if most is None else min(left, most)
        counts.append(wanted if wanted <= budget else 0)
        budget -= counts[-1]
    return counts

# %% answer={"exercise": "fill_budget", "name": "an equal share for each", "fails": "prompts of 300, 50 and 400"}
def fill_budget(prompts, budget, most=None):
    share = budget // len(prompts)
    return [min(left, share if most is None else min(share, most)) for left in prompts]

# %% answer={"exercise": "fill_budget", "name": "the shortest first", "fails": "drawn prompts"}
def fill_budget(prompts, budget, most=None):
    counts = [0] * len(prompts)
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i]):
        counts[i] = min(prompts[i], budget, budget if most is None else most)
        budget -= counts[i]
    return counts

# %% answer={"exercise": "fill_budget", "name": "each has the whole budget", "fails": "prompts of 300, 50 and 400"}
def fill_budget(prompts, budget, most=None):
    return [min(left, budget, budget if most is None else most) for left in prompts]

# %% answer={"exercise": "fill_budget", "name": "the longest chunk is not minded", "fails": "three prompts of 800"}
def fill_budget(prompts, budget, most=None):
    counts = []
    for left in prompts:
        counts.append(min(left, budget))
        budget -= counts[-1]
    return counts

# %% answer={"exercise": "fill_budget", "name": "those that get nothing are left out", "fails": "prompts of 600 and 100"}
def fill_budget(prompts, budget, most=None):
    counts = []
    for left in prompts:
        if budget > 0:
            counts.append(min(left, budget, budget if most is None else most))
            budget -= counts[-1]
    return counts

# %% answer={"exercise": "fill_budget", "name": "the budget filled up with tokens that no prompt has", "fails": "prompts of 20 and 30"}
def fill_budget(prompts, budget, most=None):
    counts = []
    for left in prompts:
        counts.append(min(left, budget, budget if most is None else most))
        budget -= counts[-1]
    if most is None:
        counts[-1] += budget
    return counts

# %% answer={"exercise": "fill_budget", "name": "one prompt in a step", "fails": "prompts of 300, 50 and 400"}
def fill_budget(prompts, budget, most=None):
    return [min(prompts[0], budget, budget if most is None else most)] + [0] * (len(prompts) - 1)

# %% answer={"exercise": "fill_budget", "name": "from how much is wanted up to each prompt", "right": true}
def fill_budget(prompts, budget, most=None):
    counts, used = [], 0
    for left in prompts:
        wanted = used + (left if most is None else min(most, left))
        counts.append(min(wanted, budget) - used)
        used += counts[-1]
    return counts

# %% answer={"exercise": "fill_budget", "name": "recursion over the prompts", "right": true}
def fill_budget(prompts, budget, most=None):
    if not prompts:
        return []
    first, *others = prompts
    count = sorted([first, budget, first if most is None else most])[0]
    return [count, *fill_budget(others, budget - count, most)]

# %% answer={"exercise": "schedule", "name": "prompts before decodes", "fails": "decodes first"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan, left, number = [], budget, len(running)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan + [(name, 1) for name, prompt, computed in running if computed >= prompt][:left]

# %% answer={"exercise": "schedule", "name": "running requests in one pass, as they were admitted", "fails": "decodes first"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan, left, number = [], budget, len(running)
    for name, prompt, computed in running:
        count = min(max(1, prompt - computed), left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "the budget is for prompts alone", "fails": "decodes first"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan, left, number = [(name, 1) for name, prompt, computed in running if computed >= prompt], budget, len(running)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "a smaller one overtakes the first that does not fit", "fails": "the first that waits does not fit"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number = budget - len(plan), len(running)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt > free_slots:
            continue
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "slots for the first chunk only", "fails": "a prompt's slots are all promised"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number = budget - len(plan), len(running)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        count = min(prompt, left, most or left)
        if left < 1 or number >= max_running or count > free_slots:
            break
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - count, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "only those that decode are counted as running", "fails": "three requests may run"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number = budget - len(plan), len(plan)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "a prompt that does not fit into the step waits for the next", "fails": "drawn servers"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number = budget - len(plan), len(running)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < prompt or number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "new prompts before those that were begun", "fails": "drawn servers"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number = budget - len(plan), len(running)
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    return plan

# %% answer={"exercise": "schedule", "name": "the slots of those admitted are not taken off", "fails": "free slots"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number = budget - len(plan), len(running)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, number = left - count, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "the longest chunk for new prompts only", "fails": "at most so many tokens"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number = budget - len(plan), len(running)
    for name, prompt, computed in running:
        count = min(prompt - computed, left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "a prompt that takes the last free slot is not let in", "fails": "500 free slots"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number = budget - len(plan), len(running)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt >= free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "somebody is admitted with no token left", "fails": "the budget is used up"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number = budget - len(plan), len(running)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "prompts that were begun are listed with no token", "fails": "the budget is used up"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number = budget - len(plan), len(running)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if computed < prompt:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "prompts that were begun pay their slots again", "fails": "500 free slots"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number = budget - len(plan), len(running)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left, free_slots = left - count, free_slots - count
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "those that decode pay a slot each", "fails": "500 free slots"}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left, number, free_slots = budget - len(plan), len(running), free_slots - len(plan)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < 1 or number >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots, number = left - count, free_slots - prompt, number + 1
    return plan

# %% answer={"exercise": "schedule", "name": "whoever is in the plan counts as running", "right": true}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    plan = [(name, 1) for name, prompt, computed in running if computed >= prompt]
    left = budget - len(plan)
    for name, prompt, computed in running:
        count = min(prompt - computed, left, most or left)
        if count > 0:
            plan.append((name, count))
            left -= count
    for name, prompt in waiting:
        if left < 1 or len(plan) >= max_running or prompt > free_slots:
            break
        count = min(prompt, left, most or left)
        plan.append((name, count))
        left, free_slots = left - count, free_slots - prompt
    return plan

# %% answer={"exercise": "schedule", "name": "one queue of wishes, then one pass", "right": true}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    wishes = [(name, 1) for name, prompt, computed in running if prompt - computed <= 0]
    wishes += [(name, prompt - computed) for name, prompt, computed in running if prompt - computed > 0]
    promised = 0
    for name, prompt in waiting:
        promised += prompt
        if promised > free_slots or len(wishes) == max_running:
            break
        wishes.append((name, prompt))
    plan, used = [], 0
    for name, wanted in wishes:
        count = min([wanted, budget - used] + ([most] if most is not None else []))
        if count > 0:
            plan.append((name, count))
        used += max(count, 0)
    return plan

# %% answer={"exercise": "schedule", "name": "while loops, and lists for tuples", "right": true}
def schedule(running, waiting, budget, free_slots, max_running, most=None):
    largest = budget if most is None else most
    decoding = [r for r in running if r[2] >= r[1]]
    in_context = [r for r in running if r[2] < r[1]]
    plan, queue, used = [], list(waiting), len(decoding)
    for name, *_ in decoding:
        plan.append([name, 1])
    while in_context and used < budget:
        name, prompt, computed = in_context.pop(0)
        plan.append([name, min(prompt - computed, largest, budget - used)])
        used += plan[-1][1]
    number = len(running)
    while queue and used < budget and number < max_running and queue[0][1] <= free_slots:
        name, prompt = queue.pop(0)
        plan.append([name, min(prompt, largest, budget - used)])
        used += plan[-1][1]
        number += 1
        free_slots -= prompt
    return plan

# %% answer={"exercise": "choose_budget", "name": "the first token's bound is not minded", "fails": "the bound on the first token"}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    kept = [b for b in sorted(candidates) if b > decodes and seconds_of(points, b) <= most_itl]
    return max(kept, key=lambda b: (b - decodes) / seconds_of(points, b), default=None)

# %% answer={"exercise": "choose_budget", "name": "the gaps' bound is not minded", "fails": "gaps of 40 ms at most"}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    def ttft(b):
        full, rest = divmod(prompt, b - decodes)
        return full * seconds_of(points, b) + (seconds_of(points, rest + decodes) if rest else 0)

    kept = [b for b in sorted(candidates) if b > decodes and ttft(b) <= most_ttft]
    return max(kept, key=lambda b: (b - decodes) / seconds_of(points, b), default=None)

# %% answer={"exercise": "choose_budget", "name": "the last step counted as a full one", "fails": "the bound on the first token"}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    kept = [
        b for b in sorted(candidates)
        if b > decodes and seconds_of(points, b) <= most_itl
        and -(-prompt // (b - decodes)) * seconds_of(points, b) <= most_ttft
    ]
    return max(kept, key=lambda b: (b - decodes) / seconds_of(points, b), default=None)

# %% answer={"exercise": "choose_budget", "name": "the decodes forgotten in the last step", "fails": "the bound on the first token"}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    def ttft(b):
        full, rest = divmod(prompt, b - decodes)
        return full * seconds_of(points, b) + (seconds_of(points, rest) if rest else 0)

    kept = [b for b in sorted(candidates) if b > decodes and seconds_of(points, b) <= most_itl and ttft(b) <= most_ttft]
    return max(kept, key=lambda b: (b - decodes) / seconds_of(points, b), default=None)

# %% answer={"exercise": "choose_budget", "name": "a last step even where nothing is left", "fails": "the bound on the first token"}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    def ttft(b):
        full, rest = divmod(prompt, b - decodes)
        return full * seconds_of(points, b) + seconds_of(points, rest + decodes)

    kept = [b for b in sorted(candidates) if b > decodes and seconds_of(points, b) <= most_itl and ttft(b) <= most_ttft]
    return max(kept, key=lambda b: (b - decodes) / seconds_of(points, b), default=None)

# %% answer={"exercise": "choose_budget", "name": "the largest that keeps the bounds", "fails": "more is not always faster"}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    def ttft(b):
        full, rest = divmod(prompt, b - decodes)
        return full * seconds_of(points, b) + (seconds_of(points, rest + decodes) if rest else 0)

    kept = [b for b in candidates if b > decodes and seconds_of(points, b) <= most_itl and ttft(b) <= most_ttft]
    return max(kept, default=None)

# %% answer={"exercise": "choose_budget", "name": "the smallest that keeps the bounds", "fails": "loose bounds"}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    def ttft(b):
        full, rest = divmod(prompt, b - decodes)
        return full * seconds_of(points, b) + (seconds_of(points, rest + decodes) if rest else 0)

    kept = [b for b in candidates if b > decodes and seconds_of(points, b) <= most_itl and ttft(b) <= most_ttft]
    return min(kept, default=None)

# %% answer={"exercise": "choose_budget", "name": "the prompt has the whole budget", "fails": "gaps of 15 ms"}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    def ttft(b):
        full, rest = divmod(prompt, b)
        return full * seconds_of(points, b) + (seconds_of(points, rest) if rest else 0)

    kept = [b for b in sorted(candidates) if seconds_of(points, b) <= most_itl and ttft(b) <= most_ttft]
    return max(kept, key=lambda b: b / seconds_of(points, b), default=None)

# %% answer={"exercise": "choose_budget", "name": "the bounds may not be reached", "fails": "bounds are reached exactly"}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    def ttft(b):
        full, rest = divmod(prompt, b - decodes)
        return full * seconds_of(points, b) + (seconds_of(points, rest + decodes) if rest else 0)

    kept = [b for b in sorted(candidates) if b > decodes and seconds_of(points, b) < most_itl and ttft(b) < most_ttft]
    return max(kept, key=lambda b: (b - decodes) / seconds_of(points, b), default=None)

# %% answer={"exercise": "choose_budget", "name": "of two that are equally fast the larger", "fails": "132 tokens in 1 s"}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    def ttft(b):
        full, rest = divmod(prompt, b - decodes)
        return full * seconds_of(points, b) + (seconds_of(points, rest + decodes) if rest else 0)

    kept = [b for b in sorted(candidates, reverse=True) if b > decodes and seconds_of(points, b) <= most_itl and ttft(b) <= most_ttft]
    return max(kept, key=lambda b: (b - decodes) / seconds_of(points, b), default=None)

# %% answer={"exercise": "choose_budget", "name": "all tokens of the step counted, decodes too", "fails": "the decodes come off"}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    def ttft(b):
        full, rest = divmod(prompt, b - decodes)
        return full * seconds_of(points, b) + (seconds_of(points, rest + decodes) if rest else 0)

    kept = [b for b in sorted(candidates) if b > decodes and seconds_of(points, b) <= most_itl and ttft(b) <= most_ttft]
    return max(kept, key=lambda b: b / seconds_of(points, b), default=None)

# %% answer={"exercise": "choose_budget", "name": "the best of a list", "right": true}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    def ttft(b):
        left, seconds = prompt, 0.0
        while left > 0:
            chunk = min(left, b - decodes)
            seconds += seconds_of(points, decodes + chunk)
            left -= chunk
        return seconds

    useful = (b for b in candidates if b > decodes and seconds_of(points, b) <= most_itl)
    kept = [b for b in useful if ttft(b) <= most_ttft]
    return max(kept, key=lambda b: ((b - decodes) / seconds_of(points, b), -b), default=None)

# %% answer={"exercise": "choose_budget", "name": "one candidate after the other, dropped for a reason", "right": true}
def choose_budget(points, candidates, prompt, decodes, most_ttft, most_itl):
    chosen = []
    for budget in candidates:
        room, step = budget - decodes, seconds_of(points, budget)
        if room <= 0 or step > most_itl:
            continue
        last = prompt % room
        ttft = prompt // room * step + (seconds_of(points, last + decodes) if last > 0 else 0)
        if not ttft > most_ttft:
            chosen.append((step / room, budget))
    return sorted(chosen)[0][1] if chosen else None

# %% equivalent={"exercise": "choose_budget", "mutant": "0.0 → -1.0", "because": "room / step is above 0 wherever it is compared, so any start that is not above 0 gives way to the first budget"}

# %% answer={"exercise": "predicted_saving", "name": "the decode step behind the prompt forgotten", "fails": "the prediction by day"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
predicted_saving = (my_run["tokens of a prompt"] - budget) / rate
predicted_at_night = floor - budget / rate

# %% answer={"exercise": "predicted_saving", "name": "the fixed part forgotten", "fails": "the prediction by day"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
predicted_saving = floor + (my_run["tokens of a prompt"] - budget) / rate
predicted_at_night = floor - budget / rate

# %% answer={"exercise": "predicted_saving", "name": "the decodes on top of the budget", "fails": "the prediction by day"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
mixed = budget + my_run["decodes"]
predicted_saving = fixed + floor + (my_run["tokens of a prompt"] - mixed) / rate
predicted_at_night = floor - mixed / rate

# %% answer={"exercise": "predicted_saving", "name": "the prompt's chunk without the decodes", "fails": "the prediction by day"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
chunk = budget - my_run["decodes"]
predicted_saving = fixed + floor + (my_run["tokens of a prompt"] - chunk) / rate
predicted_at_night = floor - chunk / rate

# %% answer={"exercise": "predicted_saving", "name": "in seconds", "fails": "the prediction by day"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
predicted_saving = (fixed + floor + (my_run["tokens of a prompt"] - budget) / rate) / 1000
predicted_at_night = (floor - budget / rate) / 1000

# %% answer={"exercise": "predicted_saving", "name": "the mean gap instead of the tail", "fails": "the prediction by day"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
stalled, steps = fixed + my_run["tokens of a prompt"] / rate, my_run["tokens of a prompt"] / (budget - my_run["decodes"])
a_prompt = (stalled - steps * (budget / rate - floor)) / (my_run["outputs"] - 1)
predicted_saving = my_run["prompts"] * a_prompt
predicted_at_night = my_run["prompts at night"] * a_prompt

# %% answer={"exercise": "predicted_saving", "name": "all prompts in one step", "fails": "the prediction by day"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
predicted_saving = fixed + floor + (my_run["prompts"] * my_run["tokens of a prompt"] - budget) / rate
predicted_at_night = floor - budget / rate

# %% answer={"exercise": "predicted_saving", "name": "the stall in full, as if mixed steps took no longer than decodes", "fails": "the prediction by day"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
predicted_saving = fixed + my_run["tokens of a prompt"] / rate
predicted_at_night = 0.0

# %% answer={"exercise": "predicted_saving", "name": "the usual gap, however many are longer", "fails": "the prediction by day"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
predicted_saving = floor - budget / rate
predicted_at_night = floor - budget / rate

# %% answer={"exercise": "predicted_saving", "name": "the longest gap, however few there are", "fails": "and that at night"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
predicted_saving = fixed + floor + (my_run["tokens of a prompt"] - budget) / rate
predicted_at_night = predicted_saving

# %% answer={"exercise": "predicted_saving", "name": "few long gaps under both policies, so nothing is saved or lost", "fails": "and that at night"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
predicted_saving = fixed + floor + (my_run["tokens of a prompt"] - budget) / rate
predicted_at_night = 0.0

# %% answer={"exercise": "predicted_saving", "name": "how much the two differ, without the sign", "fails": "and that at night"}
fixed, floor, rate, budget = (my_run[name] for name in ("fixed", "floor", "rate", "budget"))
predicted_saving = fixed + floor + (my_run["tokens of a prompt"] - budget) / rate
predicted_at_night = abs(floor - budget / rate)

# %% answer={"exercise": "predicted_saving", "name": "both lists of gaps, and their percentiles", "right": true}
fixed, floor, rate = my_run["fixed"], my_run["floor"], my_run["rate"]
full_steps, rest = divmod(my_run["tokens of a prompt"], my_run["budget"] - my_run["decodes"])
savings = []
for prompts in (my_run["prompts"], my_run["prompts at night"]):
    chunked = prompts * full_steps * [fixed + my_run["budget"] / rate]
    chunked += prompts * [fixed + max(floor, (rest + my_run["decodes"]) / rate)]
    whole = prompts * [2 * fixed + floor + my_run["tokens of a prompt"] / rate]
    tails = [
        percentile(gaps + (my_run["outputs"] - 1 - len(gaps)) * [fixed + floor], 99) for gaps in (whole, chunked)
    ]
    savings.append(tails[0] - tails[1])
predicted_saving, predicted_at_night = savings

# %% answer={"exercise": "predicted_saving", "name": "on paper, to three digits", "right": true}
cut_off = my_run["tokens of a prompt"] - my_run["budget"]
predicted_saving = float(f"{my_run['fixed'] + my_run['floor'] + cut_off / my_run['rate']:.3g}")
predicted_at_night = float(f"{my_run['floor'] - my_run['budget'] / my_run['rate']:.3g}")

# %% equivalent={"exercise": "predicted_saving", "mutant": "my_run[prompts] / my_run['outputs'] > 0.01 → my_run[prompts] / my_run['outputs'] >= 0.01", "because": "4 prompts, of which 400 outputs would be a hundredfold, are never drawn"}
