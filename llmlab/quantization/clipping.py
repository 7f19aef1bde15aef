"""Clipping: a group's largest weights may go to the grid's edge, where that makes the steps between all others finer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmlab.arguments import checked, integer, one_of
from llmlab.quantization.integer import BITS, Grid, float_tensor, grid, round_to, values_on, wide

SHARES = tuple(1 - step / 20 for step in range(11))  # of the range that is kept: 1, 0.95 ... 0.5


@checked(weight=float_tensor(dims=2), hessian=float_tensor(dims=2), bits=one_of(BITS), group_size=integer(at_least=1))
def clipped_grid(
    weight: Tensor, hessian: Tensor, bits: int = 4, group_size: int = 64, symmetric: bool = True,
    shares: tuple[float, ...] = SHARES,
) -> Grid:  # fmt: skip
    """For each group of each row, the grid of the clipped weight that loses least at the outputs.

    argmin over c of (w - Q_c(w)) H_gg (w - Q_c(w))ᵀ, with Q_c rounding to the grid of clip(w, c min w, c max w), and H_gg
    the group's own part of H: errors of different groups are taken as independent. c = 1 is among the shares, so a
    group's own loss is never above that of rounding to nearest. Grids have no float minimum.

    weight: [rows, columns]; hessian: Xᵀ X / n [columns, columns]. Raises ValueError for a Hessian of another shape, and for shares without 1.
    Source: the clipping of Lin et al. 2024 (AWQ, arXiv:2306.00978), with H in place of sampled outputs.
    """
    rows, columns = weight.shape
    if 1 not in shares:
        raise ValueError(f"shares: expected 1 (no clipping) among them, got {shares}")
    if hessian.shape != (columns, columns):
        raise ValueError(
            f"hessian: expected {[columns, columns]} for a weight {list(weight.shape)}, got {list(hessian.shape)}"
        )
    group_size = min(group_size, columns)
    missing = -columns % group_size

    def grouped(x: Tensor) -> Tensor:
        return F.pad(x, (0, missing)).view(rows, -1, group_size)

    values = wide(weight)
    groups = grouped(values)
    low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
    count = groups.shape[1]
    H = F.pad(hessian.to(values), (0, missing, 0, missing)).view(count, group_size, count, group_size)
    blocks = torch.stack([H[g, :, g] for g in range(count)])
    best: Grid | None = None
    least = torch.full((rows, count), float("inf"), dtype=values.dtype, device=values.device)
    for share in shares:
        clipped = torch.minimum(torch.maximum(groups, share * low), share * high).flatten(1)[:, :columns]
        found = grid(clipped, bits, group_size, symmetric)
        difference = grouped(values - values_on(round_to(values, found), found, dtype=values.dtype)).transpose(0, 1)
        loss = ((difference @ blocks) * difference).sum(-1).T
        better = loss < least
        least = torch.where(better, loss, least)
        if best is None:
            best = found
        zero = None if best.zero is None or found.zero is None else torch.where(better, found.zero, best.zero)
        best = Grid(torch.where(better, found.scale, best.scale), zero, found.scheme, columns)
    assert best is not None
    return best
