"""How many activations a rank must keep."""

from __future__ import annotations

from typing import NamedTuple

from llmlab.arguments import checked, instance_of
from llmlab.parallel.schedules.schedule import Schedule


class Held(NamedTuple):
    """The most activations that a rank holds at a time, each of one micro-batch on one chunk: 1/v of its layers.

    until_backward: from the start of F to the end of B. until_weight: to the end of W, where B and W are apart: what B
    has used and W still needs counts too. It needs less memory than before its B, so that the two are bounds.
    """

    until_backward: int
    until_weight: int


@checked(schedule=instance_of(Schedule))
def activations_in_flight(schedule: Schedule) -> tuple[Held, ...]:
    """The peak of each rank, from its order alone: the times at which it runs change nothing.

    The largest number, over a rank's operations, of forwards begun less backwards (less weight steps) ended before. In
    inference an activation is held while it is computed. Divided by v, it counts activations of all layers of a rank:
    ZB-V's 2p are p such. Raises TypeError for what is no schedule.

    Source: Qi et al. 2023 (Zero Bubble Pipeline Parallelism), section 2. What is kept until B it calls M_B, and what W
    still needs of that M_W: on rank r, ZB-H1 holds (p - r)·M_B + r·M_W, and ZB-H2 (2(p - r) - 1)·M_B + 2r·M_W.
    """
    return tuple(
        Held(*(_peak([o.kind for o in order], last) for last in (schedule.kinds[:2][-1], schedule.kinds[-1])))
        for order in schedule.orders
    )


def _peak(kinds: list[str], last: str) -> int:
    held = peak = 0
    for kind in kinds:
        held += kind == "F"
        peak = max(peak, held)
        held -= kind == last
    return peak
