"""Cutting a model of transformers into the stages of a pipeline."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmlab.parallel.schedules import Schedule, partition_layers


class LlamaStage(nn.Module):
    """Consecutive layers of a Llama-style model; the first stage embeds, the last has the final norm and the head.

    Token ids [B, S], or the stream [B, S, D] of the stage before -> the stream, or the logits [B, S, V]. Every layer
    attends causally to the whole sequence.
    """

    def __init__(self, model: Any, first: int, count: int) -> None:
        super().__init__()
        if model.config._attn_implementation not in ("sdpa", "flash_attention_2"):
            raise ValueError(f"model: expected causal attention by sdpa, got {model.config._attn_implementation!r}")
        layers = model.model.layers
        self.embedding = model.model.embed_tokens if first == 0 else None
        self.rotary = model.model.rotary_emb
        self.layers = nn.ModuleList(layers[first : first + count])
        ends = first + count == len(layers)
        self.norm = model.model.norm if ends else None
        self.head = model.lm_head if ends else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        turned = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=turned)
        if self.head is not None and self.norm is not None:
            x = self.head(self.norm(x))
        return x


def llama_stages(model: Any, schedule: Schedule, rank: int, sizes: list[int] | None = None) -> list[nn.Module]:
    """The stages that a rank holds, in the order of its chunks.

    sizes: layers of each stage; as even as can be where none are given. A head that is tied to the embedding is on
    another rank's stage than it, unless the schedule puts the first and the last stage on one: see
    ``sum_tied_gradients``. Raises ValueError for more stages than layers, and for sizes that are not those of the
    model.
    """
    stages, layers = schedule.num_stages, model.config.num_hidden_layers
    if sizes is None:
        if stages > layers:
            raise ValueError(
                f"schedule: {schedule.p} ranks of {schedule.v} chunks are {stages} stages; the model has {layers} layers"
            )
        sizes = partition_layers([1.0] * layers, stages)
    if len(sizes) != stages or sum(sizes) != layers or min(sizes) < 1:
        raise ValueError(f"sizes: expected {stages} numbers of at least 1 that make {layers} layers, got {sizes}")
    mine = [schedule.stage_of(rank, chunk) for chunk in range(schedule.v)]
    return [LlamaStage(model, sum(sizes[:stage]), sizes[stage]) for stage in mine]


@torch.no_grad()
def sum_tied_gradients(stages: list[nn.Module], schedule: Schedule, mesh: DeviceMesh) -> None:
    """Add the gradients of an embedding and a head that are one matrix, but lie on two ranks as two.

    To be called behind a step, before the optimizer's. Where both are on one rank autograd has added them.
    """
    ends = schedule.rank_of(0), schedule.rank_of(schedule.num_stages - 1)
    if ends[0] == ends[1] or mesh.get_local_rank() not in ends:
        return
    group = mesh.get_group()
    other = dist.get_process_group_ranks(group)[ends[mesh.get_local_rank() == ends[0]]]
    parts: list[Any] = [part for stage in stages for part in (stage.embedding, stage.head) if part is not None]
    gradient = parts[0].weight.grad
    ours, theirs = gradient.clone(), torch.empty_like(gradient)
    under_way: list[Any] = [dist.isend(ours, other, group), dist.irecv(theirs, other, group)]
    for work in under_way:
        work.wait()
    gradient += theirs
