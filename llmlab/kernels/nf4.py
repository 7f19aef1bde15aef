"""Products with an NF4 matrix: one row of x reads the codes as they lie, more rows unpack the matrix for cuBLAS.

A table in memory costs each lookup an address and a place in the queue of loads. Here a warp's 32 lanes hold the sixteen
values twice, in a register each, and a lookup is one shuffle: no memory, so no bank to wait for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmlab.kernels.early import early, wait
from llmlab.kernels.layouts import Nf4Weight

ASSEMBLY = not triton.knobs.runtime.interpret  # Triton's interpreter knows none


class Nf4Tiling(NamedTuple):
    """How a product is cut: rows of the matrix in a program, words of eight codes at a time, warps, and the lookup."""

    rows: int
    words: int
    warps: int
    shuffle: bool = ASSEMBLY  # else the table is read where it lies


@triton.jit
def _absmax(absmax, table, scale, offset, block, there, NESTED: tl.constexpr):
    """The largest size in a block of 64, as it is stored or from a code of its own."""
    if NESTED:
        code = tl.load(absmax + block, there, other=0).to(tl.int32)
        size = tl.load(scale + block // 256, there, other=0.0)
        return tl.load(table + code) * size + tl.load(offset)
    else:
        return tl.load(absmax + block, there, other=0.0)


@triton.jit
def _held(table, SHUFFLE: tl.constexpr):
    """What a thread holds of the table: lane l the value of code l % 16, by which a warp has all of them twice."""
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            "{ .reg .u32 l; .reg .u64 a; mov.u32 l, %laneid; and.b32 l, l, 15; mul.wide.u32 a, l, 4; add.u64 a, a, $1; "
            "ld.global.nc.f32 $0, [a]; }",
            "=f,l", [table], tl.float32, False, 1,
        )  # fmt: skip
    else:
        return 0.0


@triton.jit
def _value(word, j: tl.constexpr, table, held, SHUFFLE: tl.constexpr):
    """The value of code j of each word, of which a byte's high nibble comes first.

    The shuffle takes the value of the lane that the last four bits name, in either half of the warp.
    """
    code = word >> (4 * (j ^ 1))
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $2, $1, 0x101f, 0xffffffff;", "=f,r,f", [code, held], tl.float32, False, 1
        )
    else:
        return tl.load(table + (code & 15))


@triton.jit
def _one_row(
    x, codes, absmax, table, absmax_table, absmax_scale, absmax_offset, bias, out, N, K: tl.constexpr, NESTED: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, SHUFFLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [N] = x [K] W^T; a program takes ROWS rows of W, WORDS words of each at a time. x comes as pairs, int32 [K/2]."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = tl.arange(0, WORDS)
    held = _held(table, SHUFFLE)
    total = tl.zeros([ROWS, WORDS // 8], tl.float32)
    for begin in tl.static_range(0, K // 8, WORDS):
        at = begin + within
        there = (row < N)[:, None] & (at < K // 8)[None, :]
        word = tl.load(
            codes + row.to(tl.int64)[:, None] * (K // 8) + at[None, :], there, other=0, eviction_policy="evict_first"
        )
        block = begin // 8 + tl.arange(0, WORDS // 8)
        full = (row < N)[:, None] & (block < K // 64)[None, :]
        size = _absmax(
            absmax, absmax_table, absmax_scale, absmax_offset, row[:, None] * (K // 64) + block[None, :], full, NESTED
        )
        if EARLY and begin == 0:
            tl.extra.cuda.gdc_wait()  # the first of the matrix is on its way
        pairs = tl.load(x + at[:, None] * 4 + tl.arange(0, 4)[None, :], (at < K // 8)[:, None], other=0)
        even, odd = tl.split(tl.reshape(pairs, (WORDS, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        sums = tl.zeros([ROWS, WORDS], tl.float32)
        for j in tl.static_range(8):
            pair = first if j < 2 else second if j < 4 else third if j < 6 else fourth
            wide = (pair << 16 if j % 2 == 0 else pair & -65536).to(tl.float32, bitcast=True)
            sums += _value(word, j, table, held, SHUFFLE) * wide[None, :]
        total += tl.sum(tl.reshape(sums, (ROWS, WORDS // 8, 8)), 2) * size
    result = tl.sum(total, 1)
    if BIAS:
        result += tl.load(bias + row, row < N, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), row < N)


@triton.jit
def _dequantize(
    codes, absmax, table, absmax_table, absmax_scale, absmax_offset, out, total, NESTED: tl.constexpr, WORDS: tl.constexpr,
    SHUFFLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes WORDS words of the matrix as it lies in memory, of ``total``, and stores each as eight numbers."""
    wait(EARLY)
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    there = at < total
    word = tl.load(codes + at, there, other=0)
    size = _absmax(absmax, absmax_table, absmax_scale, absmax_offset, at // 8, there, NESTED)
    held = _held(table, SHUFFLE)
    v0, v1 = _value(word, 0, table, held, SHUFFLE), _value(word, 1, table, held, SHUFFLE)
    v2, v3 = _value(word, 2, table, held, SHUFFLE), _value(word, 3, table, held, SHUFFLE)
    v4, v5 = _value(word, 4, table, held, SHUFFLE), _value(word, 5, table, held, SHUFFLE)
    v6, v7 = _value(word, 6, table, held, SHUFFLE), _value(word, 7, table, held, SHUFFLE)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))  # [WORDS, codes 4 apart, codes 2 apart]
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    scaled = (tl.reshape(tl.join(even, odd), (WORDS, 8)) * size[:, None]).to(out.dtype.element_ty)
    place = at.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + place, scaled, there[:, None])


def nf4_tiling(N: int, K: int) -> Nf4Tiling:
    """The tiling for one row of x."""
    return Nf4Tiling(4, min(512, triton.next_power_of_2(K // 8)), 4)


def _arguments(weight: Nf4Weight) -> tuple[Tensor, ...]:
    absmax = (weight.absmax, weight.table, weight.absmax_table, weight.absmax_scale, weight.absmax_offset)
    return (weight.codes.view(torch.int32), *(weight.table if tensor is None else tensor for tensor in absmax))


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None, tiling: Nf4Tiling | None = None) -> Tensor:
    K, N = weight.in_features, weight.out_features
    if len(x) != 1 or x.dtype != torch.bfloat16 or not x.is_contiguous():
        return F.linear(x, dequantize_nf4(weight, x.dtype), bias)
    rows, words, warps, shuffle = tiling or nf4_tiling(N, K)
    out = torch.empty(1, N, dtype=x.dtype, device=x.device)
    _one_row[(triton.cdiv(N, rows),)](
        x.view(torch.int32), *_arguments(weight), x if bias is None else bias, out, N, K, weight.absmax_table is not None, bias is not None, rows,
        words, shuffle, num_warps=warps, **early(),
    )  # fmt: skip
    return out


def dequantize_nf4(weight: Nf4Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    N, K = weight.out_features, weight.in_features
    out = torch.empty(N, K, dtype=dtype, device=weight.codes.device)
    total = N * K // 8
    _dequantize[(triton.cdiv(total, 512),)](
        *_arguments(weight), out, total, weight.absmax_table is not None, 512, ASSEMBLY, num_warps=4, **early()
    )
    return out
