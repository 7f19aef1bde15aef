"""The bubble of each schedule, and the activations that it holds, as formulas."""

from __future__ import annotations

from llmlab.arguments import checked, instance_of, integer, one_of

CLASSIC = ("gpipe", "1f1b", "interleaved")  # the backward is one operation
NAMES = (*CLASSIC, "zb-h1", "zb-h2", "zb-v", "forward-only")


@checked(p=integer(at_least=1), m=integer(at_least=1), v=integer(at_least=1), of=one_of(["total", "ideal"]))
def classic_bubble(p: int, m: int, v: int = 1, of: str = "total") -> float:
    """(p - 1)/(v·m) over the ideal, (p - 1)/(v·m + p - 1) of the total: GPipe and 1F1B with v = 1, interleaved with any.

    p, m, v: ranks, micro-batches, chunks a rank. The unit of time is F and the whole backward of one chunk. Where m < p,
    each of the v - 1 later rounds through the ranks adds p - m units: a rank has m to do, the first is back after p.
    Holds as ``bubble_closed_form`` says. Raises ValueError or TypeError.
    Source: Narayanan et al. 2021 (Megatron-LM), section 2.2; for m < p the order here.
    """
    idle = p - 1 + (v - 1) * max(0, p - m)
    work = v * m
    return idle / (work + idle if of == "total" else work)


@checked(
    name=one_of(NAMES), p=integer(at_least=1), m=integer(at_least=1), v=integer(at_least=1),
    of=one_of(["total", "ideal"]), steady=instance_of(bool),
)  # fmt: skip
def bubble_closed_form(name: str, p: int, m: int, v: int = 1, of: str = "total", steady: bool = False) -> float:
    """What ``bubble_fraction`` gives for a schedule, as a formula: GPipe and 1F1B (p - 1)/m over the ideal, and so on.

    name: that of the schedule. p, m: ranks and micro-batches. v: chunks a rank, of "interleaved"; the others have their
    own. Holds where F, B and W take the same time, chunks are of one size, and sending takes no time; for GPipe and
    1F1B, and interleaved from m = p on, whatever F and the whole backward take.

    Raises ValueError or TypeError. Sources: Narayanan et al. 2021 (Megatron-LM), section 2.2; Qi et al. 2023 (Zero
    Bubble), section 2; for few micro-batches they say nothing, and the formulas are those of the orders here.
    """
    if name in CLASSIC:
        return classic_bubble(p, m, v if name == "interleaved" else 1, of)
    missing = max(0, p - m)  # micro-batches, to fill the pipeline
    work, idle = {  # of the busiest rank; the unit is F, B or W of one chunk
        "zb-h1": (3 * m, p - 1 + missing),
        "zb-h2": (3 * m, max(0, 2 * p - 1 - m) if steady else p - 1 + missing),
        "zb-v": (6 * m, max(0, 4 * p - 2 - 2 * m) if steady else max(p - 1, 4 * p - 2 - 2 * m)),
        "forward-only": (m, 0 if steady else p - 1),
    }[name]
    return idle / (work + idle if of == "total" else work)


@checked(p=integer(at_least=1), m=integer(at_least=1), v=integer(at_least=1))
def bubble_bound(p: int, m: int, v: int = 1) -> float:
    """(p - 1)/(3·v·m): over the ideal, no flushed iteration on p ranks with v equal chunks each has a smaller bubble.

    The first of some rank's chunks is stage p - 1 or a later one. Its input comes after p - 1 forwards of 1/v of a
    rank's layers; then the rank has F, B and W of m micro-batches to do, a unit each. Raises ValueError or TypeError.
    """
    return (p - 1) / (3 * v * m)


@checked(name=one_of(CLASSIC), p=integer(at_least=1), m=integer(at_least=1), rank=integer(), v=integer(at_least=1))
def classic_activations(name: str, p: int, m: int, rank: int, v: int = 1) -> int:
    """The most activations that ``rank`` holds: GPipe m, 1F1B p - rank, interleaved (v - 1)·g + 2(p - rank) - 1.

    g: the micro-batches of the largest group that goes through a chunk before the next chunk's turn. v: 1 unless
    "interleaved", which is 1F1B where v = 1. Counted in chunks, and never more than the v·m that there are.
    ``activations_closed_form`` checks the rank. Raises ValueError or TypeError.
    Source: Narayanan et al. 2021 (Megatron-LM), section 2.2.
    """
    group = -(-m // (m // p or 1))
    if name == "gpipe":
        most = m
    elif v == 1:
        most = p - rank
    else:
        most = (v - 1) * group + 2 * (p - rank) - 1
    return min(most, v * m)


@checked(
    name=one_of(NAMES), p=integer(at_least=1), m=integer(at_least=1), rank=integer(), v=integer(at_least=1),
    until=one_of(["backward", "weight"]),
)  # fmt: skip
def activations_closed_form(name: str, p: int, m: int, rank: int, v: int = 1, until: str = "backward") -> int:
    """The most activations that ``rank`` holds at a time, as a formula: GPipe m, 1F1B min(p - rank, m), and so on.

    name, p, m, v: as of ``bubble_closed_form``. until: what releases an activation, the end of its backward or that of
    its weight step. Counted in chunks, as ``activations_in_flight`` does, and never more than the v·m that there are.
    Raises ValueError for a rank that is not below p, and as ``checked``.
    Sources: Narayanan et al. 2021 (Megatron-LM), section 2.2; Qi et al. 2023 (Zero Bubble), sections 2 and 6.
    """
    if rank >= p:
        raise ValueError(f"rank: expected one of the {p} ranks from 0 on, got {rank}")
    if name in CLASSIC:
        return classic_activations(name, p, m, rank, v if name == "interleaved" else 1)
    most = min(2 * p - 1, max(p, m))  # ZB-H2 uses the micro-batches that there are
    backward, weight, chunks = {
        "zb-h1": (p - rank, p, 1),
        "zb-h2": (min(2 * (p - rank) - 1, most - rank), most, 1),
        "zb-v": (*[min(2 * p, m + rank + 1)] * 2, 2),
        "forward-only": (1, 1, 1),
    }[name]
    return min(backward if until == "backward" else weight, chunks * m)
