"""The schedules that split the backward: its weights' part waits for nobody, and fills what would be idle time."""

from __future__ import annotations

from collections import Counter

from llmlab.arguments import checked, integer, one_of
from llmlab.parallel.schedules.schedule import Operation, Schedule


@checked(p=integer(at_least=1), m=integer(at_least=1), kind=one_of(["H1", "H2", "V"]))
def zero_bubble(p: int, m: int, kind: str) -> Schedule:
    """ZB-H1, ZB-H2 or ZB-V: backwards for the input come early, those for the weights where a rank would wait.

    p, m: ranks and micro-batches, any numbers. Where F, B and W take one unit each:

    kind  bubble over the ideal, flushed   in steady state           in flight, worst rank
    "H1"  (p - 1)/(3m) from m = p on       the same                  p, as 1F1B
    "H2"  (p - 1)/(3m) from m = p on       none from m = 2p - 1 on   2p - 1
    "V"   (p - 1)/(6m) from 2m = 3p - 1 on none from m = 2p - 1 on   2p of half the size: v = 2 chunks a rank

    Flushed, no schedule of equal chunks gets below (p - 1)/(3·v·m): ``bubble_bound`` says why. In steady state a rank
    is looked at between its own first and last operation. An iteration of too few micro-batches for the bound takes
    2(m + p) - 1 units. For v = 1 that is the least: the first backward reaches rank 0 after 2p - 1, and m backwards and
    weight steps are still to come; V's chunks would allow less. ``bubble_closed_form`` and ``activations_closed_form``
    have the formulas for any m.

    Raises TypeError or ValueError for p or m that is no number above 0, or an unknown kind.
    Source: Qi et al. 2023 (Zero Bubble Pipeline Parallelism, arXiv:2401.10241), sections 2 and 6.
    """
    if kind == "V":
        orders = [_order(m, _v_phases(p, max(m, 2 * p - 1), rank)) for rank in range(p)]
        return Schedule("zb-v", p, m, 2, orders, kinds="FBW", placement="v")
    in_flight = p if kind == "H1" else min(2 * p - 1, max(p, m))
    orders = [_order(m, _h_phases(p, max(m, in_flight), in_flight, rank)) for rank in range(p)]
    return Schedule(f"zb-{kind.lower()}", p, m, 1, orders, kinds="FBW")


Phases = list[tuple[str, int]]


def _h_phases(p: int, m: int, in_flight: int, rank: int) -> Phases:
    """Each rank fills up to ``in_flight`` activations: first ones that wait for B, then ones that wait for W alone."""
    ahead = min(2 * (p - rank) - 1, in_flight - rank)
    delayed = in_flight - ahead
    return [("F", ahead), ("B F", delayed), ("B W F", m - in_flight), ("B W", ahead), ("W", delayed)]


def _v_phases(p: int, m: int, rank: int) -> Phases:
    """The digit is the chunk. In the middle a rank does all six operations in turns, before and after those it can."""
    ahead = 2 * (p - rank) - 1
    last = p - rank
    turns = m - ahead - rank
    return [
        ("F0", ahead), ("F1 F0", rank), ("F1 B1 W1", last),
        ("F0 B0 W0 F1 B1 W1", turns), ("B0 W0 F1 B1 W1", m - rank - last - turns),
        ("B0 B1", rank), ("B0 W0", last), ("W1", rank), ("W0", rank),
    ]  # fmt: skip


def _order(m: int, phases: Phases) -> list[Operation]:
    """Each phase's pattern so many times: each kind on each chunk counts its own micro-batches, and ends with m - 1."""
    done: Counter[str] = Counter()
    order = []
    for pattern, times in phases:
        for name in pattern.split() * times:
            if done[name] < m:
                order.append(Operation(name[0], done[name], int(name[1:] or 0)))
            done[name] += 1
    return order
