"""SwiGLU's activation: silu(gate) * up, elementwise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmlab.kernels.early import early, wait


@triton.jit
def _silu_and_mul(gate_up, out, F: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = columns < F
    gate = tl.load(gate_up + row * 2 * F + columns, kept, other=0.0)
    up = tl.load(gate_up + row * 2 * F + F + columns, kept, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(out + row * F + columns, (wide * tl.sigmoid(wide)).to(gate.dtype) * up, kept)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    T, twice = gate_up.shape
    out = torch.empty(T, twice // 2, dtype=gate_up.dtype, device=gate_up.device)
    block = 1024
    _silu_and_mul[(T, triton.cdiv(twice // 2, block))](gate_up, out, twice // 2, block, num_warps=4, **early())
    return out
