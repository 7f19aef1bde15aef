"""A stage that only takes time, so that a schedule can be measured where ranks share cores."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from llmlab.parallel.weight_steps import WeightSteps


class Sleeper(nn.Module):
    """x -> x, after so many seconds; the halves of its backward take theirs.

    seconds: of a forward, of the backward for the input, and of that for the weights. steps: where the latter is left,
    for a schedule that splits the backward; without it the halves follow each other.
    """

    def __init__(self, seconds: tuple[float, float, float]) -> None:
        super().__init__()
        self.seconds = seconds
        self.steps: WeightSteps | None = None
        self.weight = nn.Parameter(torch.ones(1))  # so that there is a gradient

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Sleep.apply(x * self.weight, self.seconds, self.steps)
        return y


class _Sleep(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: tuple[float, float, float], steps: WeightSteps | None) -> Tensor:
        ctx.seconds, ctx.steps = seconds, steps
        time.sleep(seconds[0])
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _, for_input, for_weights = ctx.seconds
        time.sleep(for_input)
        if ctx.steps is None:
            time.sleep(for_weights)
        else:
            ctx.steps.add(lambda: time.sleep(for_weights))
        return gradient, None, None
