"""The vocabulary over the ranks: an embedding of which each holds some rows, and a loss that never gathers the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from llmlab.parallel.communicator import Ranks
from llmlab.parallel.exchange import copy_to_ranks, gather_parts, sum_over_ranks
from llmlab.parallel.linear import ranks_of
from llmlab.parallel.part import padded_rows


class VocabParallelEmbedding(nn.Module):
    """E[id]: each rank looks up the ids whose rows it holds, zeros for the others, and the sum is the embedding.

    ids [...] -> [..., D]. A vocabulary that the ranks do not divide is padded with rows of zeros that no id reaches.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        mesh: DeviceMesh | Ranks,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """The part of a new ``nn.Embedding``; the ranks agree on the whole where their seeds do."""
        self._build(nn.Embedding(num_embeddings, embedding_dim, device=device, dtype=dtype), ranks_of(mesh))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, mesh: DeviceMesh | Ranks) -> VocabParallelEmbedding:
        """This rank's rows of an embedding that all have."""
        layer = cls.__new__(cls)
        layer._build(embedding, ranks_of(mesh))
        return layer

    def _build(self, whole: nn.Embedding, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.parts = {"weight": padded_rows(whole.num_embeddings, ranks)}
        self.weight = nn.Parameter(self.parts["weight"].take(whole.weight.detach()).clone())

    def forward(self, ids: Tensor) -> Tensor:
        part = self.parts["weight"]
        own = (ids >= part.start) & (ids < part.stop)
        rows = F.embedding((ids - part.start).where(own, 0), self.weight)
        return sum_over_ranks(rows * own.unsqueeze(-1), self.ranks)


class VocabParallelHead(nn.Module):
    """Logits X E_rᵀ for the rows of the vocabulary that this rank holds.

    X [..., D] is replicated; the logits [..., ceil(V/t)] are partitioned, or gathered to [..., V].
    """

    def __init__(
        self, linear: nn.Linear, mesh: DeviceMesh | Ranks, gather_output: bool = True, copy_input: bool = True
    ) -> None:
        super().__init__()
        self.ranks = ranks_of(mesh)
        self.parts = {"weight": padded_rows(linear.out_features, self.ranks)}
        if linear.bias is not None:
            self.parts["bias"] = self.parts["weight"]
        self.vocab_size = linear.out_features
        self.weight = nn.Parameter(self.parts["weight"].take(linear.weight.detach()).clone())
        self.bias = None if linear.bias is None else nn.Parameter(self.parts["bias"].take(linear.bias.detach()).clone())
        self.gather_output, self.copy_input = gather_output, copy_input

    def forward(self, x: Tensor) -> Tensor:
        x = copy_to_ranks(x, self.ranks) if self.copy_input else x
        logits = F.linear(x, self.weight, self.bias)
        if self.gather_output:
            return gather_parts(logits, self.ranks)[..., : self.vocab_size]
        return logits


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, ranks: Ranks, vocab_size: int) -> Tensor:
    """-log softmax(z)[target], from logits that are partitioned by vocabulary; numbers of size N cross, not N·V.

        loss_n = log Σ_r Σ_v exp(z_nv - max_n) + max_n - Σ_r z_n,target

    logits [N, ceil(V/t)]: this rank's columns. targets [N]: ids below V. Returns [N], the same on all ranks.
    Raises ValueError for a target outside the vocabulary, and for logits of another width. Source: Megatron-LM's loss,
    Shoeybi et al. 2019, section 3.
    """
    part = padded_rows(vocab_size, ranks)
    if logits.shape[-1] != part.size:
        raise ValueError(f"logits: expected {part.size} columns, a share of {vocab_size}, got {logits.shape[-1]}")
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < vocab_size):
        raise ValueError(f"targets: expected ids below {vocab_size}, got {int(targets.min())} to {int(targets.max())}")
    logits = logits[:, : part.stop - part.start]  # padding is no token
    least = torch.finfo(logits.dtype).min
    own_largest = logits.detach().max(-1).values if logits.shape[-1] else logits.new_full(targets.shape, least)
    largest = ranks.all_reduce(own_largest, "max")
    total = sum_over_ranks((logits - largest.unsqueeze(-1)).exp().sum(-1), ranks)
    own = (targets >= part.start) & (targets < part.stop)
    place = (targets - part.start).where(own, 0)
    chosen = logits.gather(-1, place.unsqueeze(-1)).squeeze(-1) * own if logits.shape[-1] else total * 0
    return total.log() + largest - sum_over_ranks(chosen, ranks)
