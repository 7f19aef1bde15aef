"""The kernels on quantized matrices in plain torch: what each Triton kernel must compute, and what runs without a GPU.

Letters: M rows of x, K its columns, N rows of the matrix. Products are summed in fp32 and rounded once to x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.kernels.layouts import Int4Weight, Nf4Weight, unpack_int4


def int4_counters(out_features: int, device: torch.device) -> Tensor | None:
    """Room for ``int4_linear`` to count programs in; the twin needs none."""
    return None


def int4_linear(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    counters: Tensor | None = None,
    tiling: tuple[int, int, int, int, int] | None = None,
) -> Tensor:
    """x W^T + b with W = code · scale in groups: [M, K] by a 4-bit matrix [N, K] to [M, N].

    counters: of ``int4_counters``, or made anew. tiling: how a GPU cuts the work, where the default is not wanted; both
    mean nothing to the twin.
    """
    return _product(x, dequantize_int4(weight, torch.float32), bias)


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix [N, K] of codes times the scales of their groups, rounded once to dtype."""
    codes, scales = unpack_int4(weight)
    return (codes.float() * scales.float().repeat_interleave(weight.group_size, 1)).to(dtype)


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None, tiling: tuple[int, int, int, bool] | None = None) -> Tensor:
    """x W^T + b with W = table[code] · absmax in blocks of 64: [M, K] by an NF4 matrix [N, K] to [M, N].

    tiling: see ``int4_linear``. Source: Dettmers et al. 2023 (QLoRA), section 3.
    """
    return _product(x, dequantize_nf4(weight, torch.float32), bias)


def dequantize_nf4(weight: Nf4Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix [N, K] of values times the largest sizes of their blocks, rounded once to dtype."""
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), -1).flatten()
    absmax = weight.absmax
    if weight.absmax_table is not None and weight.absmax_scale is not None and weight.absmax_offset is not None:
        scale = weight.absmax_scale.repeat_interleave(256)[: len(absmax)]
        absmax = weight.absmax_table[absmax.int()] * scale + weight.absmax_offset
    values = weight.table[codes.int()].view(-1, 64) * absmax[:, None]
    return values.view(weight.out_features, weight.in_features).to(dtype)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.float(), matrix, None if bias is None else bias.float()).to(x.dtype)
