"""How long a step takes, as a function of what it computes: the clock of the simulator."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmlab.arguments import integer, number
from llmlab.batching.state import StepPlan


class CostModel(Protocol):
    """Seconds that a step takes."""

    def seconds(self, plan: StepPlan, kv_tokens: int) -> float:
        """plan: whose tokens are computed. kv_tokens: tokens whose keys and values the step reads, its own included."""
        ...


@dataclass(frozen=True)
class LinearCost:
    """seconds = fixed + per_token · T + per_sequence · B + per_kv_token · K.

    T: tokens computed, padding included; B: sequences in the step; K: tokens whose keys and values it reads. Padding is
    charged no attention. All in seconds, none below 0; raises ValueError otherwise.
    """

    fixed: float
    per_token: float = 0.0
    per_kv_token: float = 0.0
    per_sequence: float = 0.0

    def __post_init__(self) -> None:
        for name in ("fixed", "per_token", "per_kv_token", "per_sequence"):
            number(at_least=0)(name, getattr(self, name))

    def seconds(self, plan: StepPlan, kv_tokens: int) -> float:
        """fixed + per_token · T + per_sequence · B + per_kv_token · K."""
        tokens = plan.num_tokens + plan.padding
        sequences = len(plan.decodes) + len(plan.chunks)
        return self.fixed + self.per_token * tokens + self.per_sequence * sequences + self.per_kv_token * kv_tokens


@dataclass(frozen=True)
class RooflineCost:
    """seconds = fixed + max(floor, T / rate) + per_kv_token · K: nearly free tokens up to rate · floor, then linear.

    floor: seconds in which the weights are read, whatever T is. rate: tokens a second once arithmetic is the limit, so
    that tokens a second, T / seconds, are concave in T and level off at the rate. fixed: launches and the host. T, K as in
    ``LinearCost``. Raises ValueError for a negative time or a rate that is not above 0.
    Source: Williams et al. 2009, the roofline; Holmes et al. 2024 (DeepSpeed-FastGen), section 3 for its shape in T.
    """

    floor: float
    rate: float
    per_kv_token: float = 0.0
    fixed: float = 0.0

    def __post_init__(self) -> None:
        number(above=0)("rate", self.rate)
        for name in ("floor", "per_kv_token", "fixed"):
            number(at_least=0)(name, getattr(self, name))

    def seconds(self, plan: StepPlan, kv_tokens: int) -> float:
        """fixed + max(floor, T / rate) + per_kv_token · K."""
        tokens = plan.num_tokens + plan.padding
        return self.fixed + max(self.floor, tokens / self.rate) + self.per_kv_token * kv_tokens


@dataclass(frozen=True)
class FittedCost:
    """Seconds on straight lines through measured points, and per_kv_token · K beside them.

    points: (T tokens in a step, seconds), with T rising and seconds not falling. Below the first point a step takes what
    the first one does, the floor; beyond the last the last line goes on. K as in ``LinearCost``; measure the points
    with little in the KV cache, or leave per_kv_token at 0. Raises ValueError for points that do not rise.
    """

    points: Sequence[tuple[int, float]]
    per_kv_token: float = 0.0

    def __post_init__(self) -> None:
        number(at_least=0)("per_kv_token", self.per_kv_token)
        object.__setattr__(self, "points", tuple(self.points))
        if not self.points:
            raise ValueError("points: expected at least one (tokens, seconds), got none")
        for tokens, seconds in self.points:
            integer(at_least=1)("tokens of a point", tokens)
            number(above=0)("seconds of a point", seconds)
        for (before, faster), (tokens, seconds) in zip(self.points, self.points[1:], strict=False):
            if tokens <= before or seconds < faster:
                raise ValueError(
                    f"points: expected more tokens and no less time than {(before, faster)}, got {(tokens, seconds)}"
                )

    def seconds(self, plan: StepPlan, kv_tokens: int) -> float:
        """The line through the two points beside T, at T, and per_kv_token · K."""
        tokens = plan.num_tokens + plan.padding
        right = min(bisect_left(self.points, (tokens, 0.0)), len(self.points) - 1)
        x1, at_tokens = self.points[right]
        if right:
            x0, y0 = self.points[right - 1]
            at_tokens = y0 + (at_tokens - y0) * (tokens - x0) / (x1 - x0)
        return at_tokens + self.per_kv_token * kv_tokens
