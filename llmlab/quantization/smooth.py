"""SmoothQuant: move the outliers of activations into the weights, where rounding can bear them."""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.arguments import checked, number
from llmlab.quantization.integer import float_tensor, wide


@checked(activation_absmax=float_tensor(dims=1), weight=float_tensor(dims=2), alpha=number(at_least=0, at_most=1))
def smooth_scales(activation_absmax: Tensor, weight: Tensor, alpha: float = 0.5) -> Tensor:
    """How far each input channel is divided, and each column of the weight multiplied: s_j = max|x_j|^α / max|w_j|^(1-α).

    (X / s) (W s)ᵀ = X Wᵀ: nothing changes before rounding. At α = 1/2 activations and weights end up with the same
    maximum in each channel, at 0 the weights are made even, at 1 the activations.

    activation_absmax: max|x_j| over the calibration text [columns]; weight: [rows, columns], the rows of all layers
    that read X. Returns s [columns] in fp32 or fp64. A channel whose inputs or weights are all 0 keeps s = 1.
    Raises ValueError for a negative maximum, another number of channels, or an alpha outside 0 to 1.
    Source: Xiao et al. 2023, arXiv:2211.10438, equation 4.
    """
    if activation_absmax.shape[0] != weight.shape[1]:
        raise ValueError(f"activation_absmax: expected {weight.shape[1]} channels, got {activation_absmax.shape[0]}")
    if bool((activation_absmax < 0).any()):
        raise ValueError(f"activation_absmax: expected no negative value, got {float(activation_absmax.min())}")
    largest = wide(weight).abs().amax(0)
    inputs = wide(activation_absmax).to(largest)
    scales = inputs.pow(alpha) / largest.pow(1 - alpha)
    return torch.where((inputs > 0) & (largest > 0), scales, torch.ones_like(scales))
