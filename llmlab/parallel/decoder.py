"""llmlab's own decoder over ranks: the engine runs it as it runs any other, on each rank alike.

Every rank gets the same requests, chooses the same batches, and has the same logits; so it samples the same tokens, and
nothing but sums and logits has to cross.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmlab.config import ModelConfig
from llmlab.model.transformer import Transformer, stacked_names
from llmlab.parallel.communicator import Ranks
from llmlab.parallel.linear import ranks_of
from llmlab.parallel.loading import checkpoint_folder, empty_causal_lm, open_weights, parts_of
from llmlab.parallel.part import Part
from llmlab.parallel.plan import llama_plan, parallelize
from llmlab.parallel.vocabulary import VocabParallelEmbedding


class _Summed:
    """Kernels of which the projection into the stream makes a term of it on each rank: the terms are summed."""

    def __init__(self, kernels: Any, ranks: Ranks) -> None:
        self._kernels, self._ranks = kernels, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def add_linear(self, stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """stream += Σ_r x_r W_rᵀ + b."""
        stream += self._ranks.all_reduce(nn.functional.linear(x, weight))
        if bias is not None:
            stream += bias


class ParallelTransformer(Transformer):
    """This rank's heads, channels and rows of the vocabulary; ``config`` is that of its part."""

    def __init__(self, config: ModelConfig, ranks: Ranks) -> None:
        """config: of the whole model. Raises ValueError where the ranks do not divide its heads or channels."""
        llama_plan(config, ranks.size)
        if config.intermediate_size % ranks.size:
            raise ValueError(
                f"mesh: {ranks.size} ranks do not divide the {config.intermediate_size} channels of the MLP"
            )
        part = replace(
            config,
            num_heads=config.num_heads // ranks.size,
            num_kv_heads=max(1, config.num_kv_heads // ranks.size),
            intermediate_size=config.intermediate_size // ranks.size,
        )
        super().__init__(part)
        self.ranks = ranks
        embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, mesh=ranks)
        self.embedding = embedding  # type: ignore[assignment]  # one of another kind
        self.head = nn.Linear(config.hidden_size, embedding.parts["weight"].size, bias=False)
        if config.tied_embeddings:
            self.head.weight = embedding.weight

    @classmethod
    def load(cls, name: str, mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> ParallelTransformer:
        """This rank's part of a packaged model or a checkpoint's folder, read part by part."""
        folder = checkpoint_folder(name)
        whole = empty_causal_lm(folder)
        with open_weights(folder) as files:
            return cls._filled(whole, ranks_of(mesh), mesh.device_type, dtype, files.take)

    @classmethod
    def part_of(cls, theirs: Any, mesh: DeviceMesh | Ranks) -> ParallelTransformer:
        """This rank's part of a causal language model of transformers that every rank has."""
        weights = dict(theirs.named_parameters())
        example = weights["model.embed_tokens.weight"]

        def take(name: str, part: Part | None) -> Tensor:
            return part.take(weights[name].detach()) if part else weights[name].detach()

        return cls._filled(theirs, ranks_of(mesh), example.device.type, example.dtype, take)

    @classmethod
    def _filled(
        cls, theirs: Any, ranks: Ranks, device: str, dtype: torch.dtype, take: Callable[[str, Part | None], Tensor]
    ) -> ParallelTransformer:
        config = ModelConfig.from_huggingface(theirs.config.to_dict(), theirs.name_or_path or "model")
        parts = parts_of(parallelize(empty_copy(theirs), ranks))
        with torch.device("meta"):
            model = cls(config, ranks)
        model = model.to(dtype).to_empty(device=device)
        if config.tied_embeddings:
            model.head.weight = model.embedding.weight
        model.fill_positions(device)
        with torch.no_grad():
            for ours, sources in stacked_names(config).items():
                found = [take(source, parts.get(source)) for source in sources]
                model.get_parameter(ours).copy_(torch.cat(found))
        return model.eval()

    def kernels(self, device: str) -> Any:
        """The kernels of the device, with sums over the ranks in them."""
        return _Summed(super().kernels(device), self.ranks)

    def logits(self, stream: Tensor) -> Tensor:
        """The logits [N, V] of the normed stream [N, D], on every rank."""
        return self.ranks.all_gather(super().logits(stream))[:, : self.config.vocab_size]


def empty_copy(theirs: Any) -> Any:
    """The same model without memory."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return type(theirs)(theirs.config)
