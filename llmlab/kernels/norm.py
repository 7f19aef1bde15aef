"""RMSNorm: a row a program, read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmlab.kernels.early import early, wait


@triton.jit
def _rms_norm(x, weight, out, D: tl.constexpr, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    kept = columns < D
    value = tl.load(x + row * D + columns, kept, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    normed = (wide * scale).to(value.dtype) * tl.load(weight + columns, kept, other=0.0)
    tl.store(out + row * D + columns, normed, kept)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    D = x.shape[-1]
    block = triton.next_power_of_2(D)
    warps = max(1, min(16, block // 512))
    _rms_norm[(x.numel() // D,)](x, weight, out, D, eps, block, num_warps=warps, **early())
    return out
