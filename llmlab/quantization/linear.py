"""Linear layers that hold quantized weights, and compute with them.

    QuantizedLinear   Y = X Ŵᵀ + b                 only the weight has few bits; it is dequantized for the product
    Int8Linear        Y = s_x s_w Q(X) Q_wᵀ + b    the inputs are rounded too, token by token (W8A8)
    Float8Linear      the same in FP8

Weights are stored packed; on a GPU the kernels of ``llmlab.kernels`` multiply, where there is one for the format.
``input_scale`` s [in] divides the inputs first, for weights that were multiplied by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmlab.kernels import kernels_for
from llmlab.quantization.fp8 import round_rows
from llmlab.quantization.integer import quantize_absmax
from llmlab.quantization.layout import KernelWeight, kernel_weight, multiply
from llmlab.quantization.nf4 import CodebookTensor
from llmlab.quantization.outliers import llm_int8_product, vector_wise_product
from llmlab.quantization.tensor import FLOAT_FORMATS, Quantized, QuantizedTensor, dtype_name, dtype_named

_TENSORS: dict[str, type[QuantizedTensor] | type[CodebookTensor]] = {
    "scaled": QuantizedTensor,
    "codebook": CodebookTensor,
}


class QuantizedLinear(nn.Module):
    """Y = (X / s) Ŵᵀ + b: a weight of few bits, dequantized where it is used.

    X [..., in] and Y [..., out] in any floating dtype. The weight's parts are buffers, which follow the module to a device
    but never to another dtype.
    """

    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(self, quantized: Quantized, bias: Tensor | None = None, input_scale: Tensor | None = None) -> None:
        """quantized: of a weight [out, in], in any format. bias: [out]. input_scale: s [in], positive.

        Raises TypeError for what is not quantized, ValueError for shapes that do not fit.
        """
        super().__init__()
        if not isinstance(quantized, Quantized):
            raise TypeError(f"quantized: expected a quantized tensor, got {type(quantized).__name__}")
        if len(quantized.shape) != 2:
            raise ValueError(f"quantized: expected a weight [out, in], got the shape {tuple(quantized.shape)}")
        self.out_features, self.in_features = quantized.shape
        for name, tensor, length in (("bias", bias, self.out_features), ("input_scale", input_scale, self.in_features)):
            if tensor is not None and tensor.shape != (length,):
                raise ValueError(f"{name}: expected the shape ({length},), got {tuple(tensor.shape)}")
        self.dtype = quantized.dtype
        self.tensor_description = quantized.description()
        self.parts = tuple(quantized.parts())
        self._laid_out: tuple[tuple[int, int], KernelWeight | None] | None = None
        for name, part in quantized.parts().items():
            self.register_buffer(name, part.detach())
        self.register_buffer("input_scale", None if input_scale is None else input_scale.detach().clone())
        self.register_parameter("bias", None)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def quantized(self) -> Quantized:
        """The quantized tensor, unpacked."""
        return read_parts({name: getattr(self, name) for name in self.parts}, self.tensor_description)

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is stored, the bias included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    def dequantize(self) -> Tensor:
        """The weight that the inputs meet, Ŵ / s [out, in], in the module's dtype."""
        weight = self.quantized.dequantize()
        return (weight if self.input_scale is None else weight / self.input_scale).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """``dequantize()``, under the name that a linear layer has for it."""
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        x = self._scaled(x)
        if x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad):  # the kernels have no backward
            weight = self._kernel_weight()
            if weight is not None:
                return multiply(x, weight, self.bias)
        return F.linear(x, self.quantized.dequantize().to(x.dtype), self.bias)

    def _kernel_weight(self) -> KernelWeight | None:
        """The weight as a kernel reads it, laid out where the codes are new; for int4 that is a second copy of them."""
        codes = getattr(self, self.parts[0])
        key = (codes.data_ptr(), codes._version)
        if self._laid_out is None or self._laid_out[0] != key:
            self._laid_out = (key, kernel_weight(self.quantized))
        return self._laid_out[1]

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.input_scale is None else x / self.input_scale.to(x.dtype)

    def description(self) -> dict[str, Any]:
        """What ``read_linear`` needs beside the state to make this module, as plain data."""
        return {"class": type(self).__name__, "tensor": self.tensor_description, "dtype": dtype_name(self.dtype)}

    def extra_repr(self) -> str:
        told = {
            k: v for k, v in self.tensor_description.items() if k not in ("shape", "dtype", "kind") and v is not None
        }
        return f"in_features={self.in_features}, out_features={self.out_features}, {told}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        kept = {name: getattr(self, name) for name in (*self.parts, "input_scale") if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        self._laid_out = None
        for name, tensor in kept.items():  # a scale in fewer bits would be another weight
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class Int8Linear(QuantizedLinear):
    """Y = s_x s_w Q(X / s) Q_wᵀ + b in int8, each token's inputs rounded on the way in (W8A8).

    threshold: columns with |x| at least so large stay in floating point, LLM.int8(); None rounds all of them.
    """

    def __init__(
        self,
        quantized: Quantized,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        threshold: float | None = None,
    ) -> None:
        """quantized: int8 by "channel". Raises TypeError and ValueError for another format."""
        super().__init__(quantized, bias, input_scale)
        told = self.tensor_description
        if (told["kind"], told.get("format"), told.get("bits"), told.get("symmetric")) != ("scaled", "int", 8, True):
            raise ValueError(f"quantized: expected symmetric int8, got {told}")
        if told["granularity"] != "channel":
            raise ValueError(f"quantized: expected a scale for each channel, got {told['granularity']!r}")
        if threshold is not None and not threshold > 0:
            raise ValueError(f"threshold: expected a positive number or None, got {threshold!r}")
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantized
        assert isinstance(weight, QuantizedTensor)
        rows = self._scaled(x).reshape(-1, self.in_features)
        if self.threshold is None and x.is_cuda and self.in_features % 16 == 0:
            y: Tensor = kernels_for("cuda").int8_linear(rows, weight.codes, weight.scale.flatten(), self.bias)
            return y.view(*x.shape[:-1], self.out_features)
        if self.threshold is None:
            y = vector_wise_product(rows, weight).to(x.dtype)
        else:
            y = llm_int8_product(rows, weight, self.threshold)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)

    def description(self) -> dict[str, Any]:
        return super().description() | {"threshold": self.threshold}


class Float8Linear(QuantizedLinear):
    """Y = (s_x Q(X / s)) (s_w Q_w)ᵀ + b with inputs and weight in FP8, a scale for each row of both."""

    def __init__(self, quantized: Quantized, bias: Tensor | None = None, input_scale: Tensor | None = None) -> None:
        """quantized: FP8 by "row". Raises TypeError and ValueError for another format."""
        super().__init__(quantized, bias, input_scale)
        told = self.tensor_description
        if told.get("format") not in FLOAT_FORMATS or told["granularity"] != "row":
            raise ValueError(f"quantized: expected FP8 with a scale for each row, got {told}")

    def forward(self, x: Tensor) -> Tensor:
        x = self._scaled(x)
        weight = self.quantized
        if x.is_cuda and self.in_features % 16 == 0 and self.tensor_description["format"] == "e4m3":
            assert isinstance(weight, QuantizedTensor)
            rows = x.reshape(-1, self.in_features)
            y: Tensor = kernels_for("cuda").fp8_linear(rows, weight.codes, weight.scale.flatten(), self.bias)
            return y.view(*x.shape[:-1], self.out_features)
        rounded = round_rows(x, self.tensor_description["format"])
        return F.linear(rounded, weight.dequantize().to(x.dtype), self.bias)


_LAYERS: dict[str, type[QuantizedLinear]] = {
    layer.__name__: layer for layer in (QuantizedLinear, Int8Linear, Float8Linear)
}


def read_parts(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> Quantized:
    """The quantized tensor of these parts and this description; raises ValueError for an unknown kind."""
    kind = description.get("kind")
    if kind not in _TENSORS:
        raise ValueError(f"description: expected a kind among {sorted(_TENSORS)}, got {kind!r}")
    return _TENSORS[kind].from_parts(parts, description)


def int8_linear(linear: nn.Linear, threshold: float | None = None, input_scale: Tensor | None = None) -> Int8Linear:
    """A layer in int8 by channel and token; input_scale s: the weight is multiplied by it, the inputs divided."""
    weight = linear.weight.detach() if input_scale is None else linear.weight.detach() * input_scale
    return Int8Linear(quantize_absmax(weight, 8, "channel"), linear.bias, input_scale, threshold)


def read_linear(description: Mapping[str, Any], state: Mapping[str, Tensor]) -> QuantizedLinear:
    """The module of ``description()`` with a ``state_dict()``'s tensors.

    Raises ValueError for an unknown class, KeyError for a part that is missing.
    """
    name = description.get("class")
    if name not in _LAYERS:
        raise ValueError(f"description: expected a class among {sorted(_LAYERS)}, got {name!r}")
    options = {"threshold": description["threshold"]} if name == "Int8Linear" else {}
    quantized = read_parts(state, description["tensor"])
    layer = _LAYERS[name](quantized, state.get("bias"), state.get("input_scale"), **options)
    layer.dtype = dtype_named(description["dtype"])
    return layer
