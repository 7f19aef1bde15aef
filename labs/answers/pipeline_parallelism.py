# %% [markdown]
# Answers to the lab `pipeline_parallelism`, to try its grader with: the mistakes that the chapter warns of, and other
# ways to be right.

# %% answer={"exercise": "partition_layers", "name": "as many layers for each stage", "fails": "eight layers of 1 and a head"}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")
    return [len(costs) // p + (stage < len(costs) % p) for stage in range(p)]

# %% answer={"exercise": "partition_layers", "name": "greedy: a stage is closed before it exceeds the average", "fails": "drawn costs"}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")
    average, sizes, start = sum(costs) / p, [], 0
    for stage in range(p - 1):
        size = 1
        while start + size < len(costs) - (p - stage - 1) and sum(costs[start : start + size + 1]) <= average:
            size += 1
        sizes.append(size)
        start += size
    return [*sizes, len(costs) - start]

# %% answer={"exercise": "partition_layers", "name": "a stage is closed once it has the average, the last ones left empty", "fails": "each stage gets a layer"}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")
    sizes, stage, so_far = [0] * p, 0, 0
    for cost in costs:
        sizes[stage] += 1
        so_far += cost
        if so_far >= sum(costs) * (stage + 1) / p and stage < p - 1:
            stage += 1
    return sizes

# %% answer={"exercise": "partition_layers", "name": "empty stages allowed", "fails": "each stage gets a layer"}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")

    def best(start, stages):
        if stages == 1:
            return sum(costs[start:]), [len(costs) - start]
        ways = []
        for end in range(start, len(costs) + 1):
            dear, sizes = best(end, stages - 1)
            ways.append((max(sum(costs[start:end]), dear), [end - start, *sizes]))
        return min(ways)

    return best(0, p)[1]

# %% answer={"exercise": "partition_layers", "name": "the least sum of squares instead of the least maximum", "fails": "drawn costs"}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")
    cuts = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), p - 1))
    best = min(cuts, key=lambda cut: sum(sum(costs[a:b]) ** 2 for a, b in pairwise(cut)))
    return [b - a for a, b in pairwise(best)]

# %% answer={"exercise": "partition_layers", "name": "the cheapest stage made as cheap as can be", "fails": "drawn costs"}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")
    cuts = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), p - 1))
    best = min(cuts, key=lambda cut: min(sum(costs[a:b]) for a, b in pairwise(cut)))
    return [b - a for a, b in pairwise(best)]

# %% answer={"exercise": "partition_layers", "name": "the first stage chosen as if the others could share the rest evenly", "fails": "drawn costs"}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")
    sizes, rest = [], list(costs)
    for stages in range(p, 1, -1):
        choices = range(1, len(rest) - stages + 2)
        size = min(choices, key=lambda k: max(sum(rest[:k]), sum(rest[k:]) / (stages - 1)))
        sizes.append(size)
        rest = rest[size:]
    return [*sizes, len(rest)]

# %% answer={"exercise": "partition_layers", "name": "where each stage ends instead of how many layers it has", "fails": "eight equal layers"}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")
    cuts = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), p - 1))
    return min(cuts, key=lambda cut: max(sum(costs[a:b]) for a, b in pairwise(cut)))[1:]

# %% answer={"exercise": "partition_layers", "name": "costs rounded to whole numbers", "fails": "costs that are no whole numbers"}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")
    whole = [round(cost) for cost in costs]
    cuts = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), p - 1))
    best = min(cuts, key=lambda cut: max(sum(whole[a:b]) for a, b in pairwise(cut)))
    return [b - a for a, b in pairwise(best)]

# %% answer={"exercise": "partition_layers", "name": "stages without layers for too many stages", "fails": "three layers do not make"}
def partition_layers(costs, p):
    if p > len(costs):
        return [1] * len(costs) + [0] * (p - len(costs))
    cuts = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), p - 1))
    best = min(cuts, key=lambda cut: max(sum(costs[a:b]) for a, b in pairwise(cut)))
    return [b - a for a, b in pairwise(best)]

# %% answer={"exercise": "partition_layers", "name": "all cuts tried", "fails": "80 layers of 1"}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")
    cuts = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), p - 1))
    best = min(cuts, key=lambda cut: max(sum(costs[a:b]) for a, b in pairwise(cut)))
    return [b - a for a, b in pairwise(best)]

# %% answer={"exercise": "partition_layers", "name": "the recursion of the docstring, and nothing kept", "fails": "as many layers and stages"}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")

    def best(start, stages):
        if stages == 1:
            return sum(costs[start:]), [len(costs) - start]
        ways = []
        for second in range(start + 1, len(costs) - stages + 2):
            dear, sizes = best(second, stages - 1)
            ways.append((max(sum(costs[start:second]), dear), [second - start, *sizes]))
        return min(ways)

    return best(0, p)[1]

# %% answer={"exercise": "partition_layers", "name": "the least bound under which stages can be filled", "right": true}
def partition_layers(costs, p):
    layers = len(costs)
    if p > layers:
        raise ValueError("more stages than layers")

    def filled(bound):
        sizes, start = [], 0
        for stage in range(p):
            size = 0
            while start + size < layers - (p - 1 - stage) and sum(costs[start : start + size + 1]) <= bound:
                size += 1
            sizes.append(size)
            start += size
        return sizes if start == layers and min(sizes) >= 1 else None

    bounds = sorted({sum(costs[a:b]) for a in range(layers) for b in range(a + 1, layers + 1)})
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        if filled(bounds[middle]):
            high = middle
        else:
            low = middle + 1
    return filled(bounds[low])

# %% answer={"exercise": "partition_layers", "name": "recursion from the last stage, of equal ways the longest", "right": true}
def partition_layers(costs, p):
    if p > len(costs):
        raise ValueError("more stages than layers")
    known = {}

    def best(end, stages):
        if stages == 1:
            return sum(costs[:end]), [end]
        if (end, stages) not in known:
            chosen = None
            for start in range(stages - 1, end):
                dear, sizes = best(start, stages - 1)
                dear = max(dear, sum(costs[start:end]))
                if chosen is None or dear < chosen[0]:
                    chosen = dear, [*sizes, end - start]
            known[end, stages] = chosen
        return known[end, stages]

    return best(len(costs), p)[1]

# %% answer={"exercise": "partition_layers", "name": "a table from the last layer on, its sizes as floats such as 2.0", "right": true}
def partition_layers(costs, p):
    layers = len(costs)
    if p > layers:
        raise ValueError("more stages than layers")
    table = [[(sum(costs[start:]), [float(layers - start)]) for start in range(layers)]]
    for stages in range(2, p + 1):
        row = []
        for start in range(layers - stages + 1):
            ways = []
            for second in range(start + 1, layers - stages + 2):
                dear, sizes = table[-1][second]
                ways.append((max(dear, sum(costs[start:second])), [float(second - start), *sizes]))
            row.append(min(ways, key=lambda way: way[0]))
        table.append(row)
    return table[-1][0][1]

# %% equivalent={"exercise": "partition_layers", "mutant": "max(cost, dearest) → max(dearest, cost)", "because": "the larger of two numbers is the same either way around"}

# %% equivalent={"exercise": "partition_layers", "mutant": "1 → 2 #2", "because": "the loop works out the best cuts into p + 1 stages too, and nothing reads them"}

# %% answer={"exercise": "gpipe_orders", "name": "each backward right after its forward", "fails": "2 ranks and 3 micro-batches"}
def gpipe_orders(p, m):
    return [[(kind, j) for j in range(m) for kind in "FB"] for _ in range(p)]

# %% answer={"exercise": "gpipe_orders", "name": "1F1B instead", "fails": "no backward before the last forward"}
def gpipe_orders(p, m):
    orders = []
    for rank in range(p):
        ahead = min(p - rank - 1, m)
        order = [("F", j) for j in range(ahead)]
        for j in range(m - ahead):
            order += [("F", ahead + j), ("B", j)]
        orders.append(order + [("B", j) for j in range(m - ahead, m)])
    return orders

# %% answer={"exercise": "gpipe_orders", "name": "the order of one rank", "fails": "2 ranks and 3 micro-batches"}
def gpipe_orders(p, m):
    return [("F", j) for j in range(m)] + [("B", j) for j in range(m)]

# %% answer={"exercise": "gpipe_orders", "name": "micro-batches counted from 1", "fails": "any p and m"}
def gpipe_orders(p, m):
    return [[(kind, j) for kind in "FB" for j in range(1, m + 1)] for _ in range(p)]

# %% answer={"exercise": "gpipe_orders", "name": "forwards alone", "fails": "any p and m"}
def gpipe_orders(p, m):
    return [[("F", j) for j in range(m)] for _ in range(p)]

# %% answer={"exercise": "gpipe_orders", "name": "each rank has micro-batches of its own", "fails": "any p and m"}
def gpipe_orders(p, m):
    return [[(kind, j) for kind in "FB" for j in range(rank, m, p)] for rank in range(p)]

# %% answer={"exercise": "gpipe_orders", "name": "each rank begins with another micro-batch", "fails": "no rank waits without need"}
def gpipe_orders(p, m):
    return [[(kind, (j + rank) % m) for kind in "FB" for j in range(m)] for rank in range(p)]

# %% answer={"exercise": "gpipe_orders", "name": "backwards reversed on every other rank", "fails": "3 ranks and 4 micro-batches"}
def gpipe_orders(p, m):
    return [[("F", j) for j in range(m)] + [("B", j) for j in range(m)][:: 1 - 2 * (rank % 2)] for rank in range(p)]

# %% answer={"exercise": "gpipe_orders", "name": "a list for each micro-batch instead of each rank", "fails": "2 ranks and 3 micro-batches"}
def gpipe_orders(p, m):
    return [[(kind, j) for kind in "FB" for j in range(p)] for _ in range(m)]

# %% answer={"exercise": "gpipe_orders", "name": "operations as texts", "fails": "2 ranks and 3 micro-batches"}
def gpipe_orders(p, m):
    return [[f"{kind}{j}" for kind in "FB" for j in range(m)] for _ in range(p)]

# %% answer={"exercise": "gpipe_orders", "name": "the micro-batch before the kind", "fails": "2 ranks and 3 micro-batches"}
def gpipe_orders(p, m):
    return [[(j, kind) for kind in "FB" for j in range(m)] for _ in range(p)]

# %% answer={"exercise": "gpipe_orders", "name": "the backwards of the last micro-batch first, as in the paper", "right": true}
def gpipe_orders(p, m):
    return [[("F", j) for j in range(m)] + [("B", j) for j in reversed(range(m))] for _ in range(p)]

# %% answer={"exercise": "gpipe_orders", "name": "step by step", "right": true}
def gpipe_orders(p, m):
    orders = [[] for _ in range(p)]
    for step in range(2 * m):
        for order in orders:
            order.append(["F", step] if step < m else ["B", step - m])
    return orders

# %% answer={"exercise": "gpipe_orders", "name": "the micro-batches as floats such as 2.0", "right": true}
def gpipe_orders(p, m):
    return [[(kind, j / 1) for kind in "FB" for j in range(m)] for _ in range(p)]

# %% answer={"exercise": "one_f_one_b_orders", "name": "one forward ahead too many", "fails": "rank r holds p - r"}
def one_f_one_b_orders(p, m):
    orders = []
    for rank in range(p):
        ahead = min(p - rank, m)
        order = [("F", j) for j in range(ahead)]
        for j in range(m - ahead):
            order += [("F", ahead + j), ("B", j)]
        orders.append(order + [("B", j) for j in range(m - ahead, m)])
    return orders

# %% answer={"exercise": "one_f_one_b_orders", "name": "as many forwards ahead on every rank", "fails": "rank r holds p - r"}
def one_f_one_b_orders(p, m):
    ahead = min(p - 1, m)
    order = [("F", j) for j in range(ahead)]
    for j in range(m - ahead):
        order += [("F", ahead + j), ("B", j)]
    return [order + [("B", j) for j in range(m - ahead, m)] for _ in range(p)]

# %% answer={"exercise": "one_f_one_b_orders", "name": "the ranks in reverse", "fails": "any p and m"}
def one_f_one_b_orders(p, m):
    orders = []
    for rank in range(p):
        ahead = min(rank, m)
        order = [("F", j) for j in range(ahead)]
        for j in range(m - ahead):
            order += [("F", ahead + j), ("B", j)]
        orders.append(order + [("B", j) for j in range(m - ahead, m)])
    return orders

# %% answer={"exercise": "one_f_one_b_orders", "name": "no forwards ahead", "fails": "it takes no longer than GPipe"}
def one_f_one_b_orders(p, m):
    return [[(kind, j) for j in range(m) for kind in "FB"] for _ in range(p)]

# %% answer={"exercise": "one_f_one_b_orders", "name": "more forwards ahead than micro-batches", "fails": "fewer micro-batches"}
def one_f_one_b_orders(p, m):
    orders = []
    for rank in range(p):
        ahead = p - rank - 1
        order = [("F", j) for j in range(ahead)]
        for j in range(m - ahead):
            order += [("F", ahead + j), ("B", j)]
        orders.append(order + [("B", j) for j in range(max(0, m - ahead), m)])
    return orders

# %% answer={"exercise": "one_f_one_b_orders", "name": "the turns do both for the same micro-batch", "fails": "it takes no longer than GPipe"}
def one_f_one_b_orders(p, m):
    orders = []
    for rank in range(p):
        ahead = min(p - rank - 1, m)
        order = [("F", j) for j in range(ahead)]
        for j in range(ahead, m):
            order += [("F", j), ("B", j)]
        orders.append(order + [("B", j) for j in range(ahead)])
    return orders

# %% answer={"exercise": "one_f_one_b_orders", "name": "the micro-batches of the turns begin again at 0", "fails": "any p and m"}
def one_f_one_b_orders(p, m):
    orders = []
    for rank in range(p):
        ahead = min(p - rank - 1, m)
        order = [("F", j) for j in range(ahead)]
        for j in range(m - ahead):
            order += [("F", j), ("B", j)]
        orders.append(order + [("B", j) for j in range(m - ahead, m)])
    return orders

# %% answer={"exercise": "one_f_one_b_orders", "name": "the backwards left at the end forgotten", "fails": "2 ranks and 3"}
def one_f_one_b_orders(p, m):
    orders = []
    for rank in range(p):
        ahead = min(p - rank - 1, m)
        order = [("F", j) for j in range(ahead)]
        for j in range(m - ahead):
            order += [("F", ahead + j), ("B", j)]
        orders.append(order)
    return orders

# %% answer={"exercise": "one_f_one_b_orders", "name": "the backward first in each turn", "fails": "any p and m"}
def one_f_one_b_orders(p, m):
    orders = []
    for rank in range(p):
        ahead = min(p - rank - 1, m)
        order = [("F", j) for j in range(ahead)]
        for j in range(m - ahead):
            order += [("B", j), ("F", ahead + j)]
        orders.append(order + [("B", j) for j in range(m - ahead, m)])
    return orders

# %% answer={"exercise": "one_f_one_b_orders", "name": "GPipe again", "fails": "rank r holds p - r"}
def one_f_one_b_orders(p, m):
    return gpipe_orders(p, m)

# %% answer={"exercise": "one_f_one_b_orders", "name": "a backward whenever p - r are held", "right": true}
def one_f_one_b_orders(p, m):
    orders = []
    for rank in range(p):
        order, forwards, backwards = [], 0, 0
        while backwards < m:
            if forwards < m and forwards - backwards < p - rank:
                order.append(("F", forwards))
                forwards += 1
            else:
                order.append(("B", backwards))
                backwards += 1
        orders.append(order)
    return orders

# %% answer={"exercise": "one_f_one_b_orders", "name": "the kinds as a text, then the numbers", "right": true}
def one_f_one_b_orders(p, m):
    orders = []
    for rank in range(p):
        first = min(p - rank, m)
        text = "F" * first + "BF" * (m - first) + "B" * first
        orders.append([(kind, text[:place].count(kind)) for place, kind in enumerate(text)])
    return orders

# %% equivalent={"exercise": "one_f_one_b_orders", "mutant": "min(p - rank - 1, m) → min(m, p - rank - 1)", "because": "the smaller of two numbers is the same either way around"}

# %% answer={"exercise": "classic_bubble", "name": "total and ideal mixed up", "fails": "4 ranks, 8 micro-batches: 3/11"}
def classic_bubble(p, m, v=1, of="total"):
    idle = p - 1 + (v - 1) * max(0, p - m)
    return idle / (v * m) if of == "total" else idle / (v * m + idle)

# %% answer={"exercise": "classic_bubble", "name": "always over the ideal", "fails": "one chunk a rank"}
def classic_bubble(p, m, v=1, of="total"):
    return (p - 1 + (v - 1) * max(0, p - m)) / (v * m)

# %% answer={"exercise": "classic_bubble", "name": "p units idle instead of p - 1", "fails": "one chunk a rank"}
def classic_bubble(p, m, v=1, of="total"):
    idle = p + (v - 1) * max(0, p - m)
    return idle / (v * m + idle if of == "total" else v * m)

# %% answer={"exercise": "classic_bubble", "name": "chunks ignored", "fails": "several chunks a rank: the work"}
def classic_bubble(p, m, v=1, of="total"):
    return (p - 1) / (m + p - 1 if of == "total" else m)

# %% answer={"exercise": "classic_bubble", "name": "the fraction of one chunk divided by v, of the total too", "fails": "several chunks a rank: the work"}
def classic_bubble(p, m, v=1, of="total"):
    return (p - 1) / (m + p - 1 if of == "total" else m) / v

# %% answer={"exercise": "classic_bubble", "name": "the idle time grows with the chunks too", "fails": "4 ranks, 8 micro-batches, two"}
def classic_bubble(p, m, v=1, of="total"):
    idle = v * (p - 1)
    return idle / (v * m + idle if of == "total" else v * m)

# %% answer={"exercise": "classic_bubble", "name": "few micro-batches fill the loop as many do", "fails": "several chunks a rank and fewer"}
def classic_bubble(p, m, v=1, of="total"):
    return (p - 1) / (v * m + p - 1 if of == "total" else v * m)

# %% answer={"exercise": "classic_bubble", "name": "the gap in every round, the first too", "fails": "one chunk a rank"}
def classic_bubble(p, m, v=1, of="total"):
    idle = p - 1 + v * max(0, p - m)
    return idle / (v * m + idle if of == "total" else v * m)

# %% answer={"exercise": "classic_bubble", "name": "more micro-batches than ranks make the gap negative", "fails": "several chunks a rank: the work"}
def classic_bubble(p, m, v=1, of="total"):
    idle = p - 1 + (v - 1) * (p - m)
    return idle / (v * m + idle if of == "total" else v * m)

# %% answer={"exercise": "classic_bubble", "name": "the busy share of the total", "fails": "4 ranks, 8 micro-batches: 3/11"}
def classic_bubble(p, m, v=1, of="total"):
    idle = p - 1 + (v - 1) * max(0, p - m)
    return v * m / (v * m + idle) if of == "total" else idle / (v * m)

# %% answer={"exercise": "classic_bubble", "name": "round by round", "right": true}
def classic_bubble(p, m, v=1, of="total"):
    total = m + p - 1
    for _ in range(v - 1):
        total += max(p, m)
    return 1 - v * m / total if of == "total" else total / (v * m) - 1

# %% answer={"exercise": "classic_bubble", "name": "the end of each forward on the last rank", "right": true}
def classic_bubble(p, m, v=1, of="total"):
    ends = [0] * m
    for stage in range(p * v):
        if stage % p == 0:  # a new round on rank 0: after the rank's own last one
            free = [0] * p if stage == 0 else free
        for j in range(m):
            ends[j] = free[stage % p] = max(ends[j], free[stage % p]) + 1
    idle = ends[-1] - v * m
    return idle / {"total": ends[-1], "ideal": v * m}[of]

# %% equivalent={"exercise": "classic_bubble", "mutant": "max(0, p - m) → max(p - m, 0)", "because": "the larger of two numbers is the same either way around"}

# %% answer={"exercise": "classic_activations", "name": "1F1B holds p on every rank", "fails": "4 ranks, 8 micro-batches"}
def classic_activations(name, p, m, rank, v=1):
    group = math.ceil(m / max(1, m // p))
    ahead = {"gpipe": m, "1f1b": p - 1, "interleaved": 2 * (p - rank - 1) + (v - 1) * group if v > 1 else p - 1}[name]
    return min(ahead + 1, v * m)

# %% answer={"exercise": "classic_activations", "name": "the forwards ahead alone", "fails": "GPipe and 1F1B"}
def classic_activations(name, p, m, rank, v=1):
    group = math.ceil(m / max(1, m // p))
    one = p - rank - 1
    return min({"gpipe": m, "1f1b": one, "interleaved": 2 * one + (v - 1) * group if v > 1 else one}[name], v * m)

# %% answer={"exercise": "classic_activations", "name": "more than there are micro-batches", "fails": "no more than there are"}
def classic_activations(name, p, m, rank, v=1):
    group = math.ceil(m / max(1, m // p))
    one = p - rank
    return {"gpipe": m, "1f1b": one, "interleaved": 2 * one - 1 + (v - 1) * group if v > 1 else one}[name]

# %% answer={"exercise": "classic_activations", "name": "the ranks in reverse", "fails": "4 ranks, 8 micro-batches"}
def classic_activations(name, p, m, rank, v=1):
    group = math.ceil(m / max(1, m // p))
    one = rank + 1
    return min({"gpipe": m, "1f1b": one, "interleaved": 2 * one - 1 + (v - 1) * group if v > 1 else one}[name], v * m)

# %% answer={"exercise": "classic_activations", "name": "chunks ignored", "fails": "interleaved on rank 0 of 4"}
def classic_activations(name, p, m, rank, v=1):
    return m if name == "gpipe" else min(p - rank, m)

# %% answer={"exercise": "classic_activations", "name": "1F1B's count for each chunk", "fails": "interleaved, where p divides m"}
def classic_activations(name, p, m, rank, v=1):
    return m if name == "gpipe" else v * min(p - rank, m)

# %% answer={"exercise": "classic_activations", "name": "groups of p, whatever m is", "fails": "interleaved, where p does not"}
def classic_activations(name, p, m, rank, v=1):
    one = p - rank
    return min({"gpipe": m, "1f1b": one, "interleaved": 2 * one - 1 + (v - 1) * p if v > 1 else one}[name], v * m)

# %% answer={"exercise": "classic_activations", "name": "the size of the smallest group", "fails": "interleaved, where p does not"}
def classic_activations(name, p, m, rank, v=1):
    group = m // max(1, m // p)
    one = p - rank
    return min({"gpipe": m, "1f1b": one, "interleaved": 2 * one - 1 + (v - 1) * group if v > 1 else one}[name], v * m)

# %% answer={"exercise": "classic_activations", "name": "a chunk's count not doubled: 1F1B's forwards ahead and the groups", "fails": "interleaved, where p divides m"}
def classic_activations(name, p, m, rank, v=1):
    group = math.ceil(m / max(1, m // p))
    return m if name == "gpipe" else min(p - rank + (v - 1) * group, v * m)

# %% answer={"exercise": "classic_activations", "name": "interleaved with one chunk not taken for 1F1B", "fails": "GPipe and 1F1B"}
def classic_activations(name, p, m, rank, v=1):
    group = math.ceil(m / max(1, m // p))
    one = p - rank
    return min({"gpipe": m, "1f1b": one, "interleaved": 2 * one - 1 + (v - 1) * group}[name], v * m)

# %% answer={"exercise": "classic_activations", "name": "counted along the order", "right": true}
def classic_activations(name, p, m, rank, v=1):
    groups = max(1, m // p)
    ahead = {"gpipe": m, "1f1b": p - rank - 1, "interleaved": p - rank - 1}[name]
    if v > 1:
        ahead = 2 * (p - rank - 1) + (v - 1) * max(len(range(g, m, groups)) for g in range(groups))
    ahead = min(ahead, m * v)
    held = most = 0
    for kind in "F" * ahead + "FB" * (m * v - ahead) + "B" * ahead:
        held += {"F": 1, "B": -1}[kind]
        most = max(most, held)
    return most

# %% answer={"exercise": "classic_activations", "name": "the number as a float such as 4.0", "right": true}
def classic_activations(name, p, m, rank, v=1):
    ahead = {"gpipe": m, "1f1b": p - rank - 1}.get(name, p - rank - 1 if v == 1 else 2 * (p - rank - 1))
    if v > 1:
        ahead += (v - 1) * math.ceil(m / max(1, m // p))
    return float(min(ahead + 1, v * m))

# %% answer={"exercise": "classic_activations", "name": "one case after another", "right": true}
def classic_activations(name, p, m, rank, v=1):
    if name == "gpipe":
        return m
    behind = p - rank - 1
    if v == 1:
        return m if m <= behind else behind + 1
    groups = m // p
    largest = m if groups == 0 else m // groups + (m % groups > 0)
    ahead = 2 * behind + (v - 1) * largest
    return m * v if m * v <= ahead else ahead + 1

# %% equivalent={"exercise": "classic_activations", "mutant": "min(most, v * m) → min(v * m, most)", "because": "the smaller of two numbers is the same either way around"}

# %% answer={"exercise": "predicted_makespan", "name": "GPipe's formula, and the transfers in and out", "fails": "the prediction for your"}
once = sum(my_forward) + sum(my_backward)
dear = max(my_forward) + max(my_backward)
predicted_makespan = once + (my_m - 1) * dear + 2 * (my_p - 1) * my_transfer

# %% answer={"exercise": "predicted_makespan", "name": "the first micro-batch's way, then the dearest stage's pace", "fails": "the prediction for your"}
once = sum(my_forward) + sum(my_backward)
dear = max(f + b for f, b in zip(my_forward, my_backward))
predicted_makespan = once + 2 * (my_p - 1) * my_transfer + (my_m - 1) * dear

# %% answer={"exercise": "predicted_makespan", "name": "the ideal: what the dearest rank works, without a bubble", "fails": "the prediction for your"}
dear = max(f + b for f, b in zip(my_forward, my_backward))
predicted_makespan = my_m * dear

# %% answer={"exercise": "predicted_makespan", "name": "one micro-batch after another", "fails": "the prediction for your"}
once = sum(my_forward) + sum(my_backward)
predicted_makespan = my_m * (once + 2 * (my_p - 1) * my_transfer)

# %% answer={"exercise": "predicted_makespan", "name": "rounds of p micro-batches, the last one counted as whole", "fails": "the prediction for your"}
once = sum(my_forward) + sum(my_backward)
predicted_makespan = math.ceil(my_m / my_p) * (once + 2 * (my_p - 1) * my_transfer)

# %% answer={"exercise": "predicted_makespan", "name": "every stage as dear as the dearest", "fails": "the prediction for your"}
predicted_makespan = (my_m + my_p - 1) * (max(my_forward) + max(my_backward))

# %% answer={"exercise": "predicted_makespan", "name": "every stage as dear as the average", "fails": "the prediction for your"}
predicted_makespan = (my_m + my_p - 1) * (sum(my_forward) + sum(my_backward)) / my_p

# %% answer={"exercise": "predicted_makespan", "name": "the bubble of equal stages over the dearest rank's work", "fails": "the prediction for your"}
dear = max(f + b for f, b in zip(my_forward, my_backward))
predicted_makespan = my_m * dear * (1 + classic_bubble(my_p, my_m, of="ideal"))

# %% answer={"exercise": "predicted_makespan", "name": "transfers that take no time", "fails": "the prediction for your"}
orders = one_f_one_b_orders(my_p, my_m)
ends = {}
def end_of(rank, place):
    if place < 0:
        return 0
    if (rank, place) not in ends:
        kind, j = orders[rank][place]
        start, other = end_of(rank, place - 1), rank - 1 if kind == "F" else rank + 1
        if 0 <= other < my_p:
            start = max(start, end_of(other, orders[other].index((kind, j))) + 0)
        ends[rank, place] = start + (my_forward if kind == "F" else my_backward)[rank]
    return ends[rank, place]
predicted_makespan = max(end_of(rank, 2 * my_m - 1) for rank in range(my_p))

# %% answer={"exercise": "predicted_makespan", "name": "transfers added at the end, in and out", "fails": "the prediction for your"}
orders = one_f_one_b_orders(my_p, my_m)
ends = {}
def end_of(rank, place):
    if place < 0:
        return 0
    if (rank, place) not in ends:
        kind, j = orders[rank][place]
        start, other = end_of(rank, place - 1), rank - 1 if kind == "F" else rank + 1
        if 0 <= other < my_p:
            start = max(start, end_of(other, orders[other].index((kind, j))) + 0)
        ends[rank, place] = start + (my_forward if kind == "F" else my_backward)[rank]
    return ends[rank, place]
predicted_makespan = max(end_of(rank, 2 * my_m - 1) for rank in range(my_p)) + 2 * (my_p - 1) * my_transfer

# %% answer={"exercise": "predicted_makespan", "name": "a rank is busy while it sends", "fails": "the prediction for your"}
orders = one_f_one_b_orders(my_p, my_m)
ends = {}
def end_of(rank, place):
    if place < 0:
        return 0
    if (rank, place) not in ends:
        kind, j = orders[rank][place]
        start, other = end_of(rank, place - 1), rank - 1 if kind == "F" else rank + 1
        if 0 <= other < my_p:
            start = max(start, end_of(other, orders[other].index((kind, j))) + 0)
        ends[rank, place] = start + (my_forward if kind == "F" else my_backward)[rank] + my_transfer
    return ends[rank, place]
predicted_makespan = max(end_of(rank, 2 * my_m - 1) for rank in range(my_p))

# %% answer={"exercise": "predicted_makespan", "name": "activations travel and gradients do not", "fails": "the prediction for your"}
orders = one_f_one_b_orders(my_p, my_m)
ends = {}
def end_of(rank, place):
    if place < 0:
        return 0
    if (rank, place) not in ends:
        kind, j = orders[rank][place]
        start, other = end_of(rank, place - 1), rank - 1 if kind == "F" else rank + 1
        if 0 <= other < my_p:
            start = max(start, end_of(other, orders[other].index((kind, j))) + (my_transfer if kind == "F" else 0))
        ends[rank, place] = start + (my_forward if kind == "F" else my_backward)[rank]
    return ends[rank, place]
predicted_makespan = max(end_of(rank, 2 * my_m - 1) for rank in range(my_p))

# %% answer={"exercise": "predicted_makespan", "name": "a backward as long as a forward", "fails": "the prediction for your"}
orders = one_f_one_b_orders(my_p, my_m)
ends = {}
def end_of(rank, place):
    if place < 0:
        return 0
    if (rank, place) not in ends:
        kind, j = orders[rank][place]
        start, other = end_of(rank, place - 1), rank - 1 if kind == "F" else rank + 1
        if 0 <= other < my_p:
            start = max(start, end_of(other, orders[other].index((kind, j))) + my_transfer)
        ends[rank, place] = start + my_forward[rank]
    return ends[rank, place]
predicted_makespan = max(end_of(rank, 2 * my_m - 1) for rank in range(my_p))

# %% answer={"exercise": "predicted_makespan", "name": "GPipe's order", "fails": "the prediction for your"}
orders = gpipe_orders(my_p, my_m)
ends = {}
def end_of(rank, place):
    if place < 0:
        return 0
    if (rank, place) not in ends:
        kind, j = orders[rank][place]
        start, other = end_of(rank, place - 1), rank - 1 if kind == "F" else rank + 1
        if 0 <= other < my_p:
            start = max(start, end_of(other, orders[other].index((kind, j))) + my_transfer)
        ends[rank, place] = start + (my_forward if kind == "F" else my_backward)[rank]
    return ends[rank, place]
predicted_makespan = max(end_of(rank, 2 * my_m - 1) for rank in range(my_p))

# %% answer={"exercise": "predicted_makespan", "name": "in seconds", "fails": "the prediction for your"}
orders = one_f_one_b_orders(my_p, my_m)
ends = {}
def end_of(rank, place):
    if place < 0:
        return 0
    if (rank, place) not in ends:
        kind, j = orders[rank][place]
        start, other = end_of(rank, place - 1), rank - 1 if kind == "F" else rank + 1
        if 0 <= other < my_p:
            start = max(start, end_of(other, orders[other].index((kind, j))) + my_transfer)
        ends[rank, place] = start + (my_forward if kind == "F" else my_backward)[rank]
    return ends[rank, place]
predicted_makespan = max(end_of(rank, 2 * my_m - 1) for rank in range(my_p)) / 1000

# %% answer={"exercise": "predicted_makespan", "name": "when each operation ends, rank by rank until nothing is left", "right": true}
waiting = [list(order) for order in one_f_one_b_orders(my_p, my_m)]
arrives, free = {}, [0] * my_p
for _ in range(2 * my_p * my_m):
    for rank, order in enumerate(waiting):
        if order:
            kind, j = order[0]
            other = rank - 1 if kind == "F" else rank + 1
            if other in (-1, my_p) or (kind, j, other) in arrives:
                start = max(free[rank], arrives.get((kind, j, other), 0))
                free[rank] = start + {"F": my_forward, "B": my_backward}[kind][rank]
                arrives[kind, j, rank] = free[rank] + my_transfer
                order.pop(0)
predicted_makespan = max(free)

# %% answer={"exercise": "predicted_makespan", "name": "relaxed until no end moves", "right": true}
orders = one_f_one_b_orders(my_p, my_m)
end = {(rank, *o): 0.0 for rank in range(my_p) for o in orders[rank]}
for _ in range(2 * my_p * my_m):
    for rank in range(my_p):
        before = 0.0
        for kind, j in orders[rank]:
            neighbour = (rank - 1 if kind == "F" else rank + 1, kind, j)
            arrival = end[neighbour] + my_transfer if neighbour in end else 0.0
            before = end[rank, kind, j] = max(before, arrival) + (my_forward if kind == "F" else my_backward)[rank]
predicted_makespan = max(end.values())

# %% answer={"exercise": "predicted_makespan", "name": "rounded to three digits, as on paper", "right": true}
orders = one_f_one_b_orders(my_p, my_m)
ends = {}
def end_of(rank, place):
    if place < 0:
        return 0
    if (rank, place) not in ends:
        kind, j = orders[rank][place]
        start, other = end_of(rank, place - 1), rank - 1 if kind == "F" else rank + 1
        if 0 <= other < my_p:
            start = max(start, end_of(other, orders[other].index((kind, j))) + my_transfer)
        ends[rank, place] = start + (my_forward if kind == "F" else my_backward)[rank]
    return ends[rank, place]
predicted_makespan = float(f"{max(end_of(rank, 2 * my_m - 1) for rank in range(my_p)):.3g}")

# %% equivalent={"exercise": "predicted_makespan", "mutant": "0 → 1", "because": "the first operation starts 1 ms late: a thousandth of the makespan, well inside the stated band of 1 %"}

# %% equivalent={"exercise": "predicted_makespan", "mutant": "0 → -1", "because": "the first operation starts 1 ms early: a thousandth of the makespan, well inside the stated band of 1 %"}
