"""Choosing tokens: an argmax over the vocabulary in two passes, with Gumbel noise where a temperature asks for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 4096  # logits a program reads


@triton.jit
def _best_of_part(
    logits, best, index, temperature, seeds, positions, V, NOISE: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * PART + tl.arange(0, PART)
    kept = at < V
    value = tl.load(logits + row * V + at, kept, other=float("-inf")).to(tl.float32)
    broken = tl.max((value != value).to(tl.int32), 0)
    if NOISE:
        heat = tl.load(temperature + row)
        if heat > 0:
            seed = tl.load(seeds + row) * 1000003 + tl.load(positions + row)
            uniform = tl.maximum(tl.rand(seed, at), 1e-20)
            value = tl.where(kept, value / heat - tl.log(-tl.log(uniform)), float("-inf"))
    highest = tl.max(value, 0)
    first = tl.min(tl.where((value == highest) & kept, at, V), 0)
    tl.store(best + row * PARTS + part, tl.where(broken > 0, float("nan"), highest))
    tl.store(index + row * PARTS + part, first)


@triton.jit
def _best_of_parts(best, index, out, V, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    value = tl.load(best + row * PARTS + part, part < PARTS, other=float("-inf"))
    where = tl.load(index + row * PARTS + part, part < PARTS, other=V)
    broken = tl.max((value != value).to(tl.int32), 0)
    highest = tl.max(value, 0)
    first = tl.min(tl.where(value == highest, where, V), 0)
    tl.store(out + row, tl.where(broken > 0, -1, first).to(tl.int64))


def _choose(logits: Tensor, noise: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
    N, V = logits.shape
    parts = triton.cdiv(V, PART)
    best = torch.empty(N, parts, dtype=torch.float32, device=logits.device)
    index = torch.empty(N, parts, dtype=torch.int32, device=logits.device)
    out = torch.empty(N, dtype=torch.int64, device=logits.device)
    temperature, seeds, positions = noise or (best, index, index)
    _best_of_part[(N, parts)](
        logits, best, index, temperature, seeds, positions, V, noise is not None, parts, PART, num_warps=8
    )
    _best_of_parts[(N,)](best, index, out, V, parts, triton.next_power_of_2(parts), num_warps=1)
    return out


def argmax(logits: Tensor) -> Tensor:
    return _choose(logits.contiguous(), None)


def gumbel_argmax(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    return _choose(logits.contiguous(), (temperature, seeds, positions))
