"""Running steps: the model, the pool of blocks, and what the device keeps from one step to the next.

The device knows each row's last sampled token and its blocks, so a step can be launched before the host has learnt what
the one before it yielded. A row belongs to one running request.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from llmlab.batching import Request, StepPlan
from llmlab.engine.graphs import Graphs
from llmlab.engine.inputs import NO_TILE, StepInputs, StepShape, exact_shape, fill
from llmlab.engine.sampling import sample
from llmlab.kernels import kernels_for
from llmlab.kv_cache.paged import PagedCache, StepBatch
from llmlab.model import Transformer

Words = npt.NDArray[np.int32]
IN_FLIGHT = 3  # the host's buffers: one is read by the device, one by the host, one is written
PENDING = -2  # in the place of a token that has not come
MIXED_SPLITS = 4
BUSY = 528  # programs of decode attention that keep a device busy: four to each of 132 multiprocessors


@dataclass
class Launched:
    """A step that runs: who yields a token, and where the tokens will be."""

    yielding: list[Request]
    host_tokens: npt.NDArray[np.int64]  # what the device writes to
    begun: torch.cuda.Event | None = None  # when the device came to it, where a runner is ``timed``
    ready: torch.cuda.Event | None = None  # when it left it; also where no token says so

    def tokens(self) -> list[int]:
        """Wait for the step, and give its tokens; -1 for one that could not be chosen."""
        if self.ready is not None:
            self.ready.synchronize()
        while (self.host_tokens == PENDING).any():
            if torch.cuda.current_stream().query() and (self.host_tokens == PENDING).any():
                raise RuntimeError("the device has ended its work without this step's tokens")
        found: list[int] = self.host_tokens.tolist()
        return found


class Runner:
    """Runs plans on one device."""

    def __init__(
        self, model: Transformer, num_blocks: int, block_size: int, max_num_seqs: int, max_tokens: int, max_length: int,
        graphs: bool,
    ) -> None:  # fmt: skip
        """max_tokens: of one step. max_length: tokens of one sequence. graphs: launch steps as CUDA graphs, where there is a GPU."""
        config, parameter = model.config, next(model.parameters())
        self.device, on_gpu = parameter.device, parameter.device.type == "cuda"
        self.model, self.block_size, self.max_num_seqs = model, block_size, max_num_seqs
        self.ops = kernels_for(self.device.type)
        self.cache = PagedCache(config, num_blocks, block_size, self.device, parameter.dtype)
        self.block_tables = torch.zeros(
            max_num_seqs + 1, -(-max_length // block_size), dtype=torch.int32, device=self.device
        )
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=self.device)
        self.queries_per_tile: int = self.ops.queries_per_tile(config.group_size)
        self.largest = self.mixed_shape(max_tokens)
        words = sum(self.largest.sizes(max_num_seqs))
        self.words = torch.zeros(words, dtype=torch.int32, device=self.device)
        # The device reads and writes these itself: two copies and an event would take the host longer than its own work.
        self.host_words = torch.zeros(IN_FLIGHT, words, dtype=torch.int32, pin_memory=on_gpu)
        self.host_tokens = torch.zeros(IN_FLIGHT, max_num_seqs, dtype=torch.int64, pin_memory=on_gpu)
        self.turn = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.selected = torch.zeros(max_num_seqs, config.hidden_size, dtype=parameter.dtype, device=self.device)
        self._views = lru_cache(maxsize=256)(self._views_of)
        self._turn = 0
        self.timed = False
        self._decodes: list[Request] = []
        self._decode_rows = self._lengths = np.zeros(0, dtype=np.int32)
        self._greedy = True
        most = max(rows * self.splits(rows, mixed) for rows in range(1, max_num_seqs + 1) for mixed in (False, True))
        self._scratch = self.ops.decode_scratch(
            most, config.num_kv_heads, config.group_size, config.head_size, 1, self.device
        )
        self.graphs = Graphs(self) if graphs and on_gpu else None

    def mixed_shape(self, tokens: int) -> StepShape:
        """The shape that holds every step of so many tokens, however they are parted into decodes and chunks."""
        tiles = -(-tokens // self.queries_per_tile) + self.max_num_seqs
        return StepShape(tokens, min(self.max_num_seqs, tokens), self.max_num_seqs, tiles)

    def splits(self, rows: int, mixed: bool = False) -> int:
        """Parts in which a sequence's keys are read when so many sequences are: a power of two that fills the device.

        mixed: in a step with prompts, where nobody knows how many of the rows are padding.
        """
        wanted = BUSY // (rows * self.model.config.num_kv_heads)
        return MIXED_SPLITS if mixed else 1 << max(0, min(wanted, 16).bit_length() - 1)

    def launch(
        self, plan: StepPlan, yielding: list[Request], block_table: Callable[[Hashable], Sequence[int]],
        copies: Sequence[tuple[int, int]] = (),
    ) -> Launched:  # fmt: skip
        """Start a step. copies: blocks to be copied before it."""
        self._turn = (self._turn + 1) % IN_FLIGHT
        begun = self._marked()
        exact = exact_shape(plan, self.queries_per_tile)
        shape = self.graphs.padded(exact) if self.graphs else exact
        fill(
            self._views(self._turn, shape), plan, *self._rows_of(plan.decodes), yielding, block_table,
            self.block_size, self.queries_per_tile, self.max_num_seqs,
        )  # fmt: skip
        self.cache.copy_blocks(copies)
        yields = len(yielding)
        host_tokens = self.host_tokens.numpy()[self._turn, :yields]
        host_tokens.fill(PENDING)
        greedy = self._greedy and not any(r.sampling.temperature for r in yielding[len(plan.decodes) :])
        if self.graphs:
            self.graphs.run(shape, yields, head=greedy)
        else:
            self.body(shape, yields)
        if yields and not (self.graphs and greedy):
            self.head(yields, [] if greedy else yielding)
        return Launched(yielding, host_tokens, begun, self._marked(not yields))

    def _rows_of(self, decodes: list[Request]) -> tuple[Words, Words]:
        """The rows and lengths of the requests that decode; mostly those of the step before, each a token longer."""
        if decodes == self._decodes:
            self._lengths += 1
        else:
            self._decodes, self._decode_rows = decodes.copy(), np.array([r.row for r in decodes], dtype=np.int32)
            self._lengths = np.array([r.computed_tokens for r in decodes], dtype=np.int32)
            self._greedy = not any(r.sampling.temperature for r in decodes)
        return self._decode_rows, self._lengths

    @torch.inference_mode()
    def body(self, shape: StepShape, yields: int) -> None:
        """Everything but the head, for the step in ``words``: hidden states of the tokens that yield, into ``selected``."""
        self.ops.take_words(self.host_words, self.words[: sum(shape.sizes(self.max_num_seqs))], self.turn)
        step = StepInputs.of(self.words, shape, self.max_num_seqs)
        tokens, slots = self.ops.gather_inputs(
            step.token_ids, step.rows, step.positions, step.new_blocks, self.last_tokens, self.block_tables,
            self.block_size,
        )  # fmt: skip
        n = shape.decodes
        batch = StepBatch(
            slots, step.positions, step.rows[:n], step.lengths, step.chunks if shape.chunks else None, step.tiles,
            self.splits(n, mixed=bool(shape.chunks)) if n else 1, self._scratch,
        )  # fmt: skip
        hidden = self.model(tokens, self.cache.attention(batch, self.block_tables))
        torch.index_select(hidden, 0, step.yield_at[:yields], out=self.selected[:yields])

    @torch.inference_mode()
    def head(self, yields: int, sampled: Sequence[Request] = ()) -> None:
        """Give the host the tokens of ``selected`` [yields], and keep them; those of the largest logits unless requests are given."""
        logits = self.model.logits(self.selected[:yields])
        tokens = sample(logits, [r.sampling for r in sampled], [r.num_tokens - 1 for r in sampled], self.ops)
        rows = self.words[self.max_num_seqs : self.max_num_seqs + yields]
        self.ops.give_tokens(tokens, rows, self.last_tokens, self.host_tokens, self.turn)

    def step(self, shape: StepShape, yields: int) -> None:
        """Body and head."""
        self.body(shape, yields)
        self.head(yields)

    def _views_of(self, turn: int, shape: StepShape) -> StepInputs:
        return StepInputs.of(self.host_words[turn].numpy(), shape, self.max_num_seqs)

    def _marked(self, needed: bool = False) -> torch.cuda.Event | None:
        """An event behind all that was launched, where one is needed or a runner is ``timed``."""
        if not (needed or self.timed) or self.device.type == "cpu":
            return None
        event = torch.cuda.Event(enable_timing=self.timed)
        event.record()
        return event

    def start_over(self) -> None:
        """Wait for the device, and go on behind the buffer that it took last, wherever a step was broken off."""
        self._turn = int(self.turn)

    def idle(self, shape: StepShape) -> None:
        """Put a step of padding alone into every buffer, with nothing running."""
        self.host_words.zero_()
        for turn in range(IN_FLIGHT):
            step = self._views_of(turn, shape)
            step.rows.fill(-1)
            step.new_blocks.fill(-1)
            step.tiles[:, 1] = NO_TILE
            step.yield_rows.fill(self.max_num_seqs)

    @torch.inference_mode()
    def write_tables(self, tables: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Write blocks into rows of the block tables, from a place on, for the steps that are launched from now on."""
        width = self.block_tables.shape[1]
        places = [row * width + first + i for row, first, blocks in tables for i in range(len(blocks))]
        told = torch.tensor([places, [b for _, _, blocks in tables for b in blocks]])
        if self.device.type == "cuda":
            told = told.pin_memory().to(self.device, non_blocking=True)
        self.block_tables.view(-1).index_copy_(0, told[0], told[1].to(torch.int32))
