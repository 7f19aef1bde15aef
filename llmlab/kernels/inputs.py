"""What a step computes, from the host's words and the tokens that only the GPU knows yet.

The host's buffers lie in pinned memory, which a kernel reads and writes over the bus: within a graph that costs the
host nothing, while a copy costs it a call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmlab.kernels.early import early, wait


@triton.jit
def _gather_inputs(
    token_ids, rows, positions, new_blocks, last_tokens, block_tables, tokens, slots, T, N, width, BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < T
    row = tl.load(rows + at, there, other=-1).to(tl.int64)
    kept = row >= 0
    token = tl.load(token_ids + at, there, other=0)
    known = tl.load(last_tokens + row, kept & (token < 0), other=0)
    tl.store(tokens + at, tl.where(kept, tl.maximum(tl.where(token < 0, known, token), 0), 0), there)
    position = tl.load(positions + at, there, other=0)
    place = block_tables + row * width + position // BLOCK_SIZE
    new = tl.load(new_blocks + at, at < N, other=-1)
    tl.store(place, new, kept & (new >= 0))
    block = tl.where(new >= 0, new, tl.load(place, kept & (new < 0), other=0))
    tl.store(slots + at, tl.where(kept, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), there)


def gather_inputs(
    token_ids: Tensor,
    rows: Tensor,
    positions: Tensor,
    new_blocks: Tensor,
    last_tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    tokens, slots = torch.empty_like(token_ids), torch.empty_like(token_ids)
    T = len(token_ids)
    _gather_inputs[(triton.cdiv(T, 256),)](
        token_ids, rows, positions, new_blocks, last_tokens, block_tables, tokens, slots, T, len(new_blocks),
        block_tables.shape[1], block_size, 256, num_warps=4, **early(),
    )  # fmt: skip
    return tokens, slots


@triton.jit
def _take_words(ring, words, turn, width, used, RING: tl.constexpr, BLOCK: tl.constexpr):
    """One program: it also says whose turn it is, which no other may read meanwhile."""
    now = (tl.load(turn) + 1) % RING
    for begin in range(0, used, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        # .cv: not from a cache, which would not learn what the host has written.
        tl.store(words + at, tl.load(ring + now * width + at, at < used, cache_modifier=".cv"), at < used)
    tl.debug_barrier()  # every thread has read the turn
    tl.store(turn, now)


def take_words(ring: Tensor, words: Tensor, turn: Tensor) -> None:
    _take_words[(1,)](ring, words, turn, ring.shape[1], len(words), len(ring), 4096, num_warps=8)


@triton.jit
def _give_tokens(tokens, rows, last_tokens, ring, turn, width, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    token = tl.load(tokens + at, at < N, other=0)
    tl.store(last_tokens + tl.load(rows + at, at < N, other=0), token.to(tl.int32), at < N)
    tl.store(ring + tl.load(turn) * width + at, token, at < N, cache_modifier=".wt")


def give_tokens(tokens: Tensor, rows: Tensor, last_tokens: Tensor, ring: Tensor, turn: Tensor) -> None:
    N = len(tokens)
    _give_tokens[(1,)](tokens, rows, last_tokens, ring, turn, ring.shape[1], N, triton.next_power_of_2(N), num_warps=4)
