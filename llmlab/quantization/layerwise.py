"""Quantize a model's linear layers block by block: each solver sees what the blocks before it have become."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmlab.arguments import checked, integer, number, one_of
from llmlab.calibration import LayerStatistics, decoder_blocks, visit_blocks
from llmlab.quantization.awq import search_scales
from llmlab.quantization.clipping import clipped_grid
from llmlab.quantization.folding import check_foldable, fold, folds, head_size
from llmlab.quantization.gptq import gptq_quantize
from llmlab.quantization.half_quadratic import quantize_half_quadratic
from llmlab.quantization.integer import BITS, grid, quantize_groups, round_to
from llmlab.quantization.smooth import smooth_scales
from llmlab.quantization.tensor import QuantizedTensor

METHODS = ("round", "half_quadratic", "gptq", "awq", "awq+gptq")


@checked(method=one_of(METHODS), bits=one_of(BITS), group_size=integer(at_least=1), batch_size=integer(at_least=1))
def quantize_layers(
    model: nn.Module,
    method: str,
    bits: int = 4,
    group_size: int = 64,
    token_ids: Tensor | None = None,
    *,
    symmetric: bool = True,
    clip: bool = True,
    batch_size: int = 4,
) -> dict[str, QuantizedTensor]:
    """Quantized weights of all linear layers in a decoder's blocks, by name; the model is left with their values.

    method: "round" and "half_quadratic" look at the weights alone; "gptq" and "awq" at what ``token_ids`` [windows, S]
    make of the inputs; "awq+gptq" rounds by GPTQ what AWQ has scaled. AWQ folds its scales into norms, v and up, in
    place. clip: whether the two find clipped grids for their groups. symmetric: without zero points; half_quadratic always has a float minimum.
    Raises ValueError where a method lacks its text, and for a model that AWQ's scales cannot be folded into.
    """
    quantized: dict[str, QuantizedTensor] = {}
    if method in ("round", "half_quadratic"):
        for name, linear in block_linears(model):
            weight = linear.weight.detach()
            quantized[name] = (
                quantize_half_quadratic(weight, bits, group_size)
                if method == "half_quadratic"
                else quantize_groups(weight, bits, group_size, symmetric)
            )
            with torch.no_grad():
                linear.weight.copy_(quantized[name].dequantize())
        return quantized
    if token_ids is None:
        raise ValueError(f"token_ids: method {method!r} needs calibration text, got None")
    if "awq" in method:
        check_foldable(model)

    def visit(block_name: str, block: nn.Module, statistics: dict[str, LayerStatistics]) -> None:
        if "awq" in method:
            scale_block(block, statistics, head_size(model), bits, group_size, symmetric)
        for name, seen in statistics.items():
            weight = block.get_parameter(f"{name}.weight")
            H = seen.hessian
            if clip:
                found = clipped_grid(weight, H, bits, group_size, symmetric)
            else:
                found = grid(weight, bits, group_size, symmetric)
            if "gptq" in method:
                q = gptq_quantize(weight, H, bits, group_size, symmetric, found=found)
            else:
                q = found.tensor(round_to(weight, found), weight.dtype)
            weight.copy_(q.dequantize())
            quantized[f"{block_name}.{name}"] = q

    visit_blocks(model, token_ids, visit, batch_size)
    return quantized


@torch.no_grad()
def scale_block(
    block: nn.Module, statistics: dict[str, LayerStatistics], d: int, bits: int, group_size: int, symmetric: bool
) -> None:
    """Fold AWQ's scales into a block, in place; statistics become those of the scaled inputs. d: channels of a head."""
    for where in folds(block, d):
        seen = statistics[where.consumers[0]]
        weight = torch.cat([block.get_parameter(f"{name}.weight") for name in where.consumers])
        scales = search_scales(weight, where.shared(seen.mean_abs), seen.hessian, bits, group_size, symmetric)
        fold(block, where, where.shared(scales), statistics)  # a power of equal numbers can differ in its last bit


@checked(alpha=number(at_least=0, at_most=1), batch_size=integer(at_least=1))
def smooth_model(model: nn.Module, token_ids: Tensor, alpha: float = 0.5, batch_size: int = 4) -> None:
    """Fold SmoothQuant's scales into a decoder, in place; its function stays, and its activations lose their outliers.

    s = max|x|^α / max|w|^(1-α) for each norm and the layers that read it, and for the inputs of the output and down
    projections. token_ids: calibration text [windows, S]. Raises ValueError for a model of unknown parts.
    """
    check_foldable(model)

    def visit(_: str, block: nn.Module, statistics: dict[str, LayerStatistics]) -> None:
        for where in folds(block, head_size(model)):
            weight = torch.cat([block.get_parameter(f"{name}.weight") for name in where.consumers])
            scales = smooth_scales(statistics[where.consumers[0]].absmax, weight, alpha)
            fold(block, where, where.shared(scales), statistics)

    visit_blocks(model, token_ids, visit, batch_size)


def block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a decoder's blocks and their names in the model; embeddings and head are not among them."""
    for block_name, block in decoder_blocks(model):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                yield f"{block_name}.{name}", module
