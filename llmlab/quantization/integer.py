"""Rounding to integers: absmax, zero point, and groups of neighbours with a scale each.

Finding the grid is kept apart from rounding to it, since solvers such as GPTQ fix the grid first and round a column when
its turn comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llmlab.arguments import Check, checked, integer, one_of
from llmlab.quantization.tensor import QuantizedTensor, Scheme, per_column, values_of

BITS = range(2, 9)


def float_tensor(*, dims: int | None = None) -> Check:
    """A check that an argument is a finite, non-empty tensor of floats, of so many dimensions."""

    def check(name: str, value: object) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
        if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"{name}: expected a floating dtype of 16 bits or more, got {value.dtype}")
        if dims is not None and value.dim() != dims:
            raise ValueError(f"{name}: expected {dims} dimensions, got the shape {tuple(value.shape)}")
        if not value.numel():
            raise ValueError(f"{name}: expected values, got the empty shape {tuple(value.shape)}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity among them")

    return check


def wide(x: Tensor) -> Tensor:
    """In the precision that grids are found in: fp64 for fp64, else fp32."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def value_range(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """The least and the largest value of what shares a scale, with dimensions kept so that they broadcast."""
    if granularity == "tensor" or x.dim() == 0:
        return x.amin(), x.amax()
    dims = [-1] if granularity in ("token", "row") else list(range(1, x.dim()))
    return (x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)) if dims else (x, x)


def divisor(scale: Tensor) -> Tensor:
    """The scale to divide by: 1 where it is 0, so that zeros stay zeros."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


@dataclass(frozen=True)
class Grid:
    """The values that the codes of each group of a weight [rows, columns] may stand for.

    scale, zero: [rows, groups], as in ``QuantizedTensor``. columns: of the whole weight.
    """

    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    columns: int

    def at(self, columns: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero [rows, n] under n columns of the weight, given by their indices; all of them in order for None."""
        if columns is None:
            return per_column(self.scale, self.scheme, self.columns), (
                None if self.zero is None else per_column(self.zero, self.scheme, self.columns)
            )
        assert self.scheme.group_size is not None
        group = columns.to(self.scale.device) // self.scheme.group_size
        return self.scale[:, group], None if self.zero is None else self.zero[:, group]

    def tensor(self, codes: Tensor, dtype: torch.dtype) -> QuantizedTensor:
        """The quantized tensor of codes [rows, columns] on this grid, in the weight's own order of columns."""
        return QuantizedTensor(codes, self.scale, self.zero, self.scheme, codes.shape, dtype)


@checked(weight=float_tensor(dims=2), bits=one_of(BITS), group_size=integer(at_least=1))
def grid(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    float_minimum: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> Grid:
    """The grid of each group of ``group_size`` neighbours in a row of a weight [rows, columns].

    symmetric: s = max|w| / (2^(b-1) - 1). Else, with lo = min(w, 0) and hi = max(w, 0): s = (hi - lo) / (2^b - 1) and
    the zero point z = round(-lo / s), so that 0 is on the grid. float_minimum: s = (max w - min w) / (2^b - 1) and the
    minimum m = min w, as GGUF's Q4_1 has it. Scales and minima are kept in ``scale_dtype``, and codes are rounded to
    what is kept. The last group of a row has what is left. Raises TypeError and ValueError for weights that are no
    finite matrix, for bits outside 2 to 8, for a float minimum of a symmetric grid, and for scales too large for
    their dtype.
    """
    if symmetric and float_minimum:
        raise ValueError("float_minimum: expected False where symmetric is True, got True")
    if scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"scale_dtype: expected float16, bfloat16 or float32, got {scale_dtype!r}")
    rows, columns = weight.shape
    size = min(group_size, columns)
    scheme = Scheme(bits, symmetric, "group", size)
    values = wide(weight)

    def grouped(fill: float) -> Tensor:
        return F.pad(values, (0, -columns % size), value=fill).view(rows, -1, size)

    low, high = grouped(float("inf")).amin(-1), grouped(float("-inf")).amax(-1)
    zero: Tensor | None = None
    if symmetric:
        scale = _kept(torch.maximum(-low, high) / scheme.highest, scale_dtype)
    elif float_minimum:
        zero = _kept(low, scale_dtype)
        scale = _kept((high - low) / scheme.highest, scale_dtype)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _kept((high - low) / scheme.highest, scale_dtype)
        zero = (-low / divisor(wide(scale))).round().clamp(0, scheme.highest).to(torch.uint8)
    return Grid(scale, zero, scheme, columns)


def codes_of(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """The nearest codes of x: round(x / s), round(x / s) + z or round((x - m) / s), clipped to the scheme's range.

    scale and zero broadcast against x. Ties go to the even integer, and a scale of 0 gives the code of 0.
    """
    s = divisor(wide(scale))
    if zero is None:
        q = (wide(x) / s).round_()
    elif zero.is_floating_point():
        q = ((wide(x) - wide(zero)) / s).round_()
    else:
        q = (wide(x) / s).round_().add_(zero)
    return q.clamp_(scheme.lowest, scheme.highest).to(scheme.code_dtype)


def round_to(weight: Tensor, grid: Grid, columns: Tensor | None = None) -> Tensor:
    """The nearest codes on a grid that was found before, int8 or uint8 of the weight's shape.

    weight: [rows, n], the columns of the whole weight with these indices, or all of it. ``values_on`` goes back.
    """
    scale, zero = grid.at(columns)
    return codes_of(weight, scale, zero, grid.scheme)


def values_on(codes: Tensor, grid: Grid, columns: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of codes [rows, n] on a grid; columns as for ``round_to``."""
    scale, zero = grid.at(columns)
    return values_of(codes, scale, zero, dtype)


def quantize_groups(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    float_minimum: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedTensor:
    """Round each weight to the nearest value on its group's grid: ``round_to(weight, grid(weight, ...))``.

    weight: [rows, columns]; equations and errors as for ``grid``. |w - s q| is at most s/2, and (2^b - 1) 2^-11 s more
    where the scale was rounded to fp16. Source: group-wise quantization as in Dettmers and Zettlemoyer 2023.
    """
    found = grid(weight, bits, group_size, symmetric, float_minimum, scale_dtype)
    return found.tensor(round_to(weight, found), weight.dtype)


@checked(x=float_tensor(), bits=one_of(BITS), granularity=one_of(["tensor", "channel", "token"]))
def quantize_absmax(x: Tensor, bits: int = 8, granularity: str = "tensor") -> QuantizedTensor:
    """Symmetric rounding to the largest magnitude: q = round(x / s), s = max|x| / (2^(b-1) - 1).

    x: any shape. granularity: what the maximum is taken over: the tensor, each channel (entry of dimension 0: a row of
    a weight [out, in]) or each token (vector along the last dimension). Scales are fp32 and broadcast against the codes,
    int8 of x's shape. Raises TypeError and ValueError for what is no finite tensor of floats, and for other bits.
    Source: Dettmers et al. 2022, section 2.
    """
    scheme = Scheme(bits, True, granularity)
    low, high = value_range(wide(x), granularity)
    scale = (torch.maximum(-low, high) / scheme.highest).float()
    return QuantizedTensor(codes_of(x, scale, None, scheme), scale, None, scheme, x.shape, x.dtype)


@checked(x=float_tensor(), bits=one_of(BITS), granularity=one_of(["tensor", "channel", "token"]))
def quantize_zero_point(x: Tensor, bits: int = 8, granularity: str = "tensor") -> QuantizedTensor:
    """Asymmetric rounding of the whole range: q = round(x / s) + z, s = (hi - lo) / (2^b - 1), z = round(-lo / s).

    lo = min(x, 0) and hi = max(x, 0), so that 0 has a code of its own, z. Codes and zero points are uint8 of 0 to
    2^b - 1; shapes, granularity and errors as for ``quantize_absmax``. Source: Jacob et al. 2018, section 2.1.
    """
    scheme = Scheme(bits, False, granularity)
    low, high = value_range(wide(x), granularity)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / scheme.highest).float()
    zero = (-low / divisor(wide(scale))).round().clamp(0, scheme.highest).to(torch.uint8)
    return QuantizedTensor(codes_of(x, scale, zero, scheme), scale, zero, scheme, x.shape, x.dtype)


def _kept(values: Tensor, dtype: torch.dtype) -> Tensor:
    kept = values.to(dtype)
    if not bool(torch.isfinite(kept).all()):
        raise ValueError(f"weight: expected scales that fit in {dtype}, got {float(values.abs().max()):g}")
    return kept
