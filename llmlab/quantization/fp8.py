"""Floats of 8 bits: e4m3 (3 bits of mantissa, up to 448) and e5m2 (2 bits, up to 57,344), each with a scale.

    x = s q         s = max|x| / largest finite q, for the tensor or for each row

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; e4m3 is the variant without infinities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.arguments import checked, one_of
from llmlab.quantization.integer import divisor, float_tensor, value_range, wide
from llmlab.quantization.tensor import FLOAT_FORMATS, QuantizedTensor, Scheme


def largest(format: str) -> float:
    """The largest finite value: 448 for "e4m3", 57,344 for "e5m2"."""
    return torch.finfo(FLOAT_FORMATS[format]).max


def to_fp8(x: Tensor, format: str = "e4m3") -> Tensor:
    """The nearest FP8 values, ties to even, with what lies beyond the largest clipped to it.

    The clip is explicit: beyond 448 a bare cast to e4m3 gives NaN, and beyond 57,344 one to e5m2 infinity.
    """
    limit = largest(format)
    return x.clamp(-limit, limit).to(FLOAT_FORMATS[format])


@checked(x=float_tensor(), format=one_of(FLOAT_FORMATS), granularity=one_of(["tensor", "row"]))
def quantize_fp8(x: Tensor, format: str = "e4m3", granularity: str = "tensor") -> QuantizedTensor:
    """Scale the largest magnitude onto the largest FP8 value and round: q = fp8(x / s), s = max|x| / 448 or / 57,344.

    x: any shape. granularity: one s (fp32) for the tensor, or one for each row, a vector along the last dimension.
    The error of a value is at most 2^-4 of it (e5m2: 2^-3), or half the smallest step, s 2^-10 (s 2^-17), near zero.
    Raises TypeError and ValueError for what is no finite, non-empty tensor of floats, and for other names.
    """
    scheme = Scheme(8, True, granularity, format=format)
    return QuantizedTensor(*_scaled(x, format, granularity), None, scheme, x.shape, x.dtype)


def round_rows(x: Tensor, format: str = "e4m3") -> Tensor:
    """The values that ``quantize_fp8`` by rows keeps of x [..., n], in x's dtype; nothing is checked, x may have no rows."""
    codes, scale = _scaled(x, format, "row")
    return (codes.float() * scale).to(x.dtype)


def _scaled(x: Tensor, format: str, granularity: str) -> tuple[Tensor, Tensor]:
    low, high = value_range(wide(x), granularity)
    scale = (torch.maximum(-low, high) / largest(format)).float()
    return to_fp8(wide(x) / divisor(wide(scale)), format), scale
