"""Quantized weights as the kernels of ``llmlab.kernels`` read them."""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.kernels import kernels_for
from llmlab.kernels.layouts import GROUPS, Int4Weight, Nf4Weight, pack_int4
from llmlab.quantization.nf4 import CodebookTensor, codebook, dynamic_codebook
from llmlab.quantization.tensor import Quantized, QuantizedTensor

KernelWeight = Int4Weight | Nf4Weight


def kernel_weight(quantized: Quantized) -> KernelWeight | None:
    """The weight [out, in] in the layout of a kernel that multiplies by it, or None where there is no such kernel.

    There is one for int4 in whole groups of 64 or 128 (scales are rounded to bfloat16), and for NF4 and FP4 in whole
    blocks of 64, whose codes and scales are not copied.
    """
    if len(quantized.shape) != 2:
        return None
    rows, columns = quantized.shape
    if isinstance(quantized, CodebookTensor):
        if quantized.block_size != 64 or columns % 64:
            return None
        device = quantized.packed.device
        table = codebook(quantized.codebook, device)
        if quantized.offset is None:
            return Nf4Weight(quantized.packed, quantized.absmax, table, rows, columns)
        again = dynamic_codebook(device), quantized.absmax_scale, quantized.offset.view(1)
        return Nf4Weight(quantized.packed, quantized.absmax, table, rows, columns, *again)
    if not isinstance(quantized, QuantizedTensor):
        return None
    scheme, zero = quantized.scheme, quantized.zero
    whole = scheme.group_size in GROUPS and columns % scheme.group_size == 0
    if (scheme.format, scheme.bits) != ("int", 4) or not whole or (zero is not None and zero.is_floating_point()):
        return None
    shift = 0 if scheme.symmetric else 8
    zeros = None if zero is None else zero.to(torch.int8) - shift
    return pack_int4(quantized.codes.to(torch.int8) - shift, quantized.scale, zeros)


def multiply(x: Tensor, weight: KernelWeight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, [..., in] to [..., out], by the kernels of x's device."""
    kernels = kernels_for(x.device.type)
    rows = x.reshape(-1, x.shape[-1])
    product = kernels.int4_linear if isinstance(weight, Int4Weight) else kernels.nf4_linear
    y: Tensor = product(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.out_features)
