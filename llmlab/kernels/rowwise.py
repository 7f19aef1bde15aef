"""Products of 8-bit numbers: rows of x are quantized on the way in, the scales multiplied in on the way out.

A row of x, which is a token, has a scale of its own, and so has a row of the matrix, which is an output channel: neither
runs along the sum, so the tensor cores add 8-bit products, and both scales go to the finished sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llmlab.kernels.early import early, wait

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


class ProductTiling(NamedTuple):
    """Rows of x, rows of the matrix and columns of a tile, warps, steps of reading ahead, and rows of tiles that go together."""

    rows: int = 128
    columns: int = 256
    depth: int = 128
    warps: int = 8
    stages: int = 4
    together: int = 8


@triton.jit
def _quantize_rows(
    x, codes, scales, K, LARGEST: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """A program takes a row: scale = max |x| / LARGEST, codes = x / scale, rounded to the nearest, halves to even."""
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * K + column, column < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    code = value * tl.where(largest > 0.0, tl.div_rn(tl.full([], LARGEST, tl.float32), largest), 0.0)
    if WHOLE:
        code = (code + 12582912.0) - 12582912.0  # 1.5 · 2^23, where the last place of a float is 1
    code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
    tl.store(codes + row * K + column, code.to(codes.dtype.element_ty), column < K)
    tl.store(scales + row, tl.div_rn(largest, tl.full([], LARGEST, tl.float32)))


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    codes = torch.empty(M, K, dtype=dtype, device=x.device)
    scales = torch.empty(M, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(K)
    _quantize_rows[(M,)](
        x.contiguous(), codes, scales, K, LARGEST[dtype], dtype == torch.int8, block, num_warps=max(1, min(16, block // 1024)),
        enable_fp_fusion=False, **early(),
    )  # fmt: skip
    return codes, scales


@triton.jit
def _product(
    x, matrix, x_scales, scales, bias, out, M, N, K, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x_scales x matrix^T scales, with descriptors of x [M, K] and matrix [N, K]; a tile a program."""
    wait(EARLY)
    down, across = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    strip = tl.program_id(0) // (TOGETHER * across)  # tiles near each other share what the cache has
    height = tl.minimum(down - strip * TOGETHER, TOGETHER)
    within = tl.program_id(0) % (TOGETHER * across)
    row = (strip * TOGETHER + within % height) * ROWS
    column = within // height * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.int32 if WHOLE else tl.float32)
    for k in tl.range(0, K, DEPTH, num_stages=STAGES):
        total = tl.dot(x.load([row, k]), tl.trans(matrix.load([column, k])), total, out_dtype=total.dtype)
    m, n = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    result = total.to(tl.float32) * tl.load(x_scales + m, m < M, other=0.0)[:, None]
    result *= tl.load(scales + n, n < N, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + n, n < N, other=0.0).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, result.to(out.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


def scaled_product(
    x: Tensor,
    x_scales: Tensor,
    matrix: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tiling: ProductTiling | None = None,
) -> Tensor:
    (M, K), N = x.shape, len(matrix)
    if K % 16:
        raise ValueError(f"x: expected a multiple of 16 columns, got {K}")
    rows, columns, depth, warps, stages, together = tiling or ProductTiling()
    out = torch.empty(M, N, dtype=dtype, device=x.device)
    _product[(triton.cdiv(M, rows) * triton.cdiv(N, columns),)](
        TensorDescriptor.from_tensor(x, [rows, depth]), TensorDescriptor.from_tensor(matrix, [columns, depth]), x_scales, scales,
        scales if bias is None else bias, out, M, N, K, bias is not None, rows, columns,
        depth, together, stages, x.dtype == torch.int8, num_warps=warps, **early(),
    )  # fmt: skip
    return out


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    quantized, x_scales = quantize_rows(x, torch.int8)
    return scaled_product(quantized, x_scales, codes, scales, bias, x.dtype)


def fp8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    quantized, x_scales = quantize_rows(x, torch.float8_e4m3fn)
    if x.dtype != torch.bfloat16 or x.shape[1] % 16 or len(codes) % 16:  # what cuBLAS takes
        return scaled_product(quantized, x_scales, codes, scales, bias, x.dtype)
    product = torch._scaled_mm(
        quantized, codes.t(), x_scales[:, None], scales[None, :], out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product if bias is None else product + bias
