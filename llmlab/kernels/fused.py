"""The kernels of an inference step in Triton, under the names of their twins in `llmlab.kernels.reference`."""

from llmlab.kernels.activation import silu_and_mul
from llmlab.kernels.attention import chunk_attention, decode_attention, decode_scratch, queries_per_tile, step_attention
from llmlab.kernels.inputs import gather_inputs, give_tokens, take_words
from llmlab.kernels.int4 import dequantize_int4, int4_counters, int4_linear
from llmlab.kernels.linear import add_linear, norm_linear, norm_swiglu
from llmlab.kernels.nf4 import dequantize_nf4, nf4_linear
from llmlab.kernels.norm import rms_norm
from llmlab.kernels.rotary import rotate_and_store
from llmlab.kernels.rounding import round_columns
from llmlab.kernels.rowwise import fp8_linear, int8_linear, quantize_rows, scaled_product
from llmlab.kernels.sampling import argmax, gumbel_argmax

__all__ = [
    "add_linear",
    "argmax",
    "chunk_attention",
    "decode_attention",
    "decode_scratch",
    "dequantize_int4",
    "dequantize_nf4",
    "fp8_linear",
    "gather_inputs",
    "give_tokens",
    "gumbel_argmax",
    "int4_counters",
    "int4_linear",
    "int8_linear",
    "nf4_linear",
    "norm_linear",
    "norm_swiglu",
    "quantize_rows",
    "queries_per_tile",
    "rms_norm",
    "rotate_and_store",
    "round_columns",
    "scaled_product",
    "silu_and_mul",
    "step_attention",
    "take_words",
]
