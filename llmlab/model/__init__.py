"""A readable decoder with the weights of real checkpoints."""

from llmlab.model.transformer import Attention, Layer, Transformer

__all__ = ["Attention", "Layer", "Transformer"]
