"""Whole models with quantized linear layers.

A method says how one layer becomes another; all else (which layers, calibration, putting them in place, undoing that where
something fails) is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from llmlab.arguments import checked, instance_of, integer, one_of
from llmlab.model import Transformer
from llmlab.quantization.decoder import call_projections
from llmlab.quantization.fp8 import quantize_fp8
from llmlab.quantization.half_quadratic import quantize_half_quadratic
from llmlab.quantization.integer import quantize_absmax, quantize_groups, quantize_zero_point
from llmlab.quantization.layerwise import quantize_layers, smooth_model
from llmlab.quantization.linear import Float8Linear, QuantizedLinear, int8_linear
from llmlab.quantization.nf4 import quantize_fp4, quantize_nf4
from llmlab.quantization.places import Places
from llmlab.quantization.tensor import Quantized


@dataclass(frozen=True)
class Settings:
    """What a method is told beside the layer.

    bits, group_size: of a code and of a scale (of a block, for NF4 and FP4). symmetric, float_minimum: as for ``grid``.
    double_quantization: as for ``quantize_nf4``. threshold: as for ``llm_int8_product``. alpha: as for ``smooth_scales``.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = True
    float_minimum: bool = False
    double_quantization: bool = True
    threshold: float = 6.0
    alpha: float = 0.5
    clip: bool = True
    scale_dtype: torch.dtype = torch.float16


@dataclass(frozen=True)
class Method:
    """How linear layers become quantized ones.

    make: a quantized layer of a linear one. bits: what may be asked for, the first where nothing is. solve: for methods
    that look at a calibration text: change the model's weights as the method needs, and give the quantized weights that
    it chose, by layer; the rest is made by ``make``.
    """

    make: Callable[[nn.Linear, Settings], nn.Module]
    bits: tuple[int, ...]
    solve: Callable[[nn.Module, Settings, Tensor], Mapping[str, Quantized]] | None = None


def _weights(quantize: Callable[[Tensor, Settings], Quantized]) -> Callable[[nn.Linear, Settings], nn.Module]:
    """A layer whose weight is rounded, and whose inputs are left."""
    return lambda linear, settings: QuantizedLinear(quantize(linear.weight.detach(), settings), linear.bias)


def _solver(name: str) -> Callable[[nn.Module, Settings, Tensor], Mapping[str, Quantized]]:
    return lambda model, s, token_ids: quantize_layers(
        model, name, s.bits, s.group_size, token_ids, symmetric=s.symmetric, clip=s.clip
    )


def _smooth(model: nn.Module, settings: Settings, token_ids: Tensor) -> Mapping[str, Quantized]:
    smooth_model(model, token_ids, settings.alpha)
    return {}


_round = _weights(lambda w, s: quantize_groups(w, s.bits, s.group_size, s.symmetric, s.float_minimum, s.scale_dtype))
_BY_CHANNEL = (8, 7, 6, 5, 4, 3, 2)
_BY_GROUP = (4, 8, 7, 6, 5, 3, 2)
METHODS: dict[str, Method] = {
    "absmax": Method(_weights(lambda w, s: quantize_absmax(w, s.bits, "channel")), _BY_CHANNEL),
    "zero_point": Method(_weights(lambda w, s: quantize_zero_point(w, s.bits, "channel")), _BY_CHANNEL),
    "round": Method(_round, _BY_GROUP),
    "half_quadratic": Method(_weights(lambda w, s: quantize_half_quadratic(w, s.bits, s.group_size)), _BY_GROUP),
    "nf4": Method(_weights(lambda w, s: quantize_nf4(w, s.group_size, s.double_quantization)), (4,)),
    "fp4": Method(_weights(lambda w, s: quantize_fp4(w, s.group_size, s.double_quantization)), (4,)),
    "fp8": Method(lambda linear, _: Float8Linear(quantize_fp8(linear.weight, "e4m3", "row"), linear.bias), (8,)),
    "int8": Method(lambda linear, _: int8_linear(linear), (8,)),
    "llm.int8": Method(lambda linear, s: int8_linear(linear, s.threshold), (8,)),
    "smooth": Method(lambda linear, _: int8_linear(linear), (8,), _smooth),
    "gptq": Method(_round, _BY_GROUP, _solver("gptq")),
    "awq": Method(_round, _BY_GROUP, _solver("awq")),
    "awq+gptq": Method(_round, _BY_GROUP, _solver("awq+gptq")),
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

    model: of transformers, our Transformer, or any module that holds linear layers, pruned ones too. method: a name in
    METHODS: "absmax", "zero_point" (a scale for each row); "round", "half_quadratic" (for each group); "nf4", "fp4" (for
    each block); "fp8", "int8", "llm.int8" (inputs are rounded too); and with calibration, token ids [windows, S], "smooth",
    "gptq", "awq", "awq+gptq". bits: None for the method's own. head: quantize the output head too, which otherwise stays
    as it is, like embeddings and norms; a tied head then gets codes of its own and the embedding stays.
    options: the other fields of ``Settings``.
    Raises ValueError for methods, bits, calibration and models that do not fit, TypeError for unknown options, and with a
    layer's name whatever its weights raise. The model is then as it was, for which its weights are kept to the end.
    """
    chosen = METHODS[method]
    if bits is not None and bits not in chosen.bits:
        raise ValueError(f"bits: expected one of {', '.join(map(str, chosen.bits))} for {method!r}, got {bits!r}")
    if (chosen.solve is not None) != isinstance(calibration, Tensor):
        wanted = "None, since nothing is calibrated," if chosen.solve is None else "token ids [windows, S]"
        raise ValueError(f"calibration: expected {wanted} for {method!r}, got {type(calibration).__name__}")
    unknown = set(options) - {field.name for field in fields(Settings)}
    if unknown:
        raise TypeError(f"options: expected fields of Settings, got {sorted(unknown)}")
    settings = Settings(chosen.bits[0] if bits is None else bits, group_size, **options)
    layers = linear_layers(model, head)
    if not layers or model in layers.values():
        raise ValueError(f"model: expected a model that holds linear layers, got {type(model).__name__}")
    places = Places(model, keep_weights=chosen.solve is not None)
    try:
        solved = chosen.solve(model, settings, calibration) if chosen.solve and calibration is not None else {}
        for name, linear in layers.items():
            try:
                new = QuantizedLinear(solved[name], linear.bias) if name in solved else chosen.make(linear, settings)
            except (ValueError, TypeError) as error:
                raise type(error)(f"model: layer {name!r}: {error}") from error
            places.put(linear, new.train(linear.training))
        call_projections(model, places)
    except BaseException:
        places.restore()
        raise
    return model


@torch.no_grad()
def hold_quantized(model: nn.Module, quantized: Mapping[str, Quantized]) -> nn.Module:
    """Put layers that hold these quantized weights in the place of linear layers, in place; returns the model.

    quantized: by the layer's name, as ``finish_qat`` and ``quantize_layers`` give them. Raises ValueError for a name of no
    linear layer and for a weight of another shape; the model is then as it was.
    """
    layers = linear_layers(model, head=True)
    for name, q in quantized.items():
        if name not in layers:
            raise ValueError(f"quantized: expected names of linear layers, got {name!r}")
        if q.shape != layers[name].weight.shape:
            raise ValueError(f"quantized: expected {list(layers[name].weight.shape)} for {name!r}, got {list(q.shape)}")
    places = Places(model)
    for name, q in quantized.items():
        places.put(layers[name], QuantizedLinear(q, layers[name].bias).train(layers[name].training))
    call_projections(model, places)
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
