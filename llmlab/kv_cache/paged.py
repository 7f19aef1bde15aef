"""Keys and values in blocks of a pool, and the attention of one step over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmlab.config import ModelConfig
from llmlab.kernels import kernels_for
from llmlab.model import Layer


@dataclass
class StepBatch:
    """Where the T tokens of a step belong; decodes come first, then chunks of prompts.

    slots, positions: [T]. decode_rows, decode_lengths: [N], the row of the block tables and the number of keys of the
    first N tokens; length 0 is padding, or the place of a chunk's token. chunks, tiles: see ``chunk_attention``; None
    in a step without prompts.
    """

    slots: Tensor
    positions: Tensor
    decode_rows: Tensor
    decode_lengths: Tensor
    chunks: Tensor | None = None
    tiles: Tensor | None = None
    splits: int = 1
    scratch: tuple[Tensor, Tensor] | None = None


class PagedCache:
    """The pool of blocks for all layers: keys and values, [L, num_blocks, H_kv, block_size, d] each."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, num_blocks, config.num_kv_heads, block_size, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.scale = config.head_size**-0.5
        self.block_size = block_size
        self.ops = kernels_for(device.type)

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block in all layers: 2 L H_kv block_size d times the size of an element."""
        return 2 * config.num_layers * config.num_kv_heads * block_size * config.head_size * dtype.itemsize

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks from source to destination, as a block manager's copy-on-write asks."""
        if copies:
            source, destination = (torch.tensor(side, device=self.keys.device) for side in zip(*copies, strict=True))
            for pool in (self.keys, self.values):
                pool[:, destination] = pool[:, source]

    def attention(self, batch: StepBatch, block_tables: Tensor) -> PagedAttention:
        """The attention of one step."""
        return PagedAttention(self, batch, block_tables)


@dataclass
class PagedAttention:
    """What a layer calls: rotate, store, and attend over the blocks; see `llmlab.model.Attention`."""

    cache: PagedCache
    batch: StepBatch
    block_tables: Tensor  # [rows, blocks]

    def __call__(self, layer: Layer, qkv: Tensor, cos_sin: Tensor) -> Tensor:
        cache, batch, ops = self.cache, self.batch, self.cache.ops
        keys, values = cache.keys[layer.index], cache.values[layer.index]
        q = ops.rotate_and_store(
            qkv, batch.positions, cos_sin, batch.slots, keys, values, layer.q_norm, layer.k_norm, layer.eps
        )
        out = torch.empty_like(q)  # what padding leaves in it concerns no other row
        ops.step_attention(
            q, keys, values, self.block_tables, batch.decode_rows, batch.decode_lengths, batch.chunks, batch.tiles,
            cache.scale, out, batch.splits, batch.scratch,
        )  # fmt: skip
        return out.flatten(1)
