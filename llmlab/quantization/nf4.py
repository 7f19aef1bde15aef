"""Four-bit codebooks, NF4 and FP4, with a scale for each block and those scales quantized once more.

    x = absmax c[q]         q: the code of 4 bits; c: the codebook, 16 values in [-1, 1]; absmax: the block's largest |x|

Blocks run through the flattened tensor, of which the last may be shorter. Codes, scales and their second quantization
are bit for bit those of bitsandbytes 0.50.2 on a CPU: Dettmers et al. 2023 (QLoRA), section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmlab.arguments import checked, instance_of, integer
from llmlab.quantization.integer import float_tensor
from llmlab.quantization.tensor import dtype_name, dtype_named

# Quantiles of a normal distribution with the ends joined at zero, scaled to [-1, 1]; to the last bit as QLoRA has them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of mantissa; a code is its index, so 0 to 7 are 0 and the positive values.
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CODEBOOKS = {"nf4": NF4, "fp4": FP4}
ABSMAX_BLOCK = 256  # scales that share one scale of their own
_TABLE = 65536  # steps of [-1, 1] in bitsandbytes' table from a value to its 8-bit code
_LEAST = 1e-38  # what a block's largest magnitude counts as where it is smaller


@functools.cache
def codebook(name: str, device: torch.device | str = "cpu") -> Tensor:
    """The 16 values of "nf4" or "fp4", fp32, by code."""
    return torch.tensor(CODEBOOKS[name], dtype=torch.float32, device=device)


@functools.cache
def dynamic_codebook(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values that scales are quantized to, ascending in [-0.993, 1]: a sign, a power of ten and a fraction.

    10^(i-6) f for i = 0 to 6, with 2^i fractions f, the middles of equal parts of [0.1, 1]; and 0 and 1.
    Source: Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning".
    """
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


@dataclass(frozen=True)
class CodebookTensor:
    """Codes of 4 bits into a codebook, two to a byte, with a scale for each block.

    packed: uint8 [ceil(n / 2)], the first of two codes in the high half. absmax: fp32 [blocks], or uint8 codes where
    double quantized; absmax_scale: fp32 [ceil(blocks / 256)], and offset: fp32 scalar, then tell their values.
    """

    packed: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    offset: Tensor | None
    codebook: str
    block_size: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def codes(self) -> Tensor:
        """The codes, uint8 of ``shape``."""
        pairs = torch.stack((self.packed >> 4, self.packed & 15), 1).flatten()
        return pairs[: self.shape.numel()].view(self.shape)

    @property
    def scales(self) -> Tensor:
        """Each block's scale, fp32 [blocks]: as stored, or dynamic[absmax] * absmax_scale + offset."""
        if self.absmax_scale is None or self.offset is None:
            return self.absmax
        each = self.absmax_scale.repeat_interleave(ABSMAX_BLOCK)[: len(self.absmax)]
        return dynamic_codebook(self.absmax.device)[self.absmax.long()] * each + self.offset

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales: 4 + 32/B bits a value, or 4 + 8/B + 32/(256 B) and one offset."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    def dequantize(self) -> Tensor:
        """c[q] absmax, multiplied in fp32; of ``shape`` and ``dtype``."""
        count = self.shape.numel()
        values = F.pad(
            codebook(self.codebook, self.packed.device)[self.codes.flatten().int()], (0, -count % self.block_size)
        )
        return (
            (values.view(-1, self.block_size) * self.scales[:, None]).flatten()[:count].view(self.shape).to(self.dtype)
        )

    def parts(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        found = {"codes": self.packed, "absmax": self.absmax, "absmax_scale": self.absmax_scale, "offset": self.offset}
        return {name: part for name, part in found.items() if part is not None}

    def description(self) -> dict[str, Any]:
        """The codebook, the block size, the shape and the dtype."""
        return {
            "kind": "codebook", "codebook": self.codebook, "block_size": self.block_size,
            "shape": list(self.shape), "dtype": dtype_name(self.dtype),
        }  # fmt: skip

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> CodebookTensor:
        """The tensor of ``parts()`` and ``description()``."""
        return cls(
            parts["codes"], parts["absmax"], parts.get("absmax_scale"), parts.get("offset"), description["codebook"],
            description["block_size"], torch.Size(description["shape"]), dtype_named(description["dtype"]),
        )  # fmt: skip


def quantize_nf4(x: Tensor, block_size: int = 64, double_quantization: bool = True) -> CodebookTensor:
    """The nearest NF4 code of each value, relative to its block's largest magnitude.

    q_i = argmin_j |x_i / absmax - c_j|; of two that are as near, the lower value. x: any shape. double_quantization:
    absmax, less its mean, as 8-bit codes with one fp32 scale for 256 of them: 8/64 + 32/(64 * 256) = 0.127 bits a value in place
    of 0.5. Raises TypeError and ValueError for what is no finite, non-empty tensor of floats, and for block sizes under 1.
    Source: Dettmers et al. 2023, section 3.
    """
    return _quantize(x, block_size, double_quantization, "nf4")


def quantize_fp4(x: Tensor, block_size: int = 64, double_quantization: bool = True) -> CodebookTensor:
    """The nearest FP4 code (sign, 2 bits of exponent, 1 of mantissa) of each value; all else as for ``quantize_nf4``."""
    return _quantize(x, block_size, double_quantization, "fp4")


def dequantize_nf4(quantized: CodebookTensor) -> Tensor:
    """The values of an NF4 tensor; raises TypeError for any other."""
    return _dequantize(quantized, "nf4")


def dequantize_fp4(quantized: CodebookTensor) -> Tensor:
    """The values of an FP4 tensor; raises TypeError for any other."""
    return _dequantize(quantized, "fp4")


def _dequantize(quantized: CodebookTensor, name: str) -> Tensor:
    if not isinstance(quantized, CodebookTensor) or quantized.codebook != name:
        what = quantized.codebook if isinstance(quantized, CodebookTensor) else type(quantized).__name__
        raise TypeError(f"quantized: expected a tensor in {name}, got {what}")
    return quantized.dequantize()


@checked(x=float_tensor(), block_size=integer(at_least=1), double_quantization=instance_of(bool))
def _quantize(x: Tensor, block_size: int, double_quantization: bool, name: str) -> CodebookTensor:
    flat = x.detach().float().flatten()
    whole = len(flat) - len(flat) % block_size
    blocks, rest = flat[:whole].view(-1, block_size), flat[whole:]
    absmax = blocks.abs().amax(1)
    scaled = [(blocks * (1.0 / absmax.clamp(min=_LEAST))[:, None]).flatten()]
    if len(rest):  # bitsandbytes divides here, and stores no less than _LEAST
        last = rest.abs().max().clamp(min=_LEAST)
        absmax = torch.cat((absmax, last[None]))
        scaled.append(rest / last)
    values = F.pad(torch.cat(scaled).clamp(-1, 1), (0, len(flat) % 2))
    ascending, order = codebook(name, x.device).sort(stable=True)
    codes = order[torch.bucketize(values, (ascending[:-1] + ascending[1:]) / 2)].to(torch.uint8)
    packed = codes[::2] << 4 | codes[1::2]
    if not double_quantization:
        return CodebookTensor(packed, absmax, None, None, name, block_size, x.shape, x.dtype)
    offset = absmax.mean()
    absmax_codes, absmax_scale = _quantize_dynamic(absmax - offset)
    return CodebookTensor(packed, absmax_codes, absmax_scale, offset, name, block_size, x.shape, x.dtype)


@functools.cache
def _dynamic_table(device: torch.device | str) -> Tensor:
    """The 8-bit code of each of 65,536 steps from -1 to 1."""
    values = dynamic_codebook(device)
    steps = torch.arange(_TABLE, device=device).float() / (_TABLE - 1) * 2 - 1
    return torch.bucketize(steps, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def _quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] of x [n] and the scale of every 256 of them, looked up as bitsandbytes does it on a CPU.

    Its table has steps of 3e-5, so next to the middle of two codes it may take the farther one.
    """
    blocks = F.pad(x, (0, -len(x) % ABSMAX_BLOCK)).view(-1, ABSMAX_BLOCK)
    scale = blocks.abs().amax(1)
    relative = (blocks * (1.0 / scale)[:, None]).clamp(-1, 1).nan_to_num(nan=-1.0)
    codes = _dynamic_table(x.device)[((relative + 1) * ((_TABLE - 1) / 2) + 0.5).int()]
    return torch.where(scale[:, None] == 0, 0, codes).to(torch.uint8).flatten()[: len(x)], scale
