"""Products of int8 matrices, with the columns that hold outliers left in floating point: LLM.int8().

    Y = s_x s_w (Q_x Q_wᵀ) over the ordinary columns + X_O W_Oᵀ over the outlier columns O

Rows of X have a scale each, rows of W too (vector-wise): Dettmers et al. 2022, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmlab.arguments import checked, instance_of, number
from llmlab.quantization.integer import codes_of
from llmlab.quantization.tensor import QuantizedTensor

_EXACT = 1024  # columns whose products of int8 sum to at most 2^24, where fp32 still counts every integer
_MOST = (2**31 - 1) // 128**2  # columns whose products surely fit in int32


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """A Bᵀ, int8 [M, K] and [N, K] to int32 [M, N], exact.

    Raises TypeError for other dtypes, ValueError for other shapes and for K above 131,071, where int32 could overflow.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"a, b: expected torch.int8, got {a.dtype} and {b.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a, b: expected [M, K] and [N, K], got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.shape[1] > _MOST:
        raise ValueError(f"a, b: expected at most {_MOST} columns, got {a.shape[1]}")
    if not a.numel() or not b.numel():
        return a.new_zeros(len(a), len(b), dtype=torch.int32)
    if a.device.type == "cuda":  # cuBLAS takes more than 16 rows, and multiples of 8
        padded = F.pad(a, (0, -a.shape[1] % 8, 0, max(-len(a) % 8, 24 - len(a))))
        other = F.pad(b, (0, -b.shape[1] % 8, 0, -len(b) % 8))
        return torch._int_mm(padded, other.t())[: len(a), : len(b)]
    # without AVX-512 torch multiplies one number at a time; and of a single column it makes garbage (torch 2.13)
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and a.shape[1] > 1:
        return torch._int_mm(a, b.t())
    return product_by_chunks(a, b)


def product_by_chunks(a: Tensor, b: Tensor) -> Tensor:
    """``int8_product`` by products in fp32 over 1,024 columns at a time, none of which can round."""
    total = a.new_zeros(len(a), len(b), dtype=torch.int32)
    for a_part, b_part in zip(a.split(_EXACT, 1), b.split(_EXACT, 1), strict=True):
        total += (a_part.float() @ b_part.float().t()).int()
    return total


def outlier_columns(x: Tensor, threshold: float = 6.0) -> Tensor:
    """The indices of the columns of x [tokens, K] in which any |x| reaches the threshold."""
    return (x.abs() >= threshold).any(0).nonzero().flatten()


def vector_wise_product(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """Y = s_x s_w (Q_x Q_wᵀ) for x [tokens, K] and an int8 weight [N, K], each row with its own scale; in fp32."""
    scale = x.detach().abs().amax(1, keepdim=True).float() / 127
    codes = codes_of(x, scale, None, weight.scheme)
    return int8_product(codes, weight.codes) * scale * weight.scale.flatten()


@checked(x=instance_of(Tensor), weight=instance_of(QuantizedTensor), threshold=number(above=0))
def llm_int8_product(x: Tensor, weight: QuantizedTensor, threshold: float = 6.0) -> Tensor:
    """The product of x [tokens, K] and an int8 weight [N, K] with outlier columns in x's dtype: [tokens, N] in x's dtype.

    A column of x in which any |x| reaches the threshold is taken out of the int8 product, and multiplied by the weight's
    dequantized column. Raises TypeError for what are no tensors, ValueError for a weight that is not int8 by "channel" and
    for x of another shape. Source: Dettmers et al. 2022, section 3.2.
    """
    if weight.codes.dtype != torch.int8 or weight.scheme.granularity != "channel":
        raise ValueError(f"weight: expected int8 with a scale for each channel, got {weight.scheme}")
    if x.dim() != 2 or x.shape[1] != weight.shape[-1]:
        raise ValueError(f"x: expected [tokens, {weight.shape[-1]}], got the shape {tuple(x.shape)}")
    columns = outlier_columns(x, threshold)
    if not len(columns):
        return vector_wise_product(x, weight).to(x.dtype)
    ordinary = vector_wise_product(x.index_fill(1, columns, 0.0), weight)
    exact = weight.codes[:, columns].float() * weight.scale
    return (ordinary + (x[:, columns] @ exact.to(x.dtype).t()).float()).to(x.dtype)
