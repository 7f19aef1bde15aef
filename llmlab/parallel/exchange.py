"""The steps at which a tensor changes between whole, partial and partitioned, each with the step that undoes it for gradients.

Between ranks a tensor is *replicated* (the same on all), *partial* (to be summed) or *partitioned* (a part on each).
What forward makes of it, backward must undo for its gradient:

    function            forward                        backward
    copy_to_ranks       replicated, as it is           all-reduce: the ranks' gradients are partial
    sum_over_ranks      partial: all-reduce            replicated, as it is
    gather_parts        partitioned: all-gather        own part: the gradient is the same on all
    take_part           replicated: own part           all-gather
    gather_for_ranks    partitioned: all-gather        reduce-scatter: the ranks' gradients are partial
    sum_to_parts        partial: reduce-scatter        all-gather

Source: Shoeybi et al. 2019, section 3 (f and g); Korthikanti et al. 2022, section 4.2.2 (g and its conjugate).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from llmlab.parallel.communicator import Ranks, split


class _Exchange(Function):
    """One operation of ``_own`` below forward, another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, dim: int, forward: str, backward: str) -> Tensor:
        ctx.ranks, ctx.dim, ctx.undo = ranks, dim, backward
        return _do(forward, x, ranks, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _do(ctx.undo, gradient, ctx.ranks, ctx.dim), None, None, None, None


def _do(what: str, x: Tensor, ranks: Ranks, dim: int) -> Tensor:
    if what == "keep":
        return x.view_as(x)
    if what == "part":
        return split(x, ranks.size, dim)[ranks.rank].contiguous()
    if what == "all_reduce":
        return ranks.all_reduce(x)
    return ranks.all_gather(x, dim) if what == "all_gather" else ranks.reduce_scatter(x, dim)


def _exchange(x: Tensor, ranks: Ranks, dim: int, forward: str, backward: str) -> Tensor:
    exchanged: Tensor = _Exchange.apply(x, ranks, dim, forward, backward)
    return exchanged


def copy_to_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """x as it is; its gradient is summed over the ranks."""
    return _exchange(x, ranks, 0, "keep", "all_reduce")


def sum_over_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of the ranks' x on all of them; its gradient goes to each as it is."""
    return _exchange(x, ranks, 0, "all_reduce", "keep")


def gather_parts(x: Tensor, ranks: Ranks, dim: int = -1) -> Tensor:
    """The ranks' parts side by side, for what all compute alike; each takes its own part of the gradient."""
    return _exchange(x, ranks, dim, "all_gather", "part")


def take_part(x: Tensor, ranks: Ranks, dim: int = -1) -> Tensor:
    """This rank's part of what all hold; the parts' gradients are put side by side."""
    return _exchange(x, ranks, dim, "part", "all_gather")


def gather_for_ranks(x: Tensor, ranks: Ranks, dim: int = -2) -> Tensor:
    """The ranks' parts side by side, for what each computes in part; gradients are summed, and each gets its part."""
    return _exchange(x, ranks, dim, "all_gather", "reduce_scatter")


def sum_to_parts(x: Tensor, ranks: Ranks, dim: int = -2) -> Tensor:
    """This rank's part of the sum of the ranks' x; the parts' gradients are put side by side."""
    return _exchange(x, ranks, dim, "reduce_scatter", "all_gather")
