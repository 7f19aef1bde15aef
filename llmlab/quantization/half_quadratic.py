"""Half-quadratic quantization: a better minimum for each group from the weights alone, without a word of text."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmlab.arguments import checked, integer, number, one_of
from llmlab.quantization.integer import BITS, Grid, codes_of, float_tensor, grid, values_on, wide
from llmlab.quantization.tensor import QuantizedTensor


@checked(
    weight=float_tensor(dims=2), bits=one_of(BITS), group_size=integer(at_least=1), steps=integer(at_least=1),
    power=number(above=0, at_most=1), beta=number(above=0), growth=number(at_least=1),
)  # fmt: skip
def quantize_half_quadratic(
    weight: Tensor, bits: int = 4, group_size: int = 64, *, steps: int = 20, power: float = 0.7, beta: float = 10.0,
    growth: float = 1.01,
) -> QuantizedTensor:  # fmt: skip
    """Codes with a float minimum that makes Σ |w - (s q + m)|^p small, p < 1: most weights near, a few left far.

    With errors in steps of the grid, s = 1, two easy problems take turns: the outliers e = shrink(w - q - m), with
    shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / β), and the minimum m = mean(w - e - q); β grows. The scale stays that
    of the range. Each group keeps the best minimum that it met, and the range's own is the first.

    weight: [rows, columns]. power: p. beta, growth: β and what it is multiplied by at each step.
    Raises TypeError and ValueError for what is no finite matrix, and for other bits.
    Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
    """
    rows, columns = weight.shape
    values = wide(weight)
    found = grid(values, bits, group_size, symmetric=False, float_minimum=True)
    scheme, scale, minimum = found.scheme, found.scale, found.zero
    assert scheme.group_size is not None
    assert minimum is not None
    size, missing = scheme.group_size, -columns % scheme.group_size

    def grouped(x: Tensor) -> Tensor:
        return F.pad(x, (0, missing)).view(rows, -1, size)

    real = grouped(torch.ones_like(values))

    step = wide(torch.where(scale == 0, torch.ones_like(scale), scale))
    best, least = minimum, torch.full_like(step, float("inf"))
    for _ in range(steps):
        tried = Grid(scale, minimum, scheme, columns)
        s, m = tried.at()
        codes = codes_of(values, s, m, scheme)
        error = grouped(values - values_on(codes, tried, dtype=values.dtype)) / step[..., None]
        loss = error.abs().pow(power).mul(real).sum(-1)
        better = loss < least
        best, least = torch.where(better, minimum, best), torch.where(better, loss, least)
        far = error.abs()
        outliers = error.sign() * (far - far.clamp(min=1e-8).pow(power - 1) / beta).clamp(min=0)
        shift = ((error - outliers) * real).sum(-1) / real.sum(-1)
        minimum = (wide(minimum) + shift * step).to(minimum.dtype)
        beta *= growth
    kept = Grid(scale, best, scheme, columns)
    s, m = kept.at()
    return kept.tensor(codes_of(values, s, m, scheme), weight.dtype)
