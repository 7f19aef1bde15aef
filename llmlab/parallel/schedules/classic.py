"""The schedules whose backward is one operation: GPipe, 1F1B, interleaved 1F1B; and inference."""

from __future__ import annotations

from llmlab.arguments import checked, integer
from llmlab.parallel.schedules.schedule import Operation, Schedule

Orders = list[list[tuple[str, int]]]  # for each rank, its operations as (kind, micro_batch)


@checked(p=integer(at_least=1), m=integer(at_least=1))
def gpipe_orders(p: int, m: int) -> Orders:
    """The orders of ``gpipe`` as plain data: on each rank m forwards, then m backwards. Raises as ``gpipe``."""
    forwards = [("F", j) for j in range(m)]
    backwards = [("B", j) for j in range(m)]
    return [forwards + backwards for _ in range(p)]


@checked(p=integer(at_least=1), m=integer(at_least=1))
def gpipe(p: int, m: int) -> Schedule:
    """All m forwards, then all m backwards: bubble (p - 1)/(m + p - 1) of the total, m activations in flight.

    p, m: ranks and micro-batches, any numbers. The paper takes the backwards in reverse; here they come in the order of
    the forwards, at the same bubble and the same peak. Raises TypeError or ValueError for what is no number above 0.
    Source: Huang et al. 2019 (GPipe), figure 2.
    """
    return _schedule("gpipe", m, gpipe_orders(p, m))


@checked(p=integer(at_least=1), m=integer(at_least=1))
def one_f_one_b_orders(p: int, m: int) -> Orders:
    """The orders of ``one_f_one_b`` as plain data. Raises as ``one_f_one_b``."""
    orders = []
    for rank in range(p):
        ahead = min(p - rank - 1, m)
        order = [("F", j) for j in range(ahead)]
        for j in range(m - ahead):
            order += [("F", ahead + j), ("B", j)]
        order += [("B", j) for j in range(m - ahead, m)]
        orders.append(order)
    return orders


@checked(p=integer(at_least=1), m=integer(at_least=1))
def one_f_one_b(p: int, m: int) -> Schedule:
    """One forward, one backward in turns, as soon as a backward can be done: GPipe's bubble, min(p - r, m) in flight.

    p, m: ranks and micro-batches, any numbers. Rank r does p - r - 1 forwards ahead, then a forward and a backward in
    turns, then the backwards that are left. Raises TypeError or ValueError for what is no number above 0.
    Source: Narayanan et al. 2021 (Megatron-LM), section 2.2.1, with a flush at the end; PipeDream 2019 has none.
    """
    return _schedule("1f1b", m, one_f_one_b_orders(p, m))


@checked(p=integer(at_least=1), m=integer(at_least=1), v=integer(at_least=1))
def interleaved(p: int, m: int, v: int) -> Schedule:
    """1F1B with v chunks of layers a rank: bubble (p - 1)/(v·m) over the ideal, for v times the transfers.

    p, m, v: ranks, micro-batches, and chunks a rank. Micro-batches go through in groups: a group through one chunk,
    then through the next. Rank r does 2(p - r - 1) + (v - 1)·g forwards ahead, g the largest group; v = 1 is 1F1B.

    Any m will do. It is cut into ⌊m/p⌋ groups as even as can be, or one where m < p. Where p divides m, which Megatron
    asks for, they are of p, and this is its order; elsewhere some are larger, and more activations are in flight. The
    bubble is the one above from m = p on; fewer micro-batches cannot fill the loop.

    Raises TypeError or ValueError for what is no number above 0.
    Source: Narayanan et al. 2021 (Megatron-LM), section 2.2.2.
    """
    groups = max(1, m // p)
    starts = [i * (m // groups) + min(i, m % groups) for i in range(groups + 1)]
    largest = starts[1]
    turns = [(j, c) for i in range(groups) for c in range(v) for j in range(starts[i], starts[i + 1])]
    forwards = [Operation("F", j, c) for j, c in turns]
    backwards = [Operation("B", j, v - 1 - c) for j, c in turns]
    orders = []
    for rank in range(p):
        ahead = p - rank - 1 if v == 1 else 2 * (p - rank - 1) + (v - 1) * largest
        ahead = min(ahead, m * v)
        order = forwards[:ahead]
        for forward, backward in zip(forwards[ahead:], backwards[: m * v - ahead], strict=True):
            order += [forward, backward]
        orders.append(order + backwards[m * v - ahead :])
    return Schedule("interleaved", p, m, v, orders)


@checked(p=integer(at_least=1), m=integer(at_least=1))
def forward_only(p: int, m: int) -> Schedule:
    """Inference: m micro-batches flow through p ranks, which fill and drain: bubble (p - 1)/(m + p - 1) of the total.

    Between its own first and last operation no rank is idle. Raises TypeError or ValueError for what is no number
    above 0.
    """
    order = [Operation("F", j) for j in range(m)]
    return Schedule("forward-only", p, m, 1, [order] * p, kinds="F")


def _schedule(name: str, m: int, orders: Orders) -> Schedule:
    operations = [[Operation(kind, j) for kind, j in order] for order in orders]
    return Schedule(name, len(orders), m, 1, operations)
