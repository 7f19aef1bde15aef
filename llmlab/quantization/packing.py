"""Codes of fewer than 8 bits, packed into bytes.

A row of codes is one string of bits, lowest first: code i has the bits b i to b i + b - 1. That is two codes a byte at
4 bits (the first in the low half), and 8 codes in 3 bytes at 3 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from llmlab.arguments import checked, instance_of, integer


def packed_length(count: int, bits: int) -> int:
    """The bytes of a row of ``count`` codes: whole units of lcm(8, b) bits, the last one padded."""
    unit = math.lcm(8, bits)
    return -(-count * bits // unit) * unit // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: expected 1 to 8, got {bits!r}")


@checked(codes=instance_of(torch.Tensor), bits=integer(at_least=1))
def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., n] of 0 to 2^b - 1 into uint8 [..., packed_length(n, b)].

    byte_j = Σ_i (code_i << (b i mod 8)) over the codes i that have bits in byte j, each with the bits that lie there.
    Raises TypeError for codes that are no integers, ValueError for bits outside 1 to 8 and for codes out of range.
    """
    _check_bits(bits)
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise TypeError(f"codes: expected integers, got {codes.dtype}")
    if codes.dim() == 0:
        raise ValueError("codes: expected at least one dimension, got a scalar")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes: expected 0 to {(1 << bits) - 1}, got {int(codes.min())} to {int(codes.max())}")
    if bits == 8:
        return codes.to(torch.uint8)
    per_unit, unit_bytes = math.lcm(8, bits) // bits, math.lcm(8, bits) // 8
    count = codes.shape[-1]
    padded = F.pad(codes.to(torch.uint8), (0, -count % per_unit)).unflatten(-1, (-1, per_unit))
    packed = torch.zeros(*padded.shape[:-1], unit_bytes, dtype=torch.uint8, device=codes.device)
    for index in range(per_unit):
        byte, shift = divmod(index * bits, 8)
        packed[..., byte] |= padded[..., index] << shift  # what passes bit 7 falls off
        if shift + bits > 8:
            packed[..., byte + 1] |= padded[..., index] >> (8 - shift)
    return packed.flatten(-2)


@checked(packed=instance_of(torch.Tensor), bits=integer(at_least=1), count=integer())
def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of each row, uint8 [..., count], from ``pack_bits``' bytes [..., packed_length(count, b)].

    Raises TypeError for bytes that are not uint8, ValueError for bits outside 1 to 8 and for a row of another length.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected torch.uint8, got {packed.dtype}")
    if packed.dim() == 0 or packed.shape[-1] != packed_length(count, bits):
        raise ValueError(
            f"packed: expected rows of {packed_length(count, bits)} bytes for {count} codes of {bits} bits, "
            f"got the shape {tuple(packed.shape)}"
        )
    if bits == 8:
        return packed
    per_unit, unit_bytes = math.lcm(8, bits) // bits, math.lcm(8, bits) // 8
    units = packed.unflatten(-1, (-1, unit_bytes))
    codes = torch.empty(*units.shape[:-1], per_unit, dtype=torch.uint8, device=packed.device)
    for index in range(per_unit):
        byte, shift = divmod(index * bits, 8)
        code = units[..., byte] >> shift
        if shift + bits > 8:
            code = code | (units[..., byte + 1] << (8 - shift))
        codes[..., index] = code & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count]
