"""AWQ: scale up the few input channels that matter most, so that rounding the weights hurts them least."""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.arguments import checked, integer, one_of
from llmlab.obs import reconstruction_error
from llmlab.quantization.integer import BITS, float_tensor, quantize_groups, wide


@checked(
    weight=float_tensor(dims=2), inputs=float_tensor(dims=2), bits=one_of(BITS), group_size=integer(at_least=1),
    steps=integer(at_least=1),
)  # fmt: skip
def awq_scales(
    weight: Tensor, inputs: Tensor, bits: int = 4, group_size: int = 64, symmetric: bool = True, steps: int = 20
) -> Tensor:
    """The scale of each input channel that loses least at the outputs: s = mean|x|^α for the best α in 0, 1/20 ... 19/20.

    argmin over α of ‖X (W - Q(W diag(s)) diag(1/s))ᵀ‖², where Q rounds groups to nearest. A column that is multiplied
    by s > 1 while its group's range stays, and whose input is divided by s, has its rounding error divided by s. α = 0
    is plain rounding, so the result is never worse on these inputs.

    weight: W [rows, columns], the rows of all layers that read X; inputs: X [n, columns]. steps: values of α.
    Returns s [columns], whose smallest and largest multiply to 1. Raises ValueError for another number of channels.
    Source: Lin et al. 2024, arXiv:2306.00978, equation 4.
    """
    if inputs.shape[1] != weight.shape[1]:
        raise ValueError(f"inputs: expected {weight.shape[1]} channels, got {inputs.shape[1]}")
    x = wide(inputs)
    return search_scales(weight, x.abs().mean(0), x.T @ x / len(x), bits, group_size, symmetric, steps)


def search_scales(
    weight: Tensor,
    mean_abs: Tensor,
    hessian: Tensor,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    steps: int = 20,
) -> Tensor:
    """``awq_scales`` from statistics: mean|x| [columns], and H = Xᵀ X / n [columns, columns] for the loss.

    mean_abs: what the scales are powers of; channels with the same entry get the same scale.
    """
    w, size = wide(weight), wide(mean_abs).to(weight.device)
    hessian = hessian.to(w)
    best, least = torch.ones_like(size), float("inf")
    for step in range(steps):
        scales = size.clamp(min=1e-4).pow(step / steps)
        scales = scales / (scales.max() * scales.min()).sqrt()
        rounded = quantize_groups(w * scales, bits, group_size, symmetric).dequantize() / scales
        loss = float(reconstruction_error(w - rounded, hessian).sum())
        if loss < least:
            best, least = scales, loss
    return best
