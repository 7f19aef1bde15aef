"""Quantization-aware training: round in the forward pass, and let gradients through as if nothing had happened.

forward    y = s clip(round(x / s), lowest, highest)
backward   dL/dx = dL/dy inside the range, 0 outside             (straight through, Bengio et al. 2013)
           dL/ds = Σ dL/dy (q - x/s inside, q outside)           (learned steps, Esser et al. 2020, arXiv:1902.08153)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from llmlab.arguments import checked, integer, one_of
from llmlab.calibration import LayerStatistics, visit_blocks
from llmlab.quantization.clipping import clipped_grid
from llmlab.quantization.integer import BITS, Grid, codes_of, grid, wide
from llmlab.quantization.layerwise import block_linears
from llmlab.quantization.tensor import QuantizedTensor, Scheme


class FakeQuantize(torch.autograd.Function):
    """Rounding to a grid, with the gradients above; ``fake_quantize`` checks what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, lowest: int, highest: int) -> Tensor:
        steps = x / scale
        moved = steps.round() if zero is None else steps.round() + zero
        codes = moved.clamp(lowest, highest)
        inside = codes == moved
        if zero is not None:
            codes = codes - zero
        ctx.scale_shape = scale.shape
        ctx.save_for_backward(inside, torch.where(inside, codes - steps, codes) if ctx.needs_input_grad[1] else None)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inside, by_scale = ctx.saved_tensors
        to_scale = None if by_scale is None else (gradient * by_scale).sum_to_size(ctx.scale_shape)
        return gradient * inside, to_scale, None, None, None


@checked(bits=one_of(BITS))
def fake_quantize(x: Tensor, scale: Tensor | float, zero: Tensor | int | None = None, bits: int = 8) -> Tensor:
    """The nearest values on a grid, with gradients that pass straight through: y = s (clip(round(x / s) + z) - z).

    Codes run from -2^(b-1) to 2^(b-1) - 1 without a zero point, from 0 to 2^b - 1 with one. dL/dx is dL/dy where the
    code before clipping lies in that range, 0 elsewhere; a scale that requires a gradient gets that of learned steps.

    x: any shape; scale, positive, and zero, a whole number, broadcast against it. Raises TypeError for x that is no float
    tensor, ValueError for scales that are not positive and finite and for other bits. Sources: at the top of this file.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a tensor of floats, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    s = torch.as_tensor(scale, dtype=x.dtype, device=x.device) if not isinstance(scale, Tensor) else scale
    if not bool(((s > 0) & torch.isfinite(s)).all()):
        raise ValueError("scale: expected positive, finite scales, got others among them")
    z = None if zero is None else torch.as_tensor(zero, device=x.device).to(x.dtype)
    scheme = Scheme(bits, z is None)
    result: Tensor = FakeQuantize.apply(x, s, z, scheme.lowest, scheme.highest)
    return result


class FakeQuantizedWeight(nn.Module):
    """A parametrization of a weight [rows, columns]: what it would be if it were stored on a grid of groups.

    The weight behind it stays in full precision and is what training moves, with the scale of each group beside it.
    Models of transformers and our Transformer read ``linear.weight``, so both run on rounded weights; training is for
    the former, since ours adds to its stream in place.
    """

    zero: Tensor | None

    def __init__(self, found: Grid) -> None:
        """found: the grid to start from, symmetric or with integer zero points, which stay. Raises ValueError for minima."""
        super().__init__()
        if found.zero is not None and found.zero.is_floating_point():
            raise ValueError("found: expected a symmetric grid or integer zero points, got float minima")
        self.scheme, self.columns, self.scale_dtype = found.scheme, found.columns, found.scale.dtype
        self.least = float(torch.finfo(found.scale.dtype).tiny)  # of a group of zeros
        self.scale = nn.Parameter(wide(found.scale).clamp(min=self.least))
        self.register_buffer("zero", found.zero)

    def _scales(self) -> Tensor:
        """The scales as they are stored, for which they are rounded too."""
        scale = self.scale.clamp(min=self.least)
        return scale + (scale.to(self.scale_dtype).to(scale.dtype) - scale).detach()  # 16 bits are few for a gradient

    def forward(self, weight: Tensor) -> Tensor:
        assert self.scheme.group_size is not None
        groups = F.pad(weight, (0, -self.columns % self.scheme.group_size)).unflatten(1, (-1, self.scheme.group_size))
        zero = None if self.zero is None else self.zero[..., None].to(weight.dtype)
        scale = self._scales()[..., None].to(weight.dtype)
        rounded: Tensor = FakeQuantize.apply(groups, scale, zero, self.scheme.lowest, self.scheme.highest)
        return rounded.flatten(1)[:, : self.columns]

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """The codes of a weight on the grid as it is now."""
        found = Grid(self._scales().to(self.scale_dtype), self.zero, self.scheme, self.columns)
        scale, zero = found.at()
        return found.tensor(codes_of(weight, scale, zero, self.scheme), weight.dtype)


@checked(bits=one_of(BITS), group_size=integer(at_least=1))
def prepare_qat(
    model: nn.Module, bits: int = 4, group_size: int = 64, symmetric: bool = True, token_ids: Tensor | None = None
) -> None:
    """Let the linear layers of a decoder's blocks round their weights from now on; only they and their scales train.

    token_ids: calibration text [windows, S], on which each group's grid is clipped where that loses less; None: the grid
    of the group's range. The layers' biases, norms, embeddings and head are frozen.
    """
    grids: dict[str, Grid] = {}

    def visit(block_name: str, block: nn.Module, statistics: dict[str, LayerStatistics]) -> None:
        for name, seen in statistics.items():
            weight = block.get_parameter(f"{name}.weight")
            grids[f"{block_name}.{name}"] = clipped_grid(weight, seen.hessian, bits, group_size, symmetric)

    if token_ids is not None:
        visit_blocks(model, token_ids, visit)
    model.requires_grad_(False)
    for name, linear in list(block_linears(model)):
        found = grids.get(name) or grid(linear.weight, bits, group_size, symmetric)
        linear.weight.requires_grad_(True)
        parametrize.register_parametrization(linear, "weight", FakeQuantizedWeight(found).to(linear.weight.device))


@torch.no_grad()
def finish_qat(model: nn.Module) -> dict[str, QuantizedTensor]:
    """The trained codes by name; the model is left an ordinary one with the values of the codes.

    Raises ValueError for a model that ``prepare_qat`` has not prepared.
    """
    quantized: dict[str, QuantizedTensor] = {}
    for name, linear in list(block_linears(model)):
        if not parametrize.is_parametrized(linear, "weight"):
            continue
        parametrizations: Any = linear.parametrizations
        held = parametrizations["weight"]
        quantized[name] = held[0].quantized(held.original)
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        linear.weight.copy_(quantized[name].dequantize())
    if not quantized:
        raise ValueError("model: expected one that prepare_qat has prepared, got one without rounded weights")
    return quantized
