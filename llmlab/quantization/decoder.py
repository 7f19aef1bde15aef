"""Blocks of our decoder that call their projections, so that a projection may compute as it likes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmlab.model import Attention, Layer, Transformer
from llmlab.quantization.places import Places


class QuantizedLayer(Layer):
    """A block whose projections are modules of any kind; the plain one reads their weights and lets kernels multiply."""

    @classmethod
    def of(cls, layer: Layer) -> QuantizedLayer:
        """The block with the same parts; nothing is copied."""
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in nn.Module().__dict__})
        for name, parameter in layer._parameters.items():
            block.register_parameter(name, parameter)
        for name, module in layer._modules.items():
            block.add_module(name, module)
        return block.train(layer.training)

    def forward(self, stream: Tensor, attention: Attention, cos_sin: Tensor, ops: Any) -> None:
        """Add to the stream [T, D] in place: stream += attention(norm(stream)), then stream += mlp(norm(stream))."""
        qkv = self.qkv(ops.rms_norm(stream, self.input_norm, self.eps))
        stream += self.output(attention(self, qkv, cos_sin))
        gate_up = self.gate_up(ops.rms_norm(stream, self.mlp_norm, self.eps))
        stream += self.down(ops.silu_and_mul(gate_up))


def call_projections(model: nn.Module, places: Places) -> None:
    """Put a QuantizedLayer in the place of each plain block of our Transformer; other models are left alone."""
    if isinstance(model, Transformer):
        for block in list(model.layers):
            if type(block) is Layer:
                places.put(block, QuantizedLayer.of(block))
