"""A step's plan as numbers: one array of 32-bit words, which one copy takes to the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmlab.batching import Request, StepPlan


@dataclass(frozen=True)
class StepShape:
    """How large a step is: tokens, the first of which are decodes; chunks of prompts, and tiles of their attention."""

    tokens: int
    decodes: int
    chunks: int
    tiles: int

    def sizes(self, most_yields: int) -> tuple[int, ...]:
        """Words of each part, in the order of `StepInputs`' fields."""
        T, N = self.tokens, self.decodes
        return (most_yields, most_yields, T, T, T, N, N, 4 * self.chunks, 2 * self.tiles)


@dataclass(frozen=True)
class StepInputs:
    """The parts of a step's words, as views of a host's or a device's array; what is yielded stands first, in room for all."""

    yield_at: Any  # [yields], the place in T of each token that yields one
    yield_rows: Any  # [yields], where the yielded token is kept; padding: a row that is nobody's
    token_ids: Any  # [T]; -1: the row's last sampled token
    rows: Any  # [T], of the block tables; -1: padding
    positions: Any  # [T]
    lengths: Any  # [decodes], keys of each; 0: padding
    new_blocks: Any  # [decodes], the block that the token begins; -1: it has its block
    chunks: Any  # [chunks, 4]
    tiles: Any  # [tiles, 2]

    @classmethod
    def of(cls, words: Any, shape: StepShape, most_yields: int) -> StepInputs:
        parts: list[Any] = []
        at = 0
        for size in shape.sizes(most_yields):
            parts.append(words[at : at + size])
            at += size
        parts[-2:] = parts[-2].reshape(shape.chunks, 4), parts[-1].reshape(shape.tiles, 2)
        return cls(*parts)


def exact_shape(plan: StepPlan, queries_per_tile: int) -> StepShape:
    """The shape without padding."""
    tiles = sum(-(-count // queries_per_tile) for _, count in plan.chunks)
    return StepShape(plan.num_tokens, len(plan.decodes), len(plan.chunks), tiles)


def fill(
    step: StepInputs, plan: StepPlan, rows: Any, lengths: Any, yielding: Sequence[Request],
    block_table: Callable[[Hashable], Sequence[int]], block_size: int, queries_per_tile: int, spare_row: int,
) -> None:  # fmt: skip
    """Write a launched plan into the words of a shape that holds it. rows, lengths: of the decodes. spare_row: nobody's."""
    decodes, n = plan.decodes, len(plan.decodes)
    step.token_ids[:n] = -1
    step.rows[:n] = step.yield_rows[:n] = rows
    step.lengths[:n] = lengths
    step.lengths[n:] = 0
    step.positions[:n] = step.lengths[:n] - 1
    step.new_blocks[:] = -1
    for i in np.flatnonzero(step.positions[:n] % block_size == 0).tolist():
        r = decodes[i]
        step.new_blocks[i] = block_table(r.request_id)[(r.computed_tokens - 1) // block_size]
    step.yield_at[:n] = np.arange(n, dtype=np.int32)
    at, tile, y = n, 0, n
    for number, (r, count) in enumerate(plan.chunks):
        begin = r.computed_tokens - count
        step.token_ids[at : at + count] = r.token_ids[begin : begin + count]
        step.rows[at : at + count] = r.row
        step.positions[at : at + count] = np.arange(begin, begin + count, dtype=np.int32)
        step.chunks[number] = (at, count, r.row, begin)
        pieces = -(-count // queries_per_tile)
        step.tiles[tile : tile + pieces, 0] = number
        step.tiles[tile : tile + pieces, 1] = np.arange(0, count, queries_per_tile, dtype=np.int32)
        at, tile = at + count, tile + pieces
        if y < len(yielding) and yielding[y] is r:
            step.yield_at[y] = at - 1
            y += 1
    step.token_ids[at:] = 0
    step.rows[at:] = -1
    step.positions[at:] = 0
    if len(step.chunks):
        step.chunks[len(plan.chunks) :] = 0
        step.tiles[tile:, 0] = 0
        step.tiles[tile:, 1] = NO_TILE
    step.yield_at[y:] = 0
    if y > n:
        step.yield_rows[n:y] = [r.row for r in yielding[n:]]
    step.yield_rows[y:] = spare_row


NO_TILE = 1 << 30  # begins behind any chunk's end
