"""What a step computes, from the host's words and the tokens that only the GPU knows yet."""

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
