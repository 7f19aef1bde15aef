"""Matrix products of a block, with what stands before and behind them.

For few rows a product is bound by reading its matrix, and each kernel around it costs a launch: one kernel does it all.
The norm's scale is one number for a row, so it is multiplied in at the end: rmsnorm(x) W = (x * norm) W / rms(x). For
many rows cuBLAS does the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmlab.kernels.activation import silu_and_mul
from llmlab.kernels.early import early
from llmlab.kernels.norm import rms_norm

FEW_ROWS = 1  # up to here our kernel is the faster one; from two rows on cuBLAS is as fast (benchmarks/engine.py)


@triton.jit
def _few_rows(
    x, norm, weight, bias, out, eps, N, K: tl.constexpr, M: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    ADD: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out [M, N] (+)= x [M, K] weight [N, K]^T; a program takes BLOCK_N rows of the weight. GATED: [2 N, K], see `norm_swiglu`."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, M)
    at = rows.to(tl.int64)[:, None] * K
    inside = rows < N
    total = tl.zeros([M, BLOCK_N, BLOCK_K], tl.float32)
    total_up = tl.zeros([M, BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([M, BLOCK_K], tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    for k in tl.static_range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        there = columns < K
        kept = inside[:, None] & there[None, :]
        w = tl.load(weight + at + columns[None, :], kept, other=0.0, eviction_policy="evict_first")
        if GATED:
            up = tl.load(weight + N * K + at + columns[None, :], kept, other=0.0, eviction_policy="evict_first")
        if EARLY and k == 0:
            tl.extra.cuda.gdc_wait()  # the first of the matrix is on its way
        value = tl.load(x + m[:, None] * K + columns[None, :], there[None, :], other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= tl.load(norm + columns, there, other=0.0).to(tl.float32)[None, :]
        total += value[:, None, :] * w.to(tl.float32)[None, :, :]
        if GATED:
            total_up += value[:, None, :] * up.to(tl.float32)[None, :, :]
    result = tl.sum(total, 2)
    result_up = tl.sum(total_up, 2)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
        result *= scale
        result_up *= scale
    if BIAS:
        result += tl.load(bias + rows, inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            result_up += tl.load(bias + N + rows, inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        result = result * tl.sigmoid(result) * result_up
    target = out + m[:, None] * N + rows[None, :]
    if ADD:
        result += tl.load(target, inside[None, :], other=0.0).to(tl.float32)
    tl.store(target, result.to(out.dtype.element_ty), inside[None, :])


def _launch(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    gated: bool,
    add: bool,
) -> None:
    M, K = x.shape
    N = out.shape[1]
    block_n, block_k, warps = tiling(K)
    _few_rows[(triton.cdiv(N, block_n),)](
        x, x if norm is None else norm, weight, x if bias is None else bias, out, eps, N, K, M, norm is not None, gated, add,
        bias is not None, block_n, block_k, num_warps=warps, **early(),
    )  # fmt: skip


def tiling(K: int) -> tuple[int, int, int]:
    """Rows of the weight in a program, columns at a time, and warps: what was fastest on an H100 for K from 2048 to 14336."""
    return 4, min(4096, triton.next_power_of_2(K)), 4


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _few(x):
        return F.linear(rms_norm(x, norm, eps), weight, bias)
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    _launch(x, norm, eps, weight, bias, out, gated=False, add=False)
    return out


def add_linear(stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    if _few(x):
        _launch(x, None, 0.0, weight, bias, stream, gated=False, add=True)
    elif bias is None:
        torch.addmm(stream, x, weight.t(), out=stream)
    else:
        stream += F.linear(x, weight, bias)


def norm_swiglu(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _few(x):
        return silu_and_mul(F.linear(rms_norm(x, norm, eps), weight, bias))
    out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
    _launch(x, norm, eps, weight, bias, out, gated=True, add=False)
    return out


def _few(x: Tensor) -> bool:
    return len(x) <= FEW_ROWS and x.is_contiguous()
