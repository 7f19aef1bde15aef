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
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes one head of one token: heads 0..H-1 are queries, the next H_KV keys, the last H_KV values."""
    wait(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d: tl.constexpr = 2 * HALF
    pair = tl.arange(0, BLOCK)
    kept = pair < HALF
    source = qkv + (token * (H + 2 * H_KV) + head) * d + pair
    first = tl.load(source, kept, other=0.0)
    second = tl.load(source + HALF, kept, other=0.0)
    slot = tl.load(slots + token).to(tl.int64)
    in_cache = (slot // BLOCK_SIZE * H_KV * BLOCK_SIZE + slot % BLOCK_SIZE) * d + pair
    if head >= H + H_KV:
        if slot >= 0:
            target = v_cache + in_cache + (head - H - H_KV) * BLOCK_SIZE * d
            tl.store(target, first, kept)
            tl.store(target + HALF, second, kept)
    else:
        if NORM:
            weight = (q_norm if head < H else k_norm) + pair
            wide, wide2 = first.to(tl.float32), second.to(tl.float32)
            scale = tl.rsqrt((tl.sum(wide * wide, 0) + tl.sum(wide2 * wide2, 0)) / d + eps)
            first = (wide * scale).to(first.dtype) * tl.load(weight, kept, other=0.0)
            second = (wide2 * scale).to(second.dtype) * tl.load(weight + HALF, kept, other=0.0)
        angles = cos_sin + tl.load(positions + token).to(tl.int64) * d + pair
        cos, sin = tl.load(angles, kept, other=0.0), tl.load(angles + HALF, kept, other=0.0)
        wide, wide2 = first.to(tl.float32), second.to(tl.float32)
        turned, turned2 = (wide * cos - wide2 * sin).to(first.dtype), (wide2 * cos + wide * sin).to(first.dtype)
        if head < H:
            target = out + (token * H + head) * d + pair
            tl.store(target, turned, kept)
            tl.store(target + HALF, turned2, kept)
        elif slot >= 0:
            target = k_cache + in_cache + (head - H) * BLOCK_SIZE * d
            tl.store(target, turned, kept)
            tl.store(target + HALF, turned2, kept)


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
    _rotate_and_store[(T, heads + 2 * kv_heads)](
        qkv, positions, cos_sin, slots, k_cache, v_cache, q_norm if normed else qkv, k_norm if normed else qkv, out, eps,
        heads, kv_heads, d // 2, block_size, normed, triton.next_power_of_2(d // 2), num_warps=1, **early(),
    )  # fmt: skip
    return out
