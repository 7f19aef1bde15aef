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
    tiling: tuple[int, ...] | None = None,
) -> Tensor:
    """x W^T + b with W = (code - zero) · scale in groups: [M, K] by a 4-bit matrix [N, K] to [M, N].

    counters: of ``int4_counters``, or made anew. tiling: how a GPU cuts the work, where the default is not wanted; both
    mean nothing to the twin.
    """
    return _product(x, dequantize_int4(weight, torch.float32), bias)


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix [N, K] of codes, less the zeros and times the scales of their groups, rounded once to dtype."""
    codes, scales, zeros = unpack_int4(weight)
    grouped = codes.float().view(len(codes), -1, weight.group_size)
    shifted = grouped if zeros is None else grouped - zeros.float()[..., None]
    return (shifted * scales.float()[..., None]).view(codes.shape).to(dtype)


def nf4_linear(
    x: Tensor, weight: Nf4Weight, bias: Tensor | None = None, tiling: tuple[int, int, int, bool] | None = None
) -> Tensor:
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


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Codes [M, K] of int8, float8_e4m3fn or float8_e5m2 and a scale [M] for each row of x: scale = max |x| / largest.

    code = x · (largest / max |x|), rounded to the nearest, halves to even, and clamped to the largest, which is 127, 448 or
    57344; a row of zeros has scale 0. Source: Dettmers et al. 2022 (LLM.int8), section 2; Micikevicius et al. 2022 for FP8.
    """
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    absmax = x.float().abs().amax(1)
    factor = torch.full_like(absmax, largest) / absmax  # a number over a tensor would be rounded twice
    codes = x.float() * torch.where(absmax > 0, factor, 0.0)[:, None]
    codes = codes.round() if dtype == torch.int8 else codes
    return codes.clamp(-largest, largest).to(dtype), absmax / largest


def scaled_product(
    x: Tensor,
    x_scales: Tensor,
    matrix: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tiling: tuple[int, ...] | None = None,
) -> Tensor:
    """diag(x_scales) x matrix^T diag(scales) + b, of codes [M, K] and [N, K] of 8 bits, int8 or float8_e4m3fn, to [M, N].

    Sums of int8 products are exact: at most 127² K, below 2^53 here and below 2^31 on a GPU up to K = 133,143. tiling: see
    ``int4_linear``. Raises ValueError for K that is not a multiple of 16, as a GPU's copy engine does.
    """
    if x.shape[1] % 16:
        raise ValueError(f"x: expected a multiple of 16 columns, got {x.shape[1]}")
    total = F.linear(x.double(), matrix.double()) * x_scales.double()[:, None] * scales.double()
    return (total if bias is None else total + bias.double()).to(dtype)


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with rows of x quantized to int8: [M, K] by int8 codes [N, K] with a scale for each row to [M, N]."""
    return scaled_product(*quantize_rows(x, torch.int8), codes, scales, bias, x.dtype)


def fp8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with rows of x quantized to e4m3: [M, K] by float8_e4m3fn codes [N, K] with a scale for each row to [M, N]."""
    return scaled_product(*quantize_rows(x, torch.float8_e4m3fn), codes, scales, bias, x.dtype)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.float(), matrix, None if bias is None else bias.float()).to(x.dtype)
