"""Which layers make a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmlab.arguments import checked, integer, number


def _costs(name: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence of numbers, got {type(value).__name__} {value!r}")
    for layer, cost in enumerate(value):
        number(at_least=0)(f"{name}[{layer}]", cost)


@checked(costs=_costs, p=integer(at_least=1))
def partition_layers(costs: Sequence[float], p: int) -> list[int]:
    """How many consecutive layers each of p stages gets, so that the dearest stage is as cheap as it can be.

    costs: of each layer, in any unit. Minimises the largest sum over a stage's layers, by dynamic programming: for the
    layers from i on in k stages, best(i, k) is the least, over the layer j at which the second stage starts, of
    max(costs[i] + … + costs[j - 1], best(j, k - 1)). Each stage gets one layer at least. Of equal ways the one with the
    shortest first stage is taken, for that stage holds the most activations; so again for those after it.

    Raises TypeError or ValueError for a cost that is not a number from 0 on, or more stages than layers.
    """
    layers = len(costs)
    if p > layers:
        raise ValueError(f"p: expected at most one stage for each of the {layers} layers, got {p}")
    best = {(i, 1): (sum(costs[i:]), [layers - i]) for i in range(layers)}
    for stages in range(2, p + 1):
        last = layers - stages + 1  # where the second stage must start, for the others to get a layer each
        for i in range(last):
            ways, cost = [], 0.0
            for j in range(i + 1, last + 1):
                cost += costs[j - 1]
                dearest, sizes = best[j, stages - 1]
                ways.append((max(cost, dearest), [j - i, *sizes]))
            best[i, stages] = min(ways)
    return best[0, p][1]
