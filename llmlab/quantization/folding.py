"""Fold the scales of a layer's inputs into what produces them, so that they cost nothing when the model runs.

(x / s) (W s)ᵀ = x Wᵀ:     a norm's weight is divided by s, or the rows of the linear layer whose outputs the inputs
                           are multiples or mixtures of: v's for the output projection, up's for the down projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmlab.calibration import LayerStatistics
from llmlab.model import Layer

FOLDABLE = ("llama", "mistral", "qwen2", "qwen3")  # transformers' model types whose blocks have these parts


@dataclass(frozen=True)
class Fold:
    """Linear layers that read one input, and the rows of what produces it.

    consumers: names in the block. producers: parameters in the block, of each its name and the row that makes each
    input channel [columns]; several channels may come from one row.
    """

    consumers: tuple[str, ...]
    producers: tuple[tuple[str, Tensor], ...]

    def shared(self, mean_abs: Tensor) -> Tensor:
        """Statistics [columns] of which channels that come from one row get their mean."""
        row = self.producers[0][1].to(mean_abs.device)
        total = torch.zeros(int(row.max()) + 1, dtype=mean_abs.dtype, device=mean_abs.device)
        return total.index_add(0, row, mean_abs)[row] / total.index_add(0, row, torch.ones_like(mean_abs))[row]


def head_size(model: nn.Module) -> int:
    """Channels of a head, read from the model's configuration."""
    config: Any = model.config
    size = getattr(config, "head_size", None) or getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def check_foldable(model: nn.Module) -> None:
    """Raises ValueError for a model whose blocks have other parts than those known here."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "architecture", None) or getattr(config, "model_type", None)
    if kind not in FOLDABLE:
        raise ValueError(f"model: scales can be folded into {', '.join(FOLDABLE)}, got {kind or type(model).__name__}")


def folds(block: nn.Module, d: int) -> Iterator[Fold]:
    """The four places of a Llama block where scales can be folded; d: channels of a head."""
    modules = dict(block.named_modules())
    if isinstance(block, Layer):
        attention_in, mlp_in = ["qkv"], ["gate_up"]
        attention_out, mlp_out = "output", "down"
        norms = ("input_norm", "mlp_norm")
        value, up = "qkv", "gate_up"
        kv_width = (block.qkv.out_features - block.output.in_features) // 2
        value_row, up_row = block.qkv.out_features - kv_width, block.down.in_features
    else:
        attention_in, mlp_in = [f"self_attn.{x}_proj" for x in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]
        attention_out, mlp_out = "self_attn.o_proj", "mlp.down_proj"
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        value, up = "self_attn.v_proj", "mlp.up_proj"
        kv_width = modules[value].out_features
        value_row = up_row = 0
    width, channels = modules[attention_in[0]].in_features, modules[attention_out].in_features
    head, inside = torch.arange(channels) // d, torch.arange(channels) % d
    kv_head = head // (channels // kv_width)  # query heads that share a value head share its scales
    hidden = torch.arange(modules[mlp_out].in_features)
    yield Fold(tuple(attention_in), ((norms[0], torch.arange(width)),))
    yield Fold((attention_out,), _rows_of(modules[value], value, value_row + kv_head * d + inside))
    yield Fold(tuple(mlp_in), ((norms[1], torch.arange(width)),))
    yield Fold((mlp_out,), _rows_of(modules[up], up, up_row + hidden))


def _rows_of(linear: nn.Linear, name: str, rows: Tensor) -> tuple[tuple[str, Tensor], ...]:
    parts = ("weight", "bias") if linear.bias is not None else ("weight",)
    return tuple((f"{name}.{part}", rows) for part in parts)


@torch.no_grad()
def fold(block: nn.Module, where: Fold, scales: Tensor, statistics: dict[str, LayerStatistics] | None = None) -> None:
    """Multiply the consumers' columns by s and divide the producers' rows by it, in place: the block's function stays.

    scales: s [columns], positive, equal for channels that come from one row. statistics: of the consumers' inputs by
    name, replaced by those of the divided inputs. Raises ValueError for other scales; nothing has changed then.
    """
    if not bool((scales > 0).all() and torch.isfinite(scales).all()):
        raise ValueError("scales: expected positive, finite scales")
    for name, rows in where.producers:
        parameter = block.get_parameter(name)
        by_row = torch.ones(len(parameter), dtype=scales.dtype, device=scales.device)
        by_row[rows] = scales
        if not torch.equal(by_row[rows], scales):
            raise ValueError(f"scales: expected one scale for all channels that come from one row of {name}")
        parameter.div_(by_row.view(-1, *[1] * (parameter.dim() - 1)).to(parameter))
    for name in where.consumers:
        weight = block.get_parameter(f"{name}.weight")
        weight.mul_(scales.to(weight))
        if statistics is not None:
            statistics[name] = statistics[name].divided(scales)
