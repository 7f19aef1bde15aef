"""Linear layers whose weights' gradient waits: the backward is in two parts, and the second can be done at any time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F


class WeightSteps:
    """What a backward has left to do, until it is asked for.

    While a backward runs, each linear layer computes the gradient of its input, G W, and leaves that of its weight,
    Gᵀ X, here. Gradients of biases, norms and embeddings cost little and are not put off.
    Source: Qi et al. 2023 (Zero Bubble Pipeline Parallelism), section 1: B and W apart.
    """

    def __init__(self) -> None:
        self._left: list[Callable[[], None]] = []

    def add(self, step: Callable[[], None]) -> None:
        """Leave something to do for later."""
        self._left.append(step)

    def take(self) -> list[Callable[[], None]]:
        """What was left since the last time, to be done by the caller."""
        left, self._left = self._left, []
        return left

    def defer(self, module: nn.Module) -> None:
        """Let every ``nn.Linear`` in a module leave its weight's gradient here."""
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                linear.forward = partial(_forward, linear, self)  # type: ignore[method-assign]


def _forward(linear: nn.Linear, steps: WeightSteps, x: Tensor) -> Tensor:
    y: Tensor = _Linear.apply(x, linear.weight, linear.bias, steps)
    return y


class _Linear(Function):
    """X Wᵀ + b, whose backward gives G W and leaves Gᵀ X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, steps: WeightSteps) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.steps, ctx.biased = weight, steps, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        if ctx.weight.requires_grad:
            ctx.steps.add(partial(_add_gradient, ctx.weight, flat, x.flatten(0, -2)))
        of_input = gradient @ ctx.weight if ctx.needs_input_grad[0] else None
        return of_input, None, flat.sum(0) if ctx.biased else None, None


@torch.no_grad()
def _add_gradient(weight: Tensor, gradient: Tensor, x: Tensor) -> None:
    product = gradient.T @ x
    weight.grad = product if weight.grad is None else weight.grad.add_(product)
