# %% [markdown]
# Answers to the lab `batching`, to try its grader with: the mistakes that the chapter warns of, and other ways to be right.

# %% answer={"exercise": "padding_waste", "name": "only prompts are padded", "fails": "rows that have finished"}
def padding_waste(prompts, outputs, batch_size):
    useful = padding = 0
    for first in range(0, len(prompts), batch_size):
        its_prompts = prompts[first : first + batch_size]
        useful += sum(its_prompts) + sum(outputs[first : first + batch_size]) - len(its_prompts)
        padding += len(its_prompts) * max(its_prompts) - sum(its_prompts)
    return useful, padding

# %% answer={"exercise": "padding_waste", "name": "only finished rows are counted", "fails": "padding of prompts"}
def padding_waste(prompts, outputs, batch_size):
    useful = padding = 0
    for first in range(0, len(prompts), batch_size):
        its_outputs = outputs[first : first + batch_size]
        useful += sum(prompts[first : first + batch_size]) + sum(its_outputs) - len(its_outputs)
        padding += len(its_outputs) * max(its_outputs) - sum(its_outputs)
    return useful, padding

# %% answer={"exercise": "padding_waste", "name": "the last token computed too", "fails": "useful: each prompt token once"}
def padding_waste(prompts, outputs, batch_size):
    useful = padding = 0
    for first in range(0, len(prompts), batch_size):
        its_prompts, its_outputs = prompts[first : first + batch_size], outputs[first : first + batch_size]
        needed = sum(its_prompts) + sum(its_outputs)
        useful += needed
        padding += len(its_prompts) * (max(its_prompts) + max(its_outputs)) - needed
    return useful, padding

# %% answer={"exercise": "padding_waste", "name": "sorted by length first", "fails": "requests keep their order"}
def padding_waste(prompts, outputs, batch_size):
    useful = padding = 0
    pairs = sorted(zip(prompts, outputs), key=lambda pair: pair[1])
    for first in range(0, len(pairs), batch_size):
        rows = pairs[first : first + batch_size]
        needed = sum(p + o - 1 for p, o in rows)
        useful += needed
        padding += len(rows) * (max(p for p, _ in rows) + max(o for _, o in rows) - 1) - needed
    return useful, padding

# %% answer={"exercise": "padding_waste", "name": "the last batch filled with empty rows", "fails": "the last batch has no empty rows"}
def padding_waste(prompts, outputs, batch_size):
    useful = padding = 0
    for first in range(0, len(prompts), batch_size):
        its_prompts, its_outputs = prompts[first : first + batch_size], outputs[first : first + batch_size]
        needed = sum(its_prompts) + sum(its_outputs) - len(its_prompts)
        useful += needed
        padding += batch_size * (max(its_prompts) + max(its_outputs) - 1) - needed
    return useful, padding

# %% answer={"exercise": "padding_waste", "name": "the longest row taken instead of longest prompt and longest output", "fails": "any lengths and batch sizes"}
def padding_waste(prompts, outputs, batch_size):
    useful = padding = 0
    for first in range(0, len(prompts), batch_size):
        rows = [p + o - 1 for p, o in zip(prompts, outputs)][first : first + batch_size]
        useful += sum(rows)
        padding += len(rows) * max(rows) - sum(rows)
    return useful, padding

# %% answer={"exercise": "padding_waste", "name": "a share instead of counts", "fails": "prompts of 10 and 5"}
def padding_waste(prompts, outputs, batch_size):
    useful = padding = 0
    for first in range(0, len(prompts), batch_size):
        its_prompts, its_outputs = prompts[first : first + batch_size], outputs[first : first + batch_size]
        needed = sum(its_prompts) + sum(its_outputs) - len(its_prompts)
        useful += needed
        padding += len(its_prompts) * (max(its_prompts) + max(its_outputs) - 1) - needed
    return useful, padding / (useful + padding)

# %% answer={"exercise": "padding_waste", "name": "prompts and finished rows apart", "right": true}
def padding_waste(prompts, outputs, batch_size):
    useful, padding = sum(prompts) + sum(n - 1 for n in outputs), 0
    for i, (prompt, output) in enumerate(zip(prompts, outputs)):
        first = i - i % batch_size
        padding += max(prompts[first : first + batch_size]) - prompt
        padding += max(outputs[first : first + batch_size]) - output
    return useful, padding

# %% answer={"exercise": "padding_waste", "name": "with numpy, from the whole grid", "right": true}
def padding_waste(prompts, outputs, batch_size):
    import numpy as np

    needed, grid = 0, 0
    prompts, outputs = np.array(prompts), np.array(outputs)
    for first in range(0, len(prompts), batch_size):
        p, o = prompts[first : first + batch_size], outputs[first : first + batch_size]
        needed += int((p + o - 1).sum())
        grid += int(len(p) * (p.max() + o.max() - 1))
    return [needed, grid - needed]

# %% answer={"exercise": "schedule", "name": "a new batch only when all have ended", "fails": "a place that is free is taken"}
def schedule(pool, max_batch_size, num_slots):
    begun = [r["id"] for r in pool if r["generated"] > 0]
    if begun:
        return begun
    batch, reserved = [], 0
    for r in sorted(pool, key=lambda r: r["arrival"]):
        reserved += r["prompt"] + r["max_new_tokens"]
        if len(batch) == max_batch_size or reserved > num_slots:
            break
        batch.append(r["id"])
    return batch

# %% answer={"exercise": "schedule", "name": "who fits may overtake", "fails": "nobody overtakes"}
def schedule(pool, max_batch_size, num_slots):
    batch = [r["id"] for r in pool if r["generated"]]
    reserved = sum(r["prompt"] + r["max_new_tokens"] for r in pool if r["generated"])
    for r in sorted((r for r in pool if not r["generated"]), key=lambda r: r["arrival"]):
        slots = r["prompt"] + r["max_new_tokens"]
        if len(batch) < max_batch_size and reserved + slots <= num_slots:
            batch.append(r["id"])
            reserved += slots
    return batch

# %% answer={"exercise": "schedule", "name": "only the slots in use are counted", "fails": "all that a request may come to"}
def schedule(pool, max_batch_size, num_slots):
    batch = [r["id"] for r in pool if r["generated"]]
    held = sum(r["prompt"] + r["generated"] for r in pool if r["generated"])
    for r in sorted((r for r in pool if not r["generated"]), key=lambda r: r["arrival"]):
        held += r["prompt"]
        if len(batch) == max_batch_size or held > num_slots:
            break
        batch.append(r["id"])
    return batch

# %% answer={"exercise": "schedule", "name": "the reservation of those that have begun forgotten", "fails": "100 slots: one that has begun"}
def schedule(pool, max_batch_size, num_slots):
    batch, reserved = [r["id"] for r in pool if r["generated"]], 0
    for r in sorted((r for r in pool if not r["generated"]), key=lambda r: r["arrival"]):
        reserved += r["prompt"] + r["max_new_tokens"]
        if len(batch) == max_batch_size or reserved > num_slots:
            break
        batch.append(r["id"])
    return batch

# %% answer={"exercise": "schedule", "name": "in the order of the list", "fails": "first come, first served"}
def schedule(pool, max_batch_size, num_slots):
    batch = [r["id"] for r in pool if r["generated"]]
    reserved = sum(r["prompt"] + r["max_new_tokens"] for r in pool if r["generated"])
    for r in pool:
        if not r["generated"]:
            reserved += r["prompt"] + r["max_new_tokens"]
            if len(batch) == max_batch_size or reserved > num_slots:
                break
            batch.append(r["id"])
    return batch

# %% answer={"exercise": "schedule", "name": "the shortest first", "fails": "first come, first served"}
def schedule(pool, max_batch_size, num_slots):
    batch = [r["id"] for r in pool if r["generated"]]
    reserved = sum(r["prompt"] + r["max_new_tokens"] for r in pool if r["generated"])
    for r in sorted((r for r in pool if not r["generated"]), key=lambda r: r["max_new_tokens"]):
        reserved += r["prompt"] + r["max_new_tokens"]
        if len(batch) == max_batch_size or reserved > num_slots:
            break
        batch.append(r["id"])
    return batch

# %% answer={"exercise": "schedule", "name": "new ones alone while there are any", "fails": "a place that is free is taken"}
def schedule(pool, max_batch_size, num_slots):
    begun = [r["id"] for r in pool if r["generated"]]
    reserved = sum(r["prompt"] + r["max_new_tokens"] for r in pool if r["generated"])
    batch = []
    for r in sorted((r for r in pool if not r["generated"]), key=lambda r: r["arrival"]):
        reserved += r["prompt"] + r["max_new_tokens"]
        if len(begun) + len(batch) == max_batch_size or reserved > num_slots:
            break
        batch.append(r["id"])
    return batch or begun

# %% answer={"exercise": "schedule", "name": "places counted for new ones only", "fails": "never more than max_batch_size"}
def schedule(pool, max_batch_size, num_slots):
    begun = [r["id"] for r in pool if r["generated"]]
    reserved = sum(r["prompt"] + r["max_new_tokens"] for r in pool if r["generated"])
    batch = []
    for r in sorted((r for r in pool if not r["generated"]), key=lambda r: r["arrival"]):
        reserved += r["prompt"] + r["max_new_tokens"]
        if len(batch) == max_batch_size or reserved > num_slots:
            break
        batch.append(r["id"])
    return begun + batch

# %% answer={"exercise": "schedule", "name": "memory not looked at", "fails": "all that a request may come to"}
def schedule(pool, max_batch_size, num_slots):
    order = sorted(pool, key=lambda r: (r["generated"] == 0, r["arrival"]))
    return [r["id"] for r in order[:max_batch_size]]

# %% answer={"exercise": "schedule", "name": "the slots of those just let in not taken off", "fails": "100 slots, and three wait"}
def schedule(pool, max_batch_size, num_slots):
    batch = [r["id"] for r in pool if r["generated"]]
    free = num_slots - sum(r["prompt"] + r["max_new_tokens"] for r in pool if r["generated"])
    for r in sorted((r for r in pool if not r["generated"]), key=lambda r: r["arrival"]):
        if len(batch) == max_batch_size or r["prompt"] + r["max_new_tokens"] > free:
            break
        batch.append(r["id"])
    return batch

# %% answer={"exercise": "schedule", "name": "by id instead of arrival", "fails": "three have just come"}
def schedule(pool, max_batch_size, num_slots):
    batch = [r["id"] for r in pool if r["generated"]]
    reserved = sum(r["prompt"] + r["max_new_tokens"] for r in pool if r["generated"])
    for r in sorted((r for r in pool if not r["generated"]), key=lambda r: r["id"]):
        reserved += r["prompt"] + r["max_new_tokens"]
        if len(batch) == max_batch_size or reserved > num_slots:
            break
        batch.append(r["id"])
    return batch

# %% answer={"exercise": "schedule", "name": "those that have begun have no priority", "fails": "five arrived together"}
def schedule(pool, max_batch_size, num_slots):
    batch, reserved = [], 0
    for r in sorted(pool, key=lambda r: r["arrival"]):
        reserved += r["prompt"] + r["max_new_tokens"]
        if len(batch) == max_batch_size or reserved > num_slots:
            break
        batch.append(r["id"])
    return batch

# %% answer={"exercise": "schedule", "name": "the pool sorted in place", "fails": "three have just come"}
def schedule(pool, max_batch_size, num_slots):
    pool.sort(key=lambda r: (r["generated"] == 0, r["arrival"]))
    batch, reserved = [], 0
    for r in pool:
        reserved += r["prompt"] + r["max_new_tokens"]
        if r["generated"] == 0 and (len(batch) == max_batch_size or reserved > num_slots):
            break
        batch.append(r["id"])
    return batch

# %% answer={"exercise": "schedule", "name": "one sort, then as long as it fits", "right": true}
def schedule(pool, max_batch_size, num_slots):
    order = sorted(pool, key=lambda r: (not r["generated"], r["arrival"]))
    taken = 0
    for place, r in enumerate(order):
        taken += r["prompt"] + r["max_new_tokens"]
        if not r["generated"] and (place >= max_batch_size or taken > num_slots):
            return [q["id"] for q in order[:place]]
    return [q["id"] for q in order]

# %% answer={"exercise": "schedule", "name": "a heap of those that wait", "right": true}
def schedule(pool, max_batch_size, num_slots):
    import heapq

    need = {r["id"]: r["prompt"] + r["max_new_tokens"] for r in pool}
    batch = {r["id"] for r in pool if r["generated"]}
    free = num_slots - sum(need[i] for i in batch)
    waiting = [(r["arrival"], place, r["id"]) for place, r in enumerate(pool) if not r["generated"]]
    heapq.heapify(waiting)
    while waiting and len(batch) < max_batch_size and need[waiting[0][2]] <= free:
        _, _, number = heapq.heappop(waiting)
        free -= need[number]
        batch.add(number)
    return list(batch)

# %% answer={"exercise": "token_times", "name": "prompts cost nothing", "fails": "a prompt is computed once"}
def token_times(prompts, batches, fixed, per_token):
    times, now = {i: [] for i in prompts}, 0.0
    for batch in batches:
        now += fixed + per_token * len(batch)
        for i in batch:
            times[i].append(now)
    return times

# %% answer={"exercise": "token_times", "name": "the prompt computed in every step", "fails": "a prompt is computed once"}
def token_times(prompts, batches, fixed, per_token):
    times, now = {i: [] for i in prompts}, 0.0
    for batch in batches:
        now += fixed + per_token * sum(prompts[i] + len(times[i]) for i in batch)
        for i in batch:
            times[i].append(now)
    return times

# %% answer={"exercise": "token_times", "name": "the first token computed beside the prompt", "fails": "one request, a prompt of 20"}
def token_times(prompts, batches, fixed, per_token):
    times, now = {i: [] for i in prompts}, 0.0
    for batch in batches:
        now += fixed + per_token * sum(1 if times[i] else prompts[i] + 1 for i in batch)
        for i in batch:
            times[i].append(now)
    return times

# %% answer={"exercise": "token_times", "name": "tokens at the beginning of the step", "fails": "a step takes its fixed part"}
def token_times(prompts, batches, fixed, per_token):
    times, now = {i: [] for i in prompts}, 0.0
    for batch in batches:
        tokens = sum(1 if times[i] else prompts[i] for i in batch)
        for i in batch:
            times[i].append(now)
        now += fixed + per_token * tokens
    return times

# %% answer={"exercise": "token_times", "name": "the prompt in a step without a token", "fails": "one request, a prompt of 20"}
def token_times(prompts, batches, fixed, per_token):
    times, seen, now = {i: [] for i in prompts}, set(), 0.0
    for batch in batches:
        now += fixed + per_token * sum(1 if i in seen else prompts[i] for i in batch)
        for i in batch:
            if i in seen:
                times[i].append(now)
            seen.add(i)
    return times

# %% answer={"exercise": "token_times", "name": "a fixed part for each request of the step", "fails": "a step takes its fixed part"}
def token_times(prompts, batches, fixed, per_token):
    times, now = {i: [] for i in prompts}, 0.0
    for batch in batches:
        now += sum(fixed + per_token * (1 if times[i] else prompts[i]) for i in batch)
        for i in batch:
            times[i].append(now)
    return times

# %% answer={"exercise": "token_times", "name": "who is in no step is left out", "fails": "the third takes the place"}
def token_times(prompts, batches, fixed, per_token):
    times, now = {}, 0.0
    for batch in batches:
        now += fixed + per_token * sum(1 if i in times else prompts[i] for i in batch)
        for i in batch:
            times.setdefault(i, []).append(now)
    return times

# %% answer={"exercise": "token_times", "name": "new is who was not in the step before", "fails": "who pauses in step 2"}
def token_times(prompts, batches, fixed, per_token):
    times, now, before = {i: [] for i in prompts}, 0.0, []
    for batch in batches:
        now += fixed + per_token * sum(1 if i in before else prompts[i] for i in batch)
        for i in batch:
            times[i].append(now)
        before = batch
    return times

# %% answer={"exercise": "token_times", "name": "a set of those seen, and the ends first", "right": true}
def token_times(prompts, batches, fixed, per_token):
    seen, ends, end = set(), [], 0.0
    for batch in batches:
        new = [i for i in batch if i not in seen]
        seen.update(new)
        end += fixed + per_token * (len(batch) - len(new) + sum(prompts[i] for i in new))
        ends.append(end)
    return {i: [end for end, batch in zip(ends, batches) if i in batch] for i in prompts}

# %% answer={"exercise": "token_times", "name": "what is left of each prompt, counted down", "right": true}
def token_times(prompts, batches, fixed, per_token):
    next_work, result, clock = dict(prompts), {i: [] for i in prompts}, 0.0
    for batch in batches:
        work = 0
        for i in batch:
            work += next_work[i]
            next_work[i] = 1
        clock = clock + fixed + per_token * work
        for i in batch:
            result[i] = [*result[i], clock]
    return result

# %% answer={"exercise": "serving_metrics", "name": "time counted from 0", "fails": "throughput: all output tokens"}
def serving_metrics(arrivals, times):
    return {
        "throughput": sum(map(len, times.values())) / max(its[-1] for its in times.values()),
        "ttft": sum(times[i][0] - arrivals[i] for i in times) / len(times),
        "normalised_latency": sum((times[i][-1] - arrivals[i]) / len(times[i]) for i in times) / len(times),
    }

# %% answer={"exercise": "serving_metrics", "name": "requests instead of tokens", "fails": "throughput: all output tokens"}
def serving_metrics(arrivals, times):
    return {
        "throughput": len(times) / (max(its[-1] for its in times.values()) - min(arrivals.values())),
        "ttft": sum(times[i][0] - arrivals[i] for i in times) / len(times),
        "normalised_latency": sum((times[i][-1] - arrivals[i]) / len(times[i]) for i in times) / len(times),
    }

# %% answer={"exercise": "serving_metrics", "name": "the sums divided instead of the mean of quotients", "fails": "normalised latency: each"}
def serving_metrics(arrivals, times):
    waited = sum(times[i][-1] - arrivals[i] for i in times)
    return {
        "throughput": sum(map(len, times.values())) / (max(its[-1] for its in times.values()) - min(arrivals.values())),
        "ttft": sum(times[i][0] - arrivals[i] for i in times) / len(times),
        "normalised_latency": waited / sum(map(len, times.values())),
    }

# %% answer={"exercise": "serving_metrics", "name": "the time for each token after the first", "fails": "normalised latency: each"}
def serving_metrics(arrivals, times):
    gaps = [(its[-1] - its[0]) / max(1, len(its) - 1) for its in times.values()]
    return {
        "throughput": sum(map(len, times.values())) / (max(its[-1] for its in times.values()) - min(arrivals.values())),
        "ttft": sum(times[i][0] - arrivals[i] for i in times) / len(times),
        "normalised_latency": sum(gaps) / len(gaps),
    }

# %% answer={"exercise": "serving_metrics", "name": "first tokens without the arrival", "fails": "TTFT: from each"}
def serving_metrics(arrivals, times):
    return {
        "throughput": sum(map(len, times.values())) / (max(its[-1] for its in times.values()) - min(arrivals.values())),
        "ttft": sum(its[0] for its in times.values()) / len(times),
        "normalised_latency": sum((times[i][-1] - arrivals[i]) / len(times[i]) for i in times) / len(times),
    }

# %% answer={"exercise": "serving_metrics", "name": "the latency of the last request alone", "fails": "TTFT: from each"}
def serving_metrics(arrivals, times):
    for i in times:
        ttft, latency = times[i][0] - arrivals[i], (times[i][-1] - arrivals[i]) / len(times[i])
    seconds = max(its[-1] for its in times.values()) - min(arrivals.values())
    return {"throughput": sum(map(len, times.values())) / seconds, "ttft": ttft, "normalised_latency": latency}

# %% answer={"exercise": "serving_metrics", "name": "the end of the request that came last", "fails": "throughput: all output tokens"}
def serving_metrics(arrivals, times):
    last = max(arrivals, key=arrivals.get)
    return {
        "throughput": sum(map(len, times.values())) / (times[last][-1] - min(arrivals.values())),
        "ttft": sum(times[i][0] - arrivals[i] for i in times) / len(times),
        "normalised_latency": sum((times[i][-1] - arrivals[i]) / len(times[i]) for i in times) / len(times),
    }

# %% answer={"exercise": "serving_metrics", "name": "arrivals and times paired by their order", "fails": "3.8 s for 2 tokens"}
def serving_metrics(arrivals, times):
    pairs = list(zip(arrivals.values(), times.values()))
    seconds = max(its[-1] for its in times.values()) - min(arrivals.values())
    return {
        "throughput": sum(map(len, times.values())) / seconds,
        "ttft": sum(its[0] - arrival for arrival, its in pairs) / len(pairs),
        "normalised_latency": sum((its[-1] - arrival) / len(its) for arrival, its in pairs) / len(pairs),
    }

# %% answer={"exercise": "serving_metrics", "name": "time counted from the first key's arrival", "fails": "6 tokens from the first arrival"}
def serving_metrics(arrivals, times):
    seconds = max(its[-1] for its in times.values()) - next(iter(arrivals.values()))
    return {
        "throughput": sum(map(len, times.values())) / seconds,
        "ttft": sum(times[i][0] - arrivals[i] for i in times) / len(times),
        "normalised_latency": sum((times[i][-1] - arrivals[i]) / len(times[i]) for i in times) / len(times),
    }

# %% answer={"exercise": "serving_metrics", "name": "medians for means", "fails": "first tokens after 3.1 s"}
def serving_metrics(arrivals, times):
    import statistics

    seconds = max(its[-1] for its in times.values()) - min(arrivals.values())
    return {
        "throughput": sum(map(len, times.values())) / seconds,
        "ttft": statistics.median(times[i][0] - arrivals[i] for i in times),
        "normalised_latency": statistics.median((times[i][-1] - arrivals[i]) / len(times[i]) for i in times),
    }

# %% answer={"exercise": "serving_metrics", "name": "with the statistics module", "right": true}
def serving_metrics(arrivals, times):
    import statistics

    every = [t for its in times.values() for t in its]
    waited = {i: [t - arrivals[i] for t in its] for i, its in times.items()}
    return {
        "throughput": len(every) / (max(every) - min(arrivals.values())),
        "ttft": statistics.fmean(w[0] for w in waited.values()),
        "normalised_latency": statistics.fmean(w[-1] / len(w) for w in waited.values()),
    }

# %% answer={"exercise": "serving_metrics", "name": "summed in one loop over the arrivals", "right": true}
def serving_metrics(arrivals, times):
    tokens, end, ttft, latency = 0, float("-inf"), 0.0, 0.0
    for i, arrival in arrivals.items():
        first, last, count = times[i][0], times[i][-1], len(times[i])
        tokens, end = tokens + count, max(end, last)
        ttft += (first - arrival) / len(arrivals)
        latency += (last - arrival) / count / len(arrivals)
    return {"normalised_latency": latency, "ttft": ttft, "throughput": tokens / (end - min(arrivals.values()))}

# %% answer={"exercise": "predicted_throughput", "name": "static batches of four", "fails": "the prediction for your load"}
(places, slots), (fixed, per_token) = my_limits, my_cost
seconds = 0.0
for first in range(0, len(my_load), places):
    rows = my_load[first : first + places]
    longest = max(r["max_new_tokens"] for r in rows)
    width = max(r["prompt"] for r in rows) + longest - 1
    seconds += fixed * longest + per_token * len(rows) * width
predicted_throughput = sum(r["max_new_tokens"] for r in my_load) / seconds

# %% answer={"exercise": "predicted_throughput", "name": "the slots not looked at", "fails": "the prediction for your load"}
pool, batches = [dict(each) for each in my_load], []
while pool:
    batches.append(schedule(pool, my_limits[0], 10**9))
    for each in pool:
        each["generated"] += each["id"] in batches[-1]
    pool = [each for each in pool if each["generated"] < each["max_new_tokens"]]
times = token_times({each["id"]: each["prompt"] for each in my_load}, batches, *my_cost)
predicted_throughput = sum(map(len, times.values())) / max(its[-1] for its in times.values())

# %% answer={"exercise": "predicted_throughput", "name": "a batch that is always full", "fails": "the prediction for your load"}
(places, slots), (fixed, per_token) = my_limits, my_cost
output, prompts = sum(r["max_new_tokens"] for r in my_load), sum(r["prompt"] for r in my_load)
predicted_throughput = output / (fixed * output / places + per_token * (prompts + output - len(my_load)))

# %% answer={"exercise": "predicted_throughput", "name": "one request after the other", "fails": "the prediction for your load"}
fixed, per_token = my_cost
output, prompts = sum(r["max_new_tokens"] for r in my_load), sum(r["prompt"] for r in my_load)
predicted_throughput = output / (fixed * output + per_token * (prompts + output - len(my_load)))

# %% answer={"exercise": "predicted_throughput", "name": "prompt tokens counted as output", "fails": "the prediction for your load"}
pool, batches = [dict(each) for each in my_load], []
while pool:
    batches.append(schedule(pool, *my_limits))
    for each in pool:
        each["generated"] += each["id"] in batches[-1]
    pool = [each for each in pool if each["generated"] < each["max_new_tokens"]]
times = token_times({each["id"]: each["prompt"] for each in my_load}, batches, *my_cost)
predicted_throughput = sum(r["prompt"] + r["max_new_tokens"] for r in my_load) / max(its[-1] for its in times.values())

# %% answer={"exercise": "predicted_throughput", "name": "the tokens of a step cost nothing", "fails": "the prediction for your load"}
pool, steps = [dict(each) for each in my_load], 0
while pool:
    batch = schedule(pool, *my_limits)
    steps += 1
    for each in pool:
        each["generated"] += each["id"] in batch
    pool = [each for each in pool if each["generated"] < each["max_new_tokens"]]
predicted_throughput = sum(r["max_new_tokens"] for r in my_load) / (steps * my_cost[0])

# %% answer={"exercise": "predicted_throughput", "name": "group after group of four", "fails": "the prediction for your load"}
(places, slots), (fixed, per_token) = my_limits, my_cost
steps = sum(max(r["max_new_tokens"] for r in my_load[i : i + places]) for i in range(0, len(my_load), places))
output, prompts = sum(r["max_new_tokens"] for r in my_load), sum(r["prompt"] for r in my_load)
predicted_throughput = output / (fixed * steps + per_token * (prompts + output - len(my_load)))

# %% answer={"exercise": "predicted_throughput", "name": "a last token computed for each request", "fails": "the prediction for your load"}
waiting, running, seconds = [dict(r) for r in my_load], [], 0.0
while waiting or running:
    free = my_limits[1] - sum(r["prompt"] + r["max_new_tokens"] for r in running)
    new = []
    for r in waiting:
        if len(running) + len(new) == my_limits[0]:
            break
        if r["prompt"] + r["max_new_tokens"] > free:
            break
        new.append(r)
        free -= r["prompt"] + r["max_new_tokens"]
    waiting = [r for r in waiting if r not in new]
    seconds += my_cost[0] + my_cost[1] * (len(running) + sum(r["prompt"] + 1 for r in new))
    running = [{**r, "generated": r["generated"] + 1} for r in running + new]
    running = [r for r in running if r["generated"] < r["max_new_tokens"]]
predicted_throughput = sum(r["max_new_tokens"] for r in my_load) / seconds

# %% answer={"exercise": "predicted_throughput", "name": "who fits may overtake", "fails": "the prediction for your load"}
waiting, running, seconds = [dict(r) for r in my_load], [], 0.0
while waiting or running:
    free = my_limits[1] - sum(r["prompt"] + r["max_new_tokens"] for r in running)
    new = []
    for r in waiting:
        if len(running) + len(new) == my_limits[0]:
            break
        if r["prompt"] + r["max_new_tokens"] > free:
            continue
        new.append(r)
        free -= r["prompt"] + r["max_new_tokens"]
    waiting = [r for r in waiting if r not in new]
    seconds += my_cost[0] + my_cost[1] * (len(running) + sum(r["prompt"] for r in new))
    running = [{**r, "generated": r["generated"] + 1} for r in running + new]
    running = [r for r in running if r["generated"] < r["max_new_tokens"]]
predicted_throughput = sum(r["max_new_tokens"] for r in my_load) / seconds

# %% answer={"exercise": "predicted_throughput", "name": "the slots of those just let in not taken off", "fails": "the prediction for your load"}
waiting, running, seconds = [dict(r) for r in my_load], [], 0.0
while waiting or running:
    free = my_limits[1] - sum(r["prompt"] + r["max_new_tokens"] for r in running)
    new = []
    for r in waiting:
        if len(running) + len(new) == my_limits[0]:
            break
        if r["prompt"] + r["max_new_tokens"] > free:
            break
        new.append(r)
    waiting = [r for r in waiting if r not in new]
    seconds += my_cost[0] + my_cost[1] * (len(running) + sum(r["prompt"] for r in new))
    running = [{**r, "generated": r["generated"] + 1} for r in running + new]
    running = [r for r in running if r["generated"] < r["max_new_tokens"]]
predicted_throughput = sum(r["max_new_tokens"] for r in my_load) / seconds

# %% answer={"exercise": "predicted_throughput", "name": "nobody comes in before all have ended", "fails": "the prediction for your load"}
waiting, seconds = list(my_load), 0.0
while waiting:
    batch = []
    while waiting and len(batch) < my_limits[0]:
        if sum(r["prompt"] + r["max_new_tokens"] for r in [*batch, waiting[0]]) > my_limits[1]:
            break
        batch.append(waiting.pop(0))
    work = sum(r["prompt"] + r["max_new_tokens"] - 1 for r in batch)
    seconds += my_cost[0] * max(r["max_new_tokens"] for r in batch) + my_cost[1] * work
predicted_throughput = sum(r["max_new_tokens"] for r in my_load) / seconds

# %% answer={"exercise": "predicted_throughput", "name": "who runs and what is left of it", "right": true}
(places, slots), (fixed, per_token) = my_limits, my_cost
waiting, running, seconds = [dict(r) for r in my_load], [], 0.0
while waiting or running:
    tokens = len(running)
    while waiting and len(running) < places:
        need = sum(r["prompt"] + r["max_new_tokens"] for r in [*running, waiting[0]])
        if need > slots:
            break
        running.append(waiting.pop(0))
        tokens += running[-1]["prompt"]
    seconds += fixed + per_token * tokens
    for r in running:
        r["generated"] += 1
    running = [r for r in running if r["generated"] < r["max_new_tokens"]]
predicted_throughput = sum(r["max_new_tokens"] for r in my_load) / seconds

# %% answer={"exercise": "predicted_throughput", "name": "steps counted, tokens summed, rounded as on paper", "right": true}
pool, steps = [dict(each) for each in my_load], 0
while pool:
    batch = schedule(pool, *my_limits)
    pool = [{**r, "generated": r["generated"] + (r["id"] in batch)} for r in pool]
    pool = [r for r in pool if r["generated"] < r["max_new_tokens"]]
    steps += 1
output, prompts = sum(r["max_new_tokens"] for r in my_load), sum(r["prompt"] for r in my_load)
seconds = steps * my_cost[0] + (prompts + output - len(my_load)) * my_cost[1]
predicted_throughput = float(f"{output / seconds:.3g}")
