"""Products with quantized matrices by other libraries, each as its documents say.

For each library a function that takes copies of a matrix and gives products by name: of x and of a copy's number.
"""

from collections.abc import Callable

import torch

Product = Callable[[torch.Tensor, int], torch.Tensor]
Copies = list[torch.Tensor]


def bitsandbytes_few(full: Copies, group: int) -> dict[str, Product]:
    """NF4 in blocks of 64, sizes not quantized again: its faster way."""
    import bitsandbytes
    from bitsandbytes import functional

    made = [functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False) for w in full]
    return {"bitsandbytes NF4": lambda x, n: bitsandbytes.matmul_4bit(x, made[n][0].t(), quant_state=made[n][1])}


def torchao_few(full: Copies, group: int) -> dict[str, Product]:
    """Tile-packed int4, which goes to the kernel of tinygemm."""
    from torch import nn
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    config = Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    layers = []
    for w in full:
        layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(w, requires_grad=False)
        quantize_(layer, config)
        layers.append(layer)
    return {"torchao int4, tile-packed": lambda x, n: layers[n](x)}


def gemlite_few(full: Copies, group: int) -> dict[str, Product]:
    """Its 4-bit product, tuned on first use."""
    from gemlite.helper import A16W4_HQQ_INT

    processor = A16W4_HQQ_INT(device="cuda:0", dtype=torch.bfloat16)
    layers = []
    for w in full:
        scales = w.view(-1, group).float().abs().amax(1, keepdim=True).clamp(min=1e-6) / 7
        codes = (w.view(-1, group) / scales + 8).round().clamp(0, 15).to(torch.uint8).view(w.shape)
        scales = scales.bfloat16()
        layers.append(processor.from_weights(codes, scales, torch.full_like(scales, 8)))
    return {"gemlite int4": lambda x, n: layers[n](x)}


def gemlite_many(full: Copies) -> dict[str, Product]:
    """Its 8-bit products with rows of x quantized on the way in."""
    from gemlite.helper import A8W8_fp8_dynamic, A8W8_int8_dynamic

    products: dict[str, Product] = {}
    for name, kind in (("gemlite int8", A8W8_int8_dynamic), ("gemlite FP8 by rows", A8W8_fp8_dynamic)):
        processor = kind(device="cuda:0", dtype=torch.bfloat16)
        layers = [processor.from_weights(w) for w in full]
        products[name] = lambda x, n, layers=layers: layers[n](x)
    return products


def bitsandbytes_many(full: Copies) -> dict[str, Product]:
    """LLM.int8() without outliers: the threshold of 0 leaves no column out."""
    from bitsandbytes import functional

    made = [functional.int8_vectorwise_quant(w.half())[:2] for w in full]

    def product(x: torch.Tensor, n: int) -> torch.Tensor:
        codes, scales, _ = functional.int8_vectorwise_quant(x.half())
        total = functional.int8_linear_matmul(codes, made[n][0])
        return functional.int8_mm_dequant(total, scales, made[n][1])

    return {"bitsandbytes int8": product}


PEERS_FEW: dict[str, Callable[[Copies, int], dict[str, Product]]] = {
    "bitsandbytes": bitsandbytes_few,
    "torchao": torchao_few,
    "gemlite": gemlite_few,
}
PEERS_MANY: dict[str, Callable[[Copies], dict[str, Product]]] = {
    "bitsandbytes": bitsandbytes_many,
    "gemlite": gemlite_many,
}
