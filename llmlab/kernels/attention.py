"""Attention over a paged cache: one query a sequence, its keys read in parts; and chunks of prompts, tile by tile.

Both gather blocks through the sequence's row of the block tables, and keep a running maximum and sum (Dao et al. 2022).
The query heads that share a key/value head are rows of one tile, so each key and value is read once for all of them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmlab.kernels.early import early, wait

LOG2E = 1.4426950408889634


@triton.jit
def _blocks(table, places, end, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr):
    """The blocks of these places of a sequence."""
    if PAGED:
        return tl.load(table + places // BLOCK_SIZE, places < end, other=0).to(tl.int64)
    return tl.load(table).to(tl.int64) + places // BLOCK_SIZE


@triton.jit
def _attend(
    q, m, total, acc, k_cache, v_cache, table, head, start, end, rows_position, scale,
    H_KV: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, PAGED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take in the keys start..end of one sequence; a row sees those up to its position. scale: in powers of two.

    MASKED: otherwise every row sees all of them, and they fill their tiles.
    """
    channels = tl.arange(0, BLOCK_D)
    inside = channels < D
    places = start + tl.arange(0, BLOCK_N)
    following = _blocks(table, places, end, BLOCK_SIZE, PAGED)
    for at in range(start, end, BLOCK_N):
        places = at + tl.arange(0, BLOCK_N)
        block = following
        # A tile ahead: a load whose address waits for another cannot be put into the pipeline at its full depth.
        following = _blocks(table, places + BLOCK_N, end, BLOCK_SIZE, PAGED)
        there = places < end if MASKED else places >= 0
        where = ((block * H_KV + head) * BLOCK_SIZE + places % BLOCK_SIZE) * D
        k = tl.load(k_cache + where[None, :] + channels[:, None], there[None, :] & inside[:, None], other=0.0)
        v = tl.load(v_cache + where[:, None] + channels[None, :], there[:, None] & inside[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if MASKED:
            scores = tl.where(there[None, :] & (places[None, :] <= rows_position[:, None]), scores, float("-inf"))
        highest = tl.maximum(m, tl.max(scores, 1))
        safe = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(m - safe)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = highest
    return m, total, acc


@triton.jit
def _decode(
    q, k_cache, v_cache, block_tables, rows, lengths, out, partial, counters, scale, width,
    H_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    LEAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    PAGED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    n, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + n)
    parts = tl.maximum(tl.minimum(SPLITS, tl.cdiv(length, LEAST)), 1)
    part = tl.cdiv(tl.cdiv(length, parts), BLOCK_N) * BLOCK_N
    if split * part >= length:
        return
    table = block_tables + tl.load(rows + n).to(tl.int64) * width
    member, channels = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    kept = (member < GROUP)[:, None] & (channels < D)[None, :]
    at = ((n * H_KV + head) * GROUP + member[:, None]) * D + channels[None, :]
    query = tl.load(q + at, kept, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.minimum(length, (split + 1) * part)
    everything = tl.zeros([BLOCK_M], tl.int32) + length
    m, total, acc = _attend(
        query, m, total, acc, k_cache, v_cache, table, head, split * part, end, everything, scale,
        H_KV, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, PRECISION, PAGED, True,
    )  # fmt: skip
    used = tl.cdiv(length, part)
    if SPLITS > 1:  # noqa: SIM102  this is known when the kernel is compiled
        if used > 1:
            # Each part leaves its sum and its maximum; whoever comes last puts them together.
            stride: tl.constexpr = BLOCK_M * (BLOCK_D + 2)
            mine = partial + ((n * H_KV + head) * SPLITS + split) * stride
            tl.store(mine + member[:, None] * BLOCK_D + channels[None, :], acc)
            tl.store(mine + BLOCK_M * BLOCK_D + member, m)
            tl.store(mine + BLOCK_M * BLOCK_D + BLOCK_M + member, total)
            tl.debug_barrier()
            done = tl.atomic_add(counters + n * H_KV + head, 1, sem="acq_rel")
            if done != used - 1:
                return
            tl.debug_barrier()
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for other in range(used):
                theirs = partial + ((n * H_KV + head) * SPLITS + other) * stride
                acc2 = tl.load(theirs + member[:, None] * BLOCK_D + channels[None, :], cache_modifier=".cg")
                m2 = tl.load(theirs + BLOCK_M * BLOCK_D + member, cache_modifier=".cg")
                l2 = tl.load(theirs + BLOCK_M * BLOCK_D + BLOCK_M + member, cache_modifier=".cg")
                highest = tl.maximum(m, m2)
                here, there = tl.exp2(m - highest), tl.exp2(m2 - highest)
                acc = acc * here[:, None] + acc2 * there[:, None]
                total = total * here + l2 * there
                m = highest
            tl.store(counters + n * H_KV + head, 0)
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), kept)


@triton.jit
def _chunk(
    q, k_cache, v_cache, block_tables, chunks, tiles, out, scale, width,
    H_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    tile, head = tl.program_id(0), tl.program_id(1)
    chunk = chunks + tl.load(tiles + 2 * tile) * 4
    begin = tl.load(tiles + 2 * tile + 1)
    count = tl.load(chunk + 1)
    if begin >= count:
        return
    first, row, position = tl.load(chunk), tl.load(chunk + 2), tl.load(chunk + 3)
    member, channels = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query = begin + member // GROUP
    kept = ((member < BLOCK_Q * GROUP) & (query < count))[:, None] & (channels < D)[None, :]
    at = (((first + query).to(tl.int64) * H_KV + head) * GROUP + member % GROUP)[:, None] * D + channels[None, :]
    tile_q = tl.load(q + at, kept, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = position + tl.minimum(begin + BLOCK_Q, count)
    table = block_tables + row.to(tl.int64) * width
    seen_by_all = (position + begin + 1) // BLOCK_N * BLOCK_N
    m, total, acc = _attend(
        tile_q, m, total, acc, k_cache, v_cache, table, head, 0, seen_by_all, position + query, scale,
        H_KV, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, PRECISION, True, False,
    )  # fmt: skip
    m, total, acc = _attend(
        tile_q, m, total, acc, k_cache, v_cache, table, head, seen_by_all, end, position + query, scale,
        H_KV, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, PRECISION, True, True,
    )  # fmt: skip
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), kept)


def decode_scratch(
    num_rows: int, num_kv_heads: int, group: int, head_size: int, splits: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    block_m, block_d = _tile(group, head_size)
    partial = torch.empty(
        num_rows * num_kv_heads * splits * block_m * (block_d + 2), dtype=torch.float32, device=device
    )
    return partial, torch.zeros(num_rows * num_kv_heads, dtype=torch.int32, device=device)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    splits: int = 1,
    scratch: tuple[Tensor, Tensor] | None = None,
    paged: bool = True,
    least: int = 64,
    beside: bool = False,
) -> None:
    N, heads, d = q.shape
    _, kv_heads, block_size, _ = k_cache.shape
    group = heads // kv_heads
    block_m, block_d = _tile(group, d)
    partial, counters = scratch or decode_scratch(N, kv_heads, group, d, splits, q.device)
    _decode[(N, kv_heads, splits)](
        q, k_cache, v_cache, block_tables, rows, lengths, out, partial, counters, scale * LOG2E, block_tables.shape[1],
        kv_heads, group, d, block_size, splits, least, block_m, 64, block_d, _precision(q), paged,
        num_warps=2 if d <= 64 else 4, num_stages=3, **early(not beside),
    )  # fmt: skip


def chunk_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    chunks: Tensor,
    tiles: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    _, heads, d = q.shape
    _, kv_heads, block_size, _ = k_cache.shape
    group = heads // kv_heads
    wide = q.dtype == torch.float32
    _chunk[(len(tiles), kv_heads)](
        q, k_cache, v_cache, block_tables, chunks, tiles, out, scale * LOG2E, block_tables.shape[1], kv_heads, group, d,
        block_size, queries_per_tile(group), TILE_ROWS, 32 if wide else 64, triton.next_power_of_2(d), _precision(q),
        num_warps=4, num_stages=2 if wide else 3, **early(),
    )  # fmt: skip


def step_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    lengths: Tensor,
    chunks: Tensor | None,
    tiles: Tensor | None,
    scale: float,
    out: Tensor,
    splits: int = 1,
    scratch: tuple[Tensor, Tensor] | None = None,
) -> None:
    n = len(rows)
    decodes = q[:n], k_cache, v_cache, block_tables, rows, lengths, scale, out[:n], splits, scratch
    if chunks is None:
        decode_attention(*decodes)
        return
    assert tiles is not None, "chunks without the tiles of their attention"
    # Chunks are bound by arithmetic and decodes by memory: on a stream beside, the one fills what the other leaves.
    main, beside = torch.cuda.current_stream(), _beside(q.device)
    beside.wait_stream(main)
    chunk_attention(q, k_cache, v_cache, block_tables, chunks, tiles, scale, out)
    if n:
        with torch.cuda.stream(beside):
            decode_attention(*decodes, least=MIXED_LEAST, beside=True)
    main.wait_stream(beside)


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


MIXED_LEAST = 2048  # keys of a part: shorter parts only cost time where chunks keep the device busy
TILE_ROWS = 64


def queries_per_tile(group: int) -> int:
    """Tokens in a tile of ``chunk_attention``: its rows are tokens times the query heads of a key/value head."""
    return max(1, TILE_ROWS // group)


def _tile(group: int, head_size: int) -> tuple[int, int]:
    """Rows and columns of a tile of queries: tensor cores take no fewer than 16 rows."""
    return max(16, triton.next_power_of_2(group)), triton.next_power_of_2(head_size)


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"
