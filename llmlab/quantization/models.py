"""Whole models with quantized linear layers: made, saved and loaded.

A method says how one layer becomes another; all else (which layers, calibration, putting them in place, undoing that where
something fails) is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmlab.arguments import checked, instance_of, integer, one_of
from llmlab.model import Layer, Transformer
from llmlab.quantization.decoder import QuantizedLayer
from llmlab.quantization.fp8 import quantize_fp8
from llmlab.quantization.integer import quantize_absmax, quantize_groups, quantize_zero_point
from llmlab.quantization.linear import Float8Linear, QuantizedLinear, int8_linear
from llmlab.quantization.nf4 import quantize_fp4, quantize_nf4
from llmlab.quantization.tensor import Quantized


@dataclass(frozen=True)
class Settings:
    """What a method is told beside the layer.

    bits, group_size: of a code and of a scale (of a block, for NF4 and FP4). symmetric, float_minimum: as for ``grid``.
    double_quantization: as for ``quantize_nf4``. threshold: as for ``llm_int8_product``.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = True
    float_minimum: bool = False
    double_quantization: bool = True
    threshold: float = 6.0


@dataclass(frozen=True)
class Method:
    """How a linear layer becomes a quantized one.

    make: of the layer, the settings, and the statistics of its inputs (None where not calibrated). bits: what may be
    asked for, its first where nothing is. calibrated: whether statistics are gathered.
    """

    make: Callable[[nn.Linear, Settings, Any], nn.Module]
    bits: tuple[int, ...]
    calibrated: bool = False


def _weights(quantize: Callable[[Tensor, Settings], Quantized], *bits: int) -> Method:
    """A method that rounds the weight and leaves the inputs."""
    return Method(lambda linear, s, _: QuantizedLinear(quantize(linear.weight.detach(), s), linear.bias), bits)


ALL_BITS = (8, 7, 6, 5, 4, 3, 2)
GROUP_BITS = (4, 8, 7, 6, 5, 3, 2)
METHODS: dict[str, Method] = {
    "absmax": _weights(lambda w, s: quantize_absmax(w, s.bits, "channel"), *ALL_BITS),
    "zero_point": _weights(lambda w, s: quantize_zero_point(w, s.bits, "channel"), *ALL_BITS),
    "round": _weights(
        lambda w, s: quantize_groups(w, s.bits, s.group_size, s.symmetric, s.float_minimum), *GROUP_BITS
    ),
    "nf4": _weights(lambda w, s: quantize_nf4(w, s.group_size, s.double_quantization), 4),
    "fp4": _weights(lambda w, s: quantize_fp4(w, s.group_size, s.double_quantization), 4),
    "fp8": Method(
        lambda linear, s, _: Float8Linear(quantize_fp8(linear.weight.detach(), "e4m3", "row"), linear.bias), (8,)
    ),
    "int8": Method(lambda linear, s, _: int8_linear(linear), (8,)),
    "llm.int8": Method(lambda linear, s, _: int8_linear(linear, s.threshold), (8,)),
}


@checked(model=instance_of(nn.Module), method=one_of(METHODS), group_size=integer(at_least=1))
@torch.no_grad()
def quantize_model(
    model: nn.Module,
    method: str,
    bits: int | None = None,
    group_size: int = 64,
    calibration: Tensor | None = None,
    *,
    head: bool = False,
    **options: Any,
) -> nn.Module:
    """Put a quantized layer in the place of each linear layer of a model, in place; returns the model.

    model: of transformers, our Transformer, or any module with linear layers, pruned ones too. method: one of METHODS:
    "absmax", "zero_point" (a scale for each row), "round" (groups, to the nearest), "nf4", "fp4", "fp8", "int8", "llm.int8" and
    those that need calibration: token ids [windows, S]. bits: None for the method's own. head: quantize the output head too,
    which otherwise stays as it is, like embeddings and norms; a tied head gets codes of its own and the embedding stays.
    options: the other fields of ``Settings``.
    Raises ValueError for methods, bits, calibration and models that do not fit, TypeError for unknown options; and whatever
    a layer's weights raise, with the layer's name. The model is then as it was.
    """
    chosen = METHODS[method]
    if bits is not None and bits not in chosen.bits:
        raise ValueError(f"bits: expected one of {', '.join(map(str, chosen.bits))} for {method!r}, got {bits!r}")
    if chosen.calibrated != (calibration is not None):
        wanted = "token ids [windows, S]" if chosen.calibrated else f"None for {method!r}, which needs no calibration"
        raise ValueError(f"calibration: expected {wanted}, got {type(calibration).__name__}")
    settings = replace(Settings(chosen.bits[0] if bits is None else bits, group_size), **options)
    layers = linear_layers(model, head)
    if not layers:
        raise ValueError(f"model: expected linear layers to quantize, got {type(model).__name__} without any")
    places = _Places(model)
    try:
        if chosen.calibrated:
            assert calibration is not None
            _calibrated(model, chosen, settings, layers, calibration, places)
        else:
            for name, linear in layers.items():
                places.put(linear, _made(chosen, name, linear, settings, None))
        if isinstance(model, Transformer):
            for block in [block for block in model.layers if type(block) is Layer]:
                assert isinstance(block, Layer)
                places.put(block, QuantizedLayer.of(block))
    except BaseException:
        places.restore()
        raise
    return model


def linear_layers(model: nn.Module, head: bool = False) -> dict[str, nn.Linear]:
    """The linear layers of a model that are quantized, by name; each once."""
    found = output_head(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (head or module is not found)
    }


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits: our Transformer's, or what a model of transformers names; None where there is none."""
    if isinstance(model, Transformer):
        return model.head
    named = getattr(model, "get_output_embeddings", None)
    found = named() if callable(named) else None
    return found if isinstance(found, nn.Module) else None


def model_bytes(model: nn.Module) -> int:
    """Bytes of all that a model stores, its tied tensors once: parameters and persistent buffers, codes packed."""
    storages = {(t.data_ptr(), t.shape, t.dtype): t.numel() * t.element_size() for t in model.state_dict().values()}
    return sum(storages.values())


def _made(method: Method, name: str, linear: nn.Linear, settings: Settings, statistics: Any) -> nn.Module:
    try:
        return method.make(linear, settings, statistics).train(linear.training)
    except (ValueError, TypeError) as error:
        raise type(error)(f"model: layer {name!r}: {error}") from error


class _Places:
    """Modules put in the place of others, everywhere that a model holds them, and back again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.changed: list[tuple[nn.Module, str, nn.Module]] = []

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Hang ``new`` wherever the model holds ``old``."""
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if child is old:
                    self.changed.append((parent, name, old))
                    setattr(parent, name, new)

    def restore(self) -> None:
        """Undo every change, the last first."""
        for parent, name, old in reversed(self.changed):
            setattr(parent, name, old)
