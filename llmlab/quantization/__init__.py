"""Numbers of few bits: formats, the solvers that choose codes, and the layers and models that hold them.

Names are loaded when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.quantization.awq import awq_scales
    from llmlab.quantization.clipping import clipped_grid
    from llmlab.quantization.fake import FakeQuantizedWeight, fake_quantize, finish_qat, prepare_qat
    from llmlab.quantization.fp8 import quantize_fp8, to_fp8
    from llmlab.quantization.gptq import gptq_quantize
    from llmlab.quantization.half_quadratic import quantize_half_quadratic
    from llmlab.quantization.integer import Grid, grid, quantize_absmax, quantize_groups, quantize_zero_point, round_to
    from llmlab.quantization.linear import Float8Linear, Int8Linear, QuantizedLinear
    from llmlab.quantization.models import METHODS, hold_quantized, model_bytes, quantize_model
    from llmlab.quantization.nf4 import CodebookTensor, dequantize_fp4, dequantize_nf4, quantize_fp4, quantize_nf4
    from llmlab.quantization.outliers import int8_product, llm_int8_product, outlier_columns
    from llmlab.quantization.packing import pack_bits, unpack_bits
    from llmlab.quantization.qlora import LoRALinear, add_lora, merge_lora
    from llmlab.quantization.saving import load_quantized, save_quantized
    from llmlab.quantization.smooth import smooth_scales
    from llmlab.quantization.tensor import Quantized, QuantizedTensor, Scheme, dequantize

_HOMES = {
    name: home
    for home, names in {
        "awq": ["awq_scales"],
        "clipping": ["clipped_grid"],
        "fake": ["FakeQuantizedWeight", "fake_quantize", "finish_qat", "prepare_qat"],
        "fp8": ["quantize_fp8", "to_fp8"],
        "gptq": ["gptq_quantize"],
        "half_quadratic": ["quantize_half_quadratic"],
        "integer": ["Grid", "grid", "quantize_absmax", "quantize_groups", "quantize_zero_point", "round_to"],
        "linear": ["Float8Linear", "Int8Linear", "QuantizedLinear"],
        "models": ["METHODS", "hold_quantized", "model_bytes", "quantize_model"],
        "nf4": ["CodebookTensor", "dequantize_fp4", "dequantize_nf4", "quantize_fp4", "quantize_nf4"],
        "outliers": ["int8_product", "llm_int8_product", "outlier_columns"],
        "packing": ["pack_bits", "unpack_bits"],
        "qlora": ["LoRALinear", "add_lora", "merge_lora"],
        "saving": ["load_quantized", "save_quantized"],
        "smooth": ["smooth_scales"],
        "tensor": ["Quantized", "QuantizedTensor", "Scheme", "dequantize"],
    }.items()
    for name in names
}
__all__ = [
    "METHODS", "CodebookTensor", "FakeQuantizedWeight", "Float8Linear", "Grid", "Int8Linear", "LoRALinear",
    "Quantized", "QuantizedLinear", "QuantizedTensor", "Scheme", "add_lora", "awq_scales", "clipped_grid",
    "dequantize", "dequantize_fp4", "dequantize_nf4", "fake_quantize", "finish_qat", "gptq_quantize", "grid",
    "hold_quantized", "int8_product", "llm_int8_product", "load_quantized", "merge_lora", "model_bytes",
    "outlier_columns", "pack_bits", "prepare_qat", "quantize_absmax", "quantize_fp4", "quantize_fp8",
    "quantize_groups", "quantize_half_quadratic", "quantize_model", "quantize_nf4", "quantize_zero_point", "round_to", "save_quantized",
    "smooth_scales", "to_fp8", "unpack_bits",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
