"""GPTQ: round a weight column by column, and let the columns that are still free make up for each error."""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.arguments import checked, integer, number, one_of
from llmlab.kernels import kernels_for
from llmlab.obs import ColumnStep, by_columns, inverse_factor, obs_sweep
from llmlab.quantization.integer import BITS, Grid, codes_of, float_tensor, grid, wide
from llmlab.quantization.tensor import QuantizedTensor, Scheme, values_of


@checked(
    weight=float_tensor(dims=2), hessian=float_tensor(dims=2), bits=one_of(BITS), group_size=integer(at_least=1),
    damp=number(at_least=0), block_size=integer(at_least=1),
)  # fmt: skip
def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    act_order: bool = True,
    static_groups: bool = True,
    damp: float = 0.1,
    *,
    found: Grid | None = None,
    block_size: int = 128,
) -> QuantizedTensor:
    """Codes of a weight that keep its outputs: column j becomes q = round(w_j), then w_later -= (w_j - q) / U_jj U_j,later.

    weight: W [rows, columns]. hessian: H = Xᵀ X / n of its inputs [columns, columns]; U as in ``llmlab.obs``.
    act_order: the columns with the largest inputs first, while many others can still make up for them.
    static_groups: the grids are those of the weight as it came; else a group's grid is found when the sweep reaches it.
    damp: a share of H's mean diagonal, added to it. found: the grid to round to, in place of the weight's own.
    block_size: columns between two updates of the whole matrix.

    A weight of 0 stays 0, so a pruned layer stays pruned (not with a float minimum, nor without static groups).
    Codes and scales lie in the weight's own order: a column is rounded on the grid of its group, whenever its turn comes.
    Without act_order, static groups and this damp the result can be worse than rounding to nearest.
    Raises ValueError for a Hessian of another shape, one that is not positive definite, and act_order without
    static_groups (its groups would hold columns from all over the weight). Source: Frantar et al. 2022, arXiv:2210.17323.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(
            f"hessian: expected {[columns, columns]} for a weight {list(weight.shape)}, got {list(hessian.shape)}"
        )
    if not static_groups and (act_order or found is not None):
        raise ValueError("static_groups: expected True with act_order or with a grid that was found before, got False")
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    order = order.to(weight.device)
    factor = inverse_factor(hessian.to(weight.device)[order][:, order], damp)
    if static_groups:
        found = found or grid(weight, bits, group_size, symmetric)
        swept = _sweep(wide(weight)[:, order], factor, found, order, block_size)
    else:
        swept, found = _sweep_finding_grids(wide(weight), factor, bits, group_size, symmetric, block_size)
    in_place = torch.empty_like(swept)
    in_place[:, order] = swept
    scale, zero = found.at()
    return found.tensor(codes_of(in_place, scale, zero, found.scheme), weight.dtype)


def _sweep(weight: Tensor, factor: Tensor, found: Grid, order: Tensor, block_size: int) -> Tensor:
    """The values of the columns of a weight, which stand in the order of the sweep, on grids that are found already."""
    scale, zero = found.at(order)
    if zero is not None and zero.is_floating_point():  # the kernel knows whole zero points only
        return obs_sweep(weight, factor, by_columns(_rounding(scale, zero, found.scheme)), block_size)
    kernels, scheme = kernels_for(weight.device.type), found.scheme
    scale = scale.masked_fill(weight == 0, 0)  # whose only value is 0

    def settle(block: Tensor, part: Tensor, first: int) -> tuple[Tensor, Tensor]:
        here = slice(first, first + block.shape[1])
        z = None if zero is None else zero[:, here]
        settled: tuple[Tensor, Tensor] = kernels.round_columns(
            block, part, scale[:, here], z, scheme.lowest, scheme.highest
        )
        return settled

    return obs_sweep(weight, factor, settle, block_size)


def _rounding(scale: Tensor, zero: Tensor | None, scheme: Scheme) -> ColumnStep:
    """A step that rounds column j on the grid scale[:, j], zero[:, j]; both [rows, columns] in the order of the sweep."""
    scale, zero = scale.T.contiguous(), None if zero is None else zero.T.contiguous()  # a column's grid is read whole

    def step(free: Tensor, _: Tensor, column: int) -> Tensor:
        z = None if zero is None else zero[column]
        return values_of(codes_of(free[:, 0], scale[column], z, scheme), scale[column], z, free.dtype)

    return step


def _sweep_finding_grids(
    weight: Tensor, factor: Tensor, bits: int, group_size: int, symmetric: bool, block_size: int
) -> tuple[Tensor, Grid]:
    """The same in the weight's own order, each group's grid found from what the group has become by then."""
    grids: list[Grid] = []

    def step(free: Tensor, _: Tensor, column: int) -> Tensor:
        if column % group_size == 0:
            grids.append(grid(free[:, :group_size], bits, group_size, symmetric))
        now = grids[-1]
        scale, z = now.scale[:, 0], None if now.zero is None else now.zero[:, 0]
        return values_of(codes_of(free[:, 0], scale, z, now.scheme), scale, z, free.dtype)

    whole_groups = max(1, block_size // group_size) * group_size  # a group's columns must all be up to date
    swept = obs_sweep(weight, factor, by_columns(step), whole_groups)
    zeros = [g.zero for g in grids if g.zero is not None]
    zero = torch.cat(zeros, 1) if zeros else None
    return swept, Grid(torch.cat([g.scale for g in grids], 1), zero, grids[0].scheme, weight.shape[1])
