"""The kernels of an inference step in Triton, under the names of their twins in `llmlab.kernels.reference`."""

from llmlab.kernels.activation import silu_and_mul
from llmlab.kernels.attention import chunk_attention, decode_attention, decode_scratch, queries_per_tile, step_attention
from llmlab.kernels.inputs import gather_inputs, give_tokens, take_words
from llmlab.kernels.linear import add_linear, norm_linear, norm_swiglu
from llmlab.kernels.norm import rms_norm
from llmlab.kernels.rotary import rotate_and_store
from llmlab.kernels.rounding import round_columns
from llmlab.kernels.sampling import argmax, gumbel_argmax

__all__ = [
    "add_linear",
    "argmax",
    "chunk_attention",
    "decode_attention",
    "decode_scratch",
    "gather_inputs",
    "give_tokens",
    "gumbel_argmax",
    "norm_linear",
    "norm_swiglu",
    "queries_per_tile",
    "rms_norm",
    "rotate_and_store",
    "round_columns",
    "silu_and_mul",
    "step_attention",
    "take_words",
]
