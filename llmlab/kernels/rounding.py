"""GPTQ's sweep of a block of columns: rows do not meet, so a program takes a few of them through all columns at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8  # of a program, a warp each: sums over a row need no shared memory


@triton.jit
def _round_columns(
    block, factor, scale, zero, values, errors, rows, width, block_stride, factor_stride, lowest, highest,
    ZERO: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    kept = (row < rows)[:, None] & (column < width)[None, :]
    free = tl.load(block + row[:, None] * block_stride + column[None, :], kept, other=0.0)
    lost = tl.zeros((ROWS, WIDTH), tl.float32)
    for j in range(width):
        mine = (column == j)[None, :]
        w = tl.sum(tl.where(mine, free, 0.0), 1)
        s = tl.load(scale + row * width + j, row < rows, other=0.0)
        z = tl.load(zero + row * width + j, row < rows, other=0.0) if ZERO else tl.zeros((ROWS,), tl.float32)
        step = tl.div_rn(w, tl.where(s == 0.0, 1.0, s))
        step = tl.minimum(tl.maximum(step, -1024.0), 1024.0)  # beyond every code, and small enough for the next line
        nearest = (step + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum is rounded to a whole number, ties to even
        q = tl.minimum(tl.maximum(nearest + z, lowest), highest)
        v = s * (q - z)
        e = tl.div_rn(w - v, tl.load(factor + j * factor_stride + j))
        u = tl.load(factor + j * factor_stride + column, (column > j) & (column < width), other=0.0)
        lost = tl.where(mine, e[:, None], lost)
        free = tl.where(mine, v[:, None], free - e[:, None] * u[None, :])
    at = row[:, None] * width + column[None, :]
    tl.store(values + at, free, kept)
    tl.store(errors + at, lost, kept)


def round_columns(
    block: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, lowest: int, highest: int
) -> tuple[Tensor, Tensor]:
    rows, width = block.shape
    assert block.dtype == factor.dtype == torch.float32
    assert block.stride(1) == factor.stride(1) == 1
    scale = scale.float().contiguous()
    shift = scale if zero is None else zero.float().contiguous()
    values, errors = (torch.empty(rows, width, dtype=torch.float32, device=block.device) for _ in range(2))
    _round_columns[(triton.cdiv(rows, ROWS),)](
        block, factor, scale, shift, values, errors, rows, width, block.stride(0), factor.stride(0),
        float(lowest), float(highest), zero is not None, ROWS, triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return values, errors
