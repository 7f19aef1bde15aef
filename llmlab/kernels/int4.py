"""Products with a 4-bit matrix: bound by reading it for few rows, by arithmetic for many.

For few rows a program takes a band of the matrix's rows and a part of its columns: tiles come in through shared memory
some steps ahead, are unpacked in registers, and multiplied on the tensor cores with the matrix on the left, so that its rows
fill them whatever the number of rows of x. Scales are multiplied into the sums of a group, not into its elements. The
last program of a band to end adds up the parts. For many rows the matrix is unpacked once and cuBLAS does the product.
Source for reading ahead, parts and the bits: Frantar et al. 2024 (MARLIN).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmlab.kernels.early import early, wait
from llmlab.kernels.layouts import BAND, TILE, Int4Weight

FEW_ROWS = 64  # up to here the matrix is unpacked on the way
ASSEMBLY = not triton.knobs.runtime.interpret  # Triton's interpreter knows none


class Int4Tiling(NamedTuple):
    """How a product is cut: rows of the matrix in a program, parts of the columns, warps, steps of reading ahead."""

    rows: int
    parts: int
    warps: int
    stages: int
    ahead: int = 0  # tiles that a program asks for before the kernel in front has ended
    least: int = 8  # rows of x that the tensor cores are given, whatever x has


@triton.jit
def _unpack(words, i: tl.constexpr, zero, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Nibble i of both halves of words [ROWS, COLUMNS / 2], less the zero, as bfloat16 [ROWS, COLUMNS].

    zero: words of two numbers -(128 + 8 + zero point) [ROWS, 1]. All the numbers are exact. The assembly takes one
    instruction for mask and OR, (a & b) | c = 0xEA, and one for both sums; the compiler takes two, and three or four.
    """
    if ASSEMBLY:
        pair = tl.inline_asm_elementwise(
            "{ .reg .b32 code, one; lop3.b32 code, $1, 0x000F000F, 0x43004300, 0xEA; mov.b32 one, 0x3F803F80; "
            "fma.rn.bf16x2 $0, code, one, $2; }",
            "=r,r,r", [words >> (4 * i), zero], tl.int32, True, 1,
        )  # fmt: skip
        low = pair.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        pair = ((words >> (4 * i)) & 0x000F000F) | 0x43004300
        low = pair.to(tl.int16).to(tl.bfloat16, bitcast=True) + zero.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True) + zero.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(low, high), (ROWS, COLUMNS))


@triton.jit
def _scale(pair, i: tl.constexpr, GROUP: tl.constexpr):
    """Of words [ROWS] of two bfloat16 numbers the one for the columns of nibble i, as float32 [ROWS, 1]."""
    second: tl.constexpr = i % 2 == 1 if GROUP == 64 else i > 1
    return (pair & -65536 if second else pair << 16).to(tl.float32, bitcast=True)[:, None]


@triton.jit
def _zero(pair, i: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr):
    """The same twice in a word, with the sign turned [ROWS, 1]; where there are no zero points, -136."""
    if ZEROS:
        second: tl.constexpr = i % 2 == 1 if GROUP == 64 else i > 1
        half = (pair >> 16 if second else pair) & 0xFFFF
        return ((half | half << 16) ^ -0x7FFF8000)[:, None]
    else:
        return tl.full([1, 1], -0x3CF73CF8, tl.int32)  # 0xC308 twice


@triton.jit
def _few_rows(
    x, words, scales, zeros, bias, out, partial, counters, M, N, K, tiles, tiles_of_part, ROWS: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, ASSEMBLY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] W^T; a program takes ROWS rows of W and tiles_of_part tiles of their columns."""
    band, part = tl.program_id(0), tl.program_id(1)
    row = band * ROWS + tl.arange(0, ROWS)
    tile_row = (row // 64 * tiles * 64 + row % 64).to(tl.int64)  # of the band's first tile; the next lies 64 further
    first = part * tiles_of_part
    last = tl.minimum(first + tiles_of_part, tiles)
    PAIRS: tl.constexpr = 128 // GROUP  # words of two scales for a row of a tile
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        for t in tl.static_range(AHEAD):
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
                [words + (tile_row + tl.minimum(first + t, tiles - 1) * 64) * 32], tl.int32, False, 1,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, 64)
    kept = (m < M)[:, None]
    total = tl.zeros([ROWS, BLOCK_M], tl.float32)
    for t in tl.range(first, last, num_stages=STAGES):
        word = tl.load(words + (tile_row + t * 64)[:, None] * 32 + tl.arange(0, 32)[None, :])
        pairs = scales + (tile_row + t * 64) * PAIRS
        scale = tl.load(pairs)
        zero = tl.load(zeros + (tile_row + t * 64) * PAIRS) if ZEROS else scale
        for i in tl.static_range(4):
            column = t * 256 + i * 64 + k
            there = kept if WHOLE else kept & (column < K)[None, :]
            part_of_x = tl.load(x + m[:, None] * K + column[None, :], there, other=0.0)
            if GROUP == 64 and i == 2:
                scale = tl.load(pairs + 1)
                zero = tl.load(zeros + (tile_row + t * 64) * PAIRS + 1) if ZEROS else scale
            matrix = _unpack(word, i, _zero(zero, i, GROUP, ZEROS), ROWS, 64, ASSEMBLY)
            if GROUP == 64:
                total += tl.dot(matrix, tl.trans(part_of_x)) * _scale(scale, i, GROUP)
            elif i % 2 == 0:
                group = tl.dot(matrix, tl.trans(part_of_x))
            else:
                total += tl.dot(matrix, tl.trans(part_of_x), group) * _scale(scale, i, GROUP)
    result = tl.trans(total)
    inside = kept & (row < N)[None, :]
    place = m[:, None] * N + row[None, :]
    if SPLIT:
        parts = tl.num_programs(1)
        tl.store(partial + part * M * N + place, result, inside)
        tl.debug_barrier()
        if tl.atomic_add(counters + band, 1, sem="acq_rel") != parts - 1:
            return
        tl.debug_barrier()
        result = tl.zeros([BLOCK_M, ROWS], tl.float32)
        for other in range(parts):
            result += tl.load(partial + other * M * N + place, inside, other=0.0, cache_modifier=".cg")
        tl.store(counters + band, 0)
    if BIAS:
        result += tl.load(bias + row, row < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), inside)


def int4_tiling(M: int, N: int, K: int) -> Int4Tiling:
    """The tiling for x of M rows: small bands and parts until some programs wait on each multiprocessor."""
    rows = 64 if M <= 16 else 128
    tiles = triton.cdiv(K, TILE)
    parts = 1
    while parts < 8 and triton.cdiv(N, rows) * parts < 6 * 132 * 64 // rows and tiles >= 8 * parts:
        parts *= 2
    return Int4Tiling(rows, parts, 4 if M <= 16 else 8, 4 if M <= 32 else 3, ahead=2)


def int4_counters(out_features: int, device: torch.device) -> Tensor:
    """Counters of ``int4_linear`` that begin and end at 0, so that a graph or a module can hold them."""
    return torch.zeros(-(-out_features // BAND), dtype=torch.int32, device=device)


def _arguments(weight: Int4Weight) -> tuple[Tensor, Tensor, Tensor]:
    zeros = weight.scales if weight.zeros is None else weight.zeros
    return weight.words, weight.scales.view(torch.int32), zeros.view(torch.int32)


def int4_linear(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    counters: Tensor | None = None,
    tiling: Int4Tiling | None = None,
) -> Tensor:
    M, K, N = len(x), weight.in_features, weight.out_features
    if M > FEW_ROWS or x.dtype != torch.bfloat16 or not x.is_contiguous():
        return F.linear(x, dequantize_int4(weight, x.dtype), bias)
    rows, parts, warps, stages, ahead, least = tiling or int4_tiling(M, N, K)
    tiles = weight.words.shape[1]
    tiles_of_part = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, tiles_of_part)
    if rows % BAND or len(weight.words) * BAND % rows:
        rows = BAND
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    partial = torch.empty(parts, M, N, dtype=torch.float32, device=x.device) if parts > 1 else out
    if counters is None:
        counters = int4_counters(N, x.device) if parts > 1 else out
    _few_rows[(triton.cdiv(N, rows), parts)](
        x, *_arguments(weight), x if bias is None else bias, out, partial, counters, M, N, K, tiles, tiles_of_part, rows,
        weight.group_size, weight.zeros is not None, parts > 1, bias is not None, K % TILE == 0, max(least, triton.next_power_of_2(M)),
        stages, min(ahead, tiles_of_part), ASSEMBLY, num_warps=warps, **early(),
    )  # fmt: skip
    return out


@triton.jit
def _dequantize(
    words, scales, zeros, out, N, K, tiles, ROWS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows of one tile: each word's pairs are scaled and stored as words of two numbers."""
    wait(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    c = tl.arange(0, 32)
    tile_row = (row // 64 * tiles * 64 + row % 64 + tile * 64).to(tl.int64)
    word = tl.load(words + tile_row[:, None] * 32 + c[None, :])
    PAIRS: tl.constexpr = 128 // GROUP
    for i in tl.static_range(4):
        place = tile_row * PAIRS + i * PAIRS // 4
        scale = _scale(tl.load(scales + place), i, GROUP)
        zero = _zero(tl.load(zeros + place) if ZEROS else 0, i, GROUP, ZEROS)
        value = _unpack(word, i, zero, ROWS, 64, ASSEMBLY).to(tl.float32) * scale
        column = tile * 256 + i * 64 + tl.arange(0, 64)
        kept = (row < N)[:, None] & (column < K)[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * K + column[None, :], value.to(out.dtype.element_ty), kept)


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    N, K = weight.out_features, weight.in_features
    out = torch.empty(N, K, dtype=dtype, device=weight.words.device)
    bands, tiles = weight.words.shape[:2]
    _dequantize[(bands, tiles)](
        *_arguments(weight), out, N, K, tiles, BAND, weight.group_size, weight.zeros is not None, ASSEMBLY, num_warps=4, **early()
    )  # fmt: skip
    return out
