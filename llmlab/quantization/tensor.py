"""A tensor of low-precision codes with the scales that give them values.

    symmetric             x = s q
    integer zero point    x = s (q - z)
    float minimum         x = s q + m

A scheme says how many values share one s: all of the tensor, a channel (a row of a weight), a token or row (a vector
along the last dimension), or a group of neighbours in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from llmlab.quantization.packing import pack_bits, packed_length, unpack_bits

GRANULARITIES = ("tensor", "channel", "token", "row", "group")
FLOAT_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@runtime_checkable
class Quantized(Protocol):
    """What every quantized tensor can do, whatever its format; layers and files need no more than this."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor that was quantized."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor that was quantized, and of what ``dequantize`` gives."""

    @property
    def num_bytes(self) -> int:
        """Bytes as stored: codes packed, with scales, zero points and whatever else the values need."""

    def dequantize(self) -> Tensor:
        """The values that the codes stand for."""

    def parts(self) -> dict[str, Tensor]:
        """What is stored, packed, by name."""

    def description(self) -> dict[str, Any]:
        """What is needed beside the parts to read them, as plain data."""


@dataclass(frozen=True)
class Scheme:
    """How values became codes.

    bits: of a code. symmetric: no zero point. granularity: what shares one scale, one of GRANULARITIES.
    group_size: values to a scale, for "group". format: "int", or a float of 8 bits, one of FLOAT_FORMATS.
    """

    bits: int
    symmetric: bool = True
    granularity: str = "tensor"
    group_size: int | None = None
    format: str = "int"

    @property
    def lowest(self) -> int:
        """The smallest code: -2^(b-1) where signed, which is where symmetric, else 0."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest code: 2^(b-1) - 1 where signed, else 2^b - 1."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype of unpacked codes: int8 where signed, uint8 where not, a float where the format is one."""
        return FLOAT_FORMATS.get(self.format, torch.int8 if self.symmetric else torch.uint8)


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and scales of one tensor.

    codes: int8 or uint8 (or a float8), unpacked, of the tensor's shape. scale: broadcasts against the codes, or
    [rows, groups] where the granularity is "group"; the last group of a row may be shorter. zero: None, an integer zero
    point (an integer dtype) or a minimum (a float dtype), of the scale's shape. dtype: of the dequantized values.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    shape: torch.Size
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """s q, s (q - z) or s q + m, computed in fp32 (fp64 for fp64 values); of ``shape`` and ``dtype``."""
        scale, zero = self.scale, self.zero
        if self.scheme.granularity == "group":
            scale = per_column(scale, self.scheme, self.shape[-1])
            zero = None if zero is None else per_column(zero, self.scheme, self.shape[-1])
        return values_of(self.codes, scale, zero, self.dtype).reshape(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed codes, row by row, and of scales and zero points."""
        if self.scheme.format != "int" or not self.codes.dim():
            codes = self.codes.numel()
        else:
            length = self.codes.shape[-1]
            codes = packed_length(length, self.scheme.bits) * (self.codes.numel() // max(length, 1))
        zero = 0 if self.zero is None else packed_zero_bytes(self.zero, self.scheme)
        return codes + self.scale.numel() * self.scale.element_size() + zero

    def parts(self) -> dict[str, Tensor]:
        """Codes, packed below 8 bits, scales, and zero points (packed as codes are, where they are integers)."""
        codes = self.codes
        if self.scheme.format == "int":
            codes = _packed(codes, self.scheme)
        parts = {"codes": codes, "scale": self.scale}
        if self.zero is not None:
            parts["zero"] = self.zero if self.zero.is_floating_point() else _packed(self.zero, self.scheme)
        return parts

    def description(self) -> dict[str, Any]:
        """The scheme, the shape and the dtype."""
        return {"kind": "scaled", **asdict(self.scheme), "shape": list(self.shape), "dtype": dtype_name(self.dtype)}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> QuantizedTensor:
        """The tensor of ``parts()`` and ``description()``."""
        scheme = Scheme(**{name: description[name] for name in Scheme.__dataclass_fields__})
        shape, scale = torch.Size(description["shape"]), parts["scale"]
        codes, zero = parts["codes"], parts.get("zero")
        if scheme.format == "int":
            codes = _unpacked(codes, scheme, shape)
        if zero is not None and not zero.is_floating_point():
            zero = _unpacked(zero, scheme, scale.shape)
        return cls(codes, scale, zero, scheme, shape, dtype_named(description["dtype"]))


def dequantize(quantized: Quantized) -> Tensor:
    """The values that a quantized tensor stands for, of any format here, in its shape and dtype."""
    if not isinstance(quantized, Quantized):
        raise TypeError(f"quantized: expected a quantized tensor, got {type(quantized).__name__}")
    return quantized.dequantize()


def values_of(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """s q, s (q - z) for an integer z, s q + m for a float m; all broadcast against the codes."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, s = codes.to(wide), scale.to(wide)
    if zero is None:
        return (s * q).to(dtype)
    if zero.is_floating_point():
        return (s * q + zero.to(wide)).to(dtype)
    return (s * (q - zero.to(wide))).to(dtype)


def per_column(grouped: Tensor, scheme: Scheme, columns: int) -> Tensor:
    """[rows, groups] -> [rows, columns]: each group's entry under each of its columns."""
    assert scheme.group_size is not None
    return grouped.repeat_interleave(scheme.group_size, -1)[..., :columns]


def packed_zero_bytes(zero: Tensor, scheme: Scheme) -> int:
    """Bytes of zero points: packed as codes where they are integers, else those of their dtype."""
    if zero.is_floating_point():
        return zero.numel() * zero.element_size()
    length = zero.shape[-1] if zero.dim() else 1
    return packed_length(length, scheme.bits) * (zero.numel() // max(length, 1))


def _packed(codes: Tensor, scheme: Scheme) -> Tensor:
    if scheme.bits == 8:
        return codes
    rows = codes.reshape(1) if codes.dim() == 0 else codes
    return pack_bits(rows.to(torch.int16) - scheme.lowest, scheme.bits)


def _unpacked(packed: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    if scheme.bits == 8:
        return packed
    codes = unpack_bits(packed, scheme.bits, shape[-1] if shape else 1)
    return (codes.to(torch.int16) + scheme.lowest).to(scheme.code_dtype).reshape(shape)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without "torch."; ``dtype_named`` goes back."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype that ``str`` shows as "torch.<name>"; raises ValueError for a name that is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: expected the name of a torch dtype, got {name!r}")
    return dtype
