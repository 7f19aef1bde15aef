"""Between the projection and the attention, in one pass: norm of each head, rotation, and the store into the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmlab.kernels.early import early, wait


@triton.jit
def _rotate_and_store(
    qkv, positions, cos_sin, slots, k_cache, v_cache, q_norm, k_norm, out, eps,
    H: tl.constexpr, H_KV: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes HEADS heads of one token: heads 0..H-1 are queries, the next H_KV keys, the last H_KV values."""
    wait(EARLY)
    token = tl.program_id(0).to(tl.int64)
    d: tl.constexpr = 2 * HALF
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    there = pair < HALF
    source = qkv + (token * (H + 2 * H_KV) + head) * d + pair
    first = tl.load(source, there & (head < H + 2 * H_KV), other=0.0)
    second = tl.load(source + HALF, there & (head < H + 2 * H_KV), other=0.0)
    wide, wide2 = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(wide * wide, 1) + tl.sum(wide2 * wide2, 1)) / d + eps)[:, None]
        is_query = head < H
        weight = tl.where(is_query, tl.load(q_norm + pair, there, other=0.0), tl.load(k_norm + pair, there, other=0.0))
        weight2 = tl.where(
            is_query, tl.load(q_norm + HALF + pair, there, other=0.0), tl.load(k_norm + HALF + pair, there, other=0.0)
        )
        wide = ((wide * scale).to(first.dtype) * weight).to(tl.float32)
        wide2 = ((wide2 * scale).to(first.dtype) * weight2).to(tl.float32)
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * d + pair
    cos, sin = tl.load(angles, there, other=0.0), tl.load(angles + HALF, there, other=0.0)
    turned, turned2 = (wide * cos - wide2 * sin).to(first.dtype), (wide2 * cos + wide * sin).to(first.dtype)
    queries = out + (token * H + head) * d + pair
    tl.store(queries, turned, there & (head < H))
    tl.store(queries + HALF, turned2, there & (head < H))
    slot = tl.load(slots + token).to(tl.int64)
    in_cache = (slot // BLOCK_SIZE * H_KV * BLOCK_SIZE + slot % BLOCK_SIZE) * d + pair
    keys = k_cache + in_cache + (head - H) * BLOCK_SIZE * d
    kept = there & (head >= H) & (head < H + H_KV) & (slot >= 0)
    tl.store(keys, turned, kept)
    tl.store(keys + HALF, turned2, kept)
    values = v_cache + in_cache + (head - H - H_KV) * BLOCK_SIZE * d
    kept = there & (head >= H + H_KV) & (head < H + 2 * H_KV) & (slot >= 0)
    tl.store(values, first, kept)
    tl.store(values + HALF, second, kept)


HEADS = 16  # of a program: few enough to spread one token over the device, enough to keep a program busy


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    _, kv_heads, block_size, d = k_cache.shape
    T, heads = len(qkv), qkv.shape[-1] // d - 2 * kv_heads
    out = torch.empty(T, heads, d, dtype=qkv.dtype, device=qkv.device)
    normed = q_norm is not None
    _rotate_and_store[(T, triton.cdiv(heads + 2 * kv_heads, HEADS))](
        qkv, positions, cos_sin, slots, k_cache, v_cache, q_norm if normed else qkv, k_norm if normed else qkv, out, eps,
        heads, kv_heads, d // 2, block_size, normed, HEADS, triton.next_power_of_2(d // 2), num_warps=4, **early(),
    )  # fmt: skip
    return out
