"""The bubble of each schedule, and the activations that it holds, as formulas."""

from __future__ import annotations

from llmlab.arguments import checked, instance_of, integer, one_of

NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "forward-only")


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
    missing = max(0, p - m)  # micro-batches, to fill the pipeline
    work, idle = {  # of the busiest rank; the unit is F, B or W of one chunk
        "gpipe": (3 * m, 3 * (p - 1)),
        "1f1b": (3 * m, 3 * (p - 1)),
        "interleaved": (3 * m * v, 3 * (p - 1) + 3 * (v - 1) * missing),
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
    group = -(-m // max(1, m // p))  # micro-batches that go through a chunk before the next chunk's turn
    most = min(2 * p - 1, max(p, m))  # ZB-H2 uses the micro-batches that there are
    backward, weight, chunks = {
        "gpipe": (m, m, 1),
        "1f1b": (p - rank, p - rank, 1),
        "interleaved": (*[p - rank if v == 1 else (v - 1) * group + 2 * (p - rank) - 1] * 2, v),
        "zb-h1": (p - rank, p, 1),
        "zb-h2": (min(2 * (p - rank) - 1, most - rank), most, 1),
        "zb-v": (*[min(2 * p, m + rank + 1)] * 2, 2),
        "forward-only": (1, 1, 1),
    }[name]
    return min(backward if until == "backward" else weight, chunks * m)
