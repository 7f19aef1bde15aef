"""What a layer's inputs look like on real text, gathered block by block through a model.

Pruning and quantization ask the same of each linear layer: H = Xᵀ X / n, and the mean, the largest and the summed squares
of each input channel. A model is walked from its first block to its last with the inputs of one block held at a time,
and a block is run once more behind the visit, so that later blocks see what the visit made of the earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmlab.arguments import checked, integer, one_of
from llmlab.kernels import reference
from llmlab.model import Layer, Transformer
from llmlab.text import SPLITS, corpus

# What to do with a block: its name, the block, and the statistics of its linear layers by their names in the block.
Visit = Callable[[str, nn.Module, "dict[str, LayerStatistics]"], None]


@dataclass
class LayerStatistics:
    """The inputs X [n, columns] of one linear layer, summed up in fp32."""

    tokens: int  # n
    gram: Tensor  # Xᵀ X [columns, columns]
    sum_abs: Tensor  # Σ |x| [columns]
    absmax: Tensor  # max |x| [columns]

    @classmethod
    def of(cls, x: Tensor) -> LayerStatistics:
        """Statistics of inputs [..., columns]."""
        statistics = cls.empty(x.shape[-1], x.device)
        statistics.add(x)
        return statistics

    @classmethod
    def empty(cls, columns: int, device: torch.device | None = None) -> LayerStatistics:
        zeros = torch.zeros(columns, device=device, dtype=torch.float32)
        return cls(0, torch.zeros(columns, columns, device=device, dtype=torch.float32), zeros, zeros.clone())

    def add(self, x: Tensor) -> None:
        """Take more inputs [..., columns] in.

        Raises ValueError for another number of columns, and for a NaN or an infinity.
        """
        if x.shape[-1] != len(self.absmax):
            raise ValueError(f"x: expected {len(self.absmax)} columns, got {x.shape[-1]}")
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not torch.isfinite(x).all():
            raise ValueError("x: expected finite inputs, got NaN or infinity among them")
        size = x.abs()
        self.tokens += len(x)
        self.gram.addmm_(x.T, x)
        self.sum_abs += size.sum(0)
        if len(x):
            self.absmax = torch.maximum(self.absmax, size.amax(0))

    @property
    def hessian(self) -> Tensor:
        """H = Xᵀ X / n [columns, columns]: half the second derivative of a row's mean squared output error."""
        return self.gram / max(1, self.tokens)

    @property
    def mean_abs(self) -> Tensor:
        """mean |x| of each channel [columns], by which AWQ scales."""
        return self.sum_abs / max(1, self.tokens)

    @property
    def norm(self) -> Tensor:
        """‖x‖₂ of each channel over all tokens [columns], by which Wanda scores."""
        return self.gram.diagonal().sqrt()

    def divided(self, scales: Tensor) -> LayerStatistics:
        """The statistics of X / s for positive scales s [columns]."""
        s = scales.to(self.gram)
        return LayerStatistics(self.tokens, self.gram / s / s[:, None], self.sum_abs / s, self.absmax / s)

    def outliers(self, threshold: float = 6.0) -> Tensor:
        """Channels with an input above the threshold anywhere (Dettmers et al. 2022, LLM.int8())."""
        return torch.nonzero(self.absmax > threshold).flatten()


@checked(split=one_of(SPLITS), windows=integer(at_least=1), length=integer(at_least=2))
def calibration_windows(
    tokenizer: Any, split: str = "calibration", windows: int = 16, length: int = 512, seed: int = 0
) -> Tensor:
    """Token ids [windows, length] from one split of the corpus: windows that do not overlap, drawn without order.

    Raises ValueError where the split is too short for so many.
    """
    token_ids = torch.tensor(tokenizer(corpus(split), verbose=False)["input_ids"])
    whole = len(token_ids) // length
    if windows > whole:
        raise ValueError(f"windows: split {split!r} has {whole} windows of {length} tokens, got {windows}")
    drawn = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:windows]
    return token_ids[: whole * length].view(whole, length)[drawn]


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a decoder in order, with their names: its longest list of modules.

    Raises ValueError for a model without a list of modules.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(f"model: expected a decoder with a list of blocks, got {type(model).__name__} without one")
    name, blocks = max(lists, key=lambda found: len(found[1]))
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


@torch.no_grad()
def visit_blocks(model: nn.Module, token_ids: Tensor, visit: Visit | None = None, batch_size: int = 4) -> Tensor:
    """Walk a decoder's blocks in order, each with the statistics of its linear layers; the last block's output.

    model: a causal language model of transformers, or our Transformer. token_ids: [windows, S]. visit(name, block,
    statistics) may change the block's weights or put other modules in their place. Returns the stream [windows, S, D].
    Beyond the model, memory holds the inputs of one block and the statistics of one block.
    Raises ValueError for token ids that are not a matrix, and for a model without a list of blocks
    or with several kinds of attention.
    """
    if token_ids.dim() != 2 or not token_ids.numel():
        raise ValueError(f"token_ids: expected [windows, S], not empty, got shape {list(token_ids.shape)}")
    walk = _OurBlocks(model) if isinstance(model, Transformer) else _TheirBlocks(model)
    streams = [walk.enter(batch) for batch in token_ids.split(batch_size)]
    for name, block in walk.blocks:
        statistics = {inner: LayerStatistics.empty(w.shape[1], w.device) for inner, w in _weights(block)}
        if visit is not None:
            for stream in streams:
                walk.run(block, stream, statistics)
            visit(name, block, statistics)
        for number, stream in enumerate(streams):
            streams[number] = walk.run(block, stream, None)
    return torch.cat(streams)


def gather_statistics(model: nn.Module, token_ids: Tensor, batch_size: int = 4) -> dict[str, LayerStatistics]:
    """Statistics of every linear layer in the blocks, by its name in the model; a matrix for each is held at once."""
    found: dict[str, LayerStatistics] = {}

    def visit(name: str, block: nn.Module, statistics: dict[str, LayerStatistics]) -> None:
        found.update({f"{name}.{inner}": value for inner, value in statistics.items()})

    visit_blocks(model, token_ids, visit, batch_size)
    return found


def _weights(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module.weight


class _TheirBlocks:
    """The decoder layers of a transformers model, called as the model itself calls them."""

    def __init__(self, model: nn.Module) -> None:
        kinds = set(getattr(getattr(model, "config", None), "layer_types", None) or [])
        if len(kinds) > 1:  # what the first block is given would be wrong for others
            raise ValueError(f"model: expected blocks with one kind of attention, got {', '.join(sorted(kinds))}")
        self.model = model
        self.blocks = decoder_blocks(model)
        self.arguments: dict[int, dict[str, Any]] = {}  # what a block gets beside the stream, by the batch's size

    def enter(self, token_ids: Tensor) -> Tensor:
        """The stream before the first block, which stops the model there."""
        kept: list[Tensor] = []

        def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            kept.append(args[0] if args else kwargs.pop("hidden_states"))
            self.arguments[len(token_ids)] = kwargs
            raise _Stopped

        device = next(self.model.parameters()).device
        hook = self.blocks[0][1].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(token_ids.to(device), use_cache=False)
        except _Stopped:
            pass
        finally:
            hook.remove()
        return kept[0]

    def run(self, block: nn.Module, stream: Tensor, statistics: dict[str, LayerStatistics] | None) -> Tensor:
        hooks = []
        for name, found in (statistics or {}).items():

            def record(_: nn.Module, args: tuple[Any, ...], found: LayerStatistics = found) -> None:
                found.add(args[0])

            hooks.append(block.get_submodule(name).register_forward_pre_hook(record))
        try:
            out = block(stream, **self.arguments[len(stream)])
        finally:
            for hook in hooks:
                hook.remove()
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


class _Stopped(Exception):
    """The first block has been reached."""


class _OurBlocks:
    """The layers of our Transformer, whose kernels take the weights and call no module."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.blocks = decoder_blocks(model)

    def enter(self, token_ids: Tensor) -> Tensor:
        stream: Tensor = self.model.embedding(token_ids.to(self.model.cos_sin.device))
        return stream

    def run(self, block: nn.Module, stream: Tensor, statistics: dict[str, LayerStatistics] | None) -> Tensor:
        assert isinstance(block, Layer)
        names = {id(weight): name for name, weight in _weights(block)}
        by_weight = {key: statistics[name] for key, name in names.items()} if statistics else {}
        out = stream.flatten(0, 1).clone()
        block(out, _WholeSequences(self.model, *stream.shape[:2]), self.model.cos_sin, _RecordingKernels(by_weight))
        return out.view_as(stream)


class _RecordingKernels:
    """The kernels of a layer in torch, taking down what each matrix is given."""

    def __init__(self, by_weight: dict[int, LayerStatistics]) -> None:
        self.by_weight = by_weight

    rms_norm, silu_and_mul = staticmethod(reference.rms_norm), staticmethod(reference.silu_and_mul)

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._linear(reference.rms_norm(x, norm, eps), weight, bias)

    def add_linear(self, stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        stream += self._linear(x, weight, bias)

    def norm_swiglu(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.silu_and_mul(self.norm_linear(x, norm, eps, weight, bias))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if id(weight) in self.by_weight:
            self.by_weight[id(weight)].add(x)
        return nn.functional.linear(x, weight, bias)


class _WholeSequences:
    """Causal attention of B sequences of S tokens that stand whole in the step."""

    def __init__(self, model: Transformer, batch: int, length: int) -> None:
        self.config, self.batch, self.length = model.config, batch, length

    def __call__(self, layer: Layer, qkv: Tensor, cos_sin: Tensor) -> Tensor:
        c, B, S = self.config, self.batch, self.length
        k, v = (qkv.new_empty(B, c.num_kv_heads, S, c.head_size) for _ in range(2))  # a block of S slots a sequence
        slots = torch.arange(B * S, device=qkv.device)
        q = reference.rotate_and_store(qkv, slots % S, cos_sin, slots, k, v, layer.q_norm, layer.k_norm, layer.eps)
        q = q.view(B, S, -1, c.head_size).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(0, 1).flatten(1)
