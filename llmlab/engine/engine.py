"""The engine: requests in, tokens out, one step after another.

A step is scheduled, launched, and committed when its tokens have come; the next one is launched before that, so the
host works while the device does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any

from rich.progress import Progress

from llmlab.batching import Policy, Request, State, StepPlan
from llmlab.batching.policies import SplitFuse
from llmlab.engine.memory import blocks_that_fit
from llmlab.engine.params import SamplingParams
from llmlab.engine.results import Completion, StepTimes
from llmlab.engine.runner import Launched, Runner
from llmlab.engine.text import Prompt, Text
from llmlab.kv_cache import BlockManager, ContiguousReservation
from llmlab.model import Transformer


class Engine:
    """Generates for many requests at once.

    model: one of ours. policy: how steps are put together; SplitFuse with a budget of 2048 unless told. tokenizer: for
    prompts that are text, and stop strings. num_blocks: of the KV cache; as many as the memory holds unless told.
    max_length: tokens of one sequence. reserve_max_length: give each request contiguous room for that many, as engines
    did before paging. graphs, ahead: CUDA graphs, and launching a step before the tokens of the one
    before it are known; each can be turned off.
    """

    def __init__(
        self,
        model: Transformer,
        policy: Policy | None = None,
        tokenizer: Any = None,
        *,
        num_blocks: int | None = None,
        block_size: int = 16,
        max_num_seqs: int | None = None,
        max_length: int | None = None,
        prefix_caching: bool = True,
        reserve_max_length: bool = False,
        graphs: bool = True,
        ahead: bool = True,
        memory_fraction: float = 0.9,
        eos_token_id: int | None = None,
    ) -> None:
        self.model, self.text = model, Text(tokenizer)
        self.policy: Policy = policy or SplitFuse(2048)
        max_tokens = int(getattr(self.policy, "max_num_batched_tokens", 8192))
        if max_num_seqs is None:
            max_num_seqs = min(256, max_tokens)
        if max_num_seqs > max_tokens:
            raise ValueError(
                f"max_num_seqs: a step holds {max_tokens} tokens, too few for {max_num_seqs} sequences that decode"
            )
        self.max_length = min(max_length or model.config.max_positions, model.config.max_positions)
        self.block_size, self.ahead = block_size, ahead
        self.eos_token_id = eos_token_id if eos_token_id is not None else getattr(tokenizer, "eos_token_id", None)
        self._sizes = {"max_num_seqs": max_num_seqs, "max_tokens": max_tokens, "max_length": self.max_length}
        if num_blocks is None:
            num_blocks = blocks_that_fit(model, block_size, memory_fraction, **self._sizes)
        self._new_kv = partial(
            _manager, num_blocks, block_size, prefix_caching, self.max_length if reserve_max_length else 0
        )
        self.kv = self._new_kv()
        self.state = State(self.kv, max_num_seqs)
        self.runner = Runner(model, num_blocks, block_size, max_num_seqs, max_tokens, self.max_length, graphs)
        if self.runner.graphs:
            self.runner.graphs.capture()
        self.times: list[StepTimes] | None = None
        self.launched: Launched | None = None
        self._stoppable: set[Request] = set()  # whose tokens must be looked at
        self._rows = list(range(max_num_seqs))[::-1]
        self._ids = itertools.count()

    # Requests

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Queue a request. Raises ValueError for one that can never run; the others are not touched."""
        params = params or SamplingParams()
        token_ids = self.text.encode(prompt)
        if not token_ids:
            raise ValueError("prompt: expected at least one token, got none")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.model.config.vocab_size:
            raise ValueError(
                f"prompt: token ids must be 0..{self.model.config.vocab_size - 1}, got {low if low < 0 else high}"
            )
        if len(token_ids) + params.max_new_tokens > self.max_length:
            raise ValueError(
                f"prompt: {len(token_ids)} tokens and {params.max_new_tokens} new ones are longer than the context of {self.max_length}"
            )
        if params.stop and self.text.tokenizer is None:
            raise ValueError("stop: strings need the engine's tokenizer")
        request = Request(next(self._ids), token_ids, params.max_new_tokens, time.perf_counter(), params)
        if not self.state.add(request):
            raise ValueError(f"prompt: {request.finish_reason}")
        if params.stop or params.stop_token_ids or not (params.ignore_eos or self.eos_token_id is None):
            self._stoppable.add(request)
        return request

    def abort(self, request: Request) -> None:
        """End a request now; what it has generated stays."""
        if not request.finish_reason:
            self._end(request, "aborted")

    # Steps

    @property
    def has_work(self) -> bool:
        return bool(self.state.waiting or self.state.running or self.launched)

    def step(self) -> list[Request]:
        """Launch the next step and take the tokens of the one before; gives the requests that have a new token.

        After an exception every request that ran waits again with what it has, and the cache is empty.
        """
        try:
            return self._step()
        except BaseException:
            self.start_over()
            raise

    def _step(self) -> list[Request]:
        marks = [time.perf_counter()]
        plan = self.policy.schedule(self.state)
        for request in plan.preempted:
            self._release(request)
        marks.append(time.perf_counter())
        before, self.launched = self.launched, self._launch(plan) if plan else None
        if not plan and before is None and self.has_work:
            raise RuntimeError(
                f"{type(self.policy).__name__} schedules nothing, and {len(self.state.waiting)} requests wait"
            )
        if not self.ahead and before is None:
            before, self.launched = self.launched, None
        marks.append(time.perf_counter())
        tokens = before.tokens() if before else []
        marks.append(time.perf_counter())
        taken = self._commit(before, tokens) if before else []
        if self.times is not None:
            spent = [b - a for a, b in itertools.pairwise([*marks, time.perf_counter()])]
            self.times.append(StepTimes(*spent, num_seqs=len(plan.decodes), num_tokens=plan.num_tokens))
        return taken

    def _launch(self, plan: StepPlan) -> Launched:
        copies = self.kv.take_copies() if isinstance(self.kv, BlockManager) else []
        yielding = self.state.launch(plan)
        tables = [(r.row, 0, self._block_table(r.request_id)) for r in (plan.decodes if copies else ())]
        for r, count in plan.chunks:
            first = (r.computed_tokens - count) // self.block_size if r.row >= 0 else 0
            if r.row < 0:
                r.row = self._rows.pop()
            end = -(-r.computed_tokens // self.block_size)
            tables.append((r.row, first, self._block_table(r.request_id)[first:end]))
        if tables:
            self.runner.write_tables(tables)
        return self.runner.launch(plan, yielding, self._block_table, copies)

    def _block_table(self, request_id: Hashable) -> Sequence[int]:
        if isinstance(self.kv, BlockManager):
            return self.kv.block_table(request_id)
        first, size = self.kv.start(request_id), self.block_size
        return range(first // size, (first + self.kv.max_length) // size)

    def _commit(self, launched: Launched, tokens: list[int]) -> list[Request]:
        if tokens and min(tokens) < 0:
            for request, token in zip(launched.yielding, tokens, strict=True):
                if token < 0 and not request.finish_reason:
                    self._end(request, "error: the model's logits hold a NaN")
        taken = self.state.commit(launched.yielding, tokens)
        if self._stoppable:
            for request in taken:
                if request in self._stoppable and not request.finish_reason and self._stops(request):
                    self.state.finish(request, "stop")
        self._forget_ended()
        return taken

    def _stops(self, request: Request) -> bool:
        params, token = request.sampling, request.token_ids[-1]
        if token in params.stop_token_ids or (token == self.eos_token_id and not params.ignore_eos):
            return True
        return bool(params.stop) and self.text.stop_at(request) >= 0

    def _end(self, request: Request, reason: str) -> None:
        self.state.finish(request, reason)
        self._forget_ended()

    def _forget_ended(self) -> None:
        for request in self.state.ended:
            self._release(request)
            self._stoppable.discard(request)
        self.state.ended.clear()

    def _release(self, request: Request) -> None:
        if request.row >= 0:
            self._rows.append(request.row)
            request.row = -1

    def start_over(self) -> None:
        """Forget what runs: nothing on the device is trusted, and all that ran waits again in its order."""
        self.launched = None
        while self.state.running:
            self._release(self.state.preempt())
        for request in self.state.waiting:
            request.num_tokens = len(request.token_ids)
            self._release(request)
        self.kv = self._new_kv()
        self.state.kv = self.kv
        self.runner.start_over()

    # Calls

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Completions of all prompts, in their order.

        A prompt that can never run gets a completion whose finish_reason says why. Ctrl-C ends all of them.
        """
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params: expected one for each of {len(prompts)} prompts, got {len(each)}")
        asked: list[Request | str] = []
        for prompt, wanted in zip(prompts, each, strict=True):
            try:
                asked.append(self.add(prompt, wanted))
            except ValueError as error:
                asked.append(f"error: {error}")
        requests = [r for r in asked if isinstance(r, Request)]
        with Progress(disable=not progress) as bar:
            task = bar.add_task("requests", total=len(requests))
            try:
                while any(not r.finish_reason for r in requests):
                    bar.advance(task, sum(bool(r.finish_reason) for r in self.step()))
                self.drain()
            finally:
                for request in requests:
                    self.abort(request)
        return [self.completion(r) if isinstance(r, Request) else Completion(-1, [], None, r) for r in asked]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[int]:
        """The tokens of one prompt as they come; closing the iterator cancels the request."""
        request, given = self.add(prompt, params), 0
        try:
            while not request.finish_reason or given < len(request.output):
                if given == len(request.output):
                    self.step()
                    continue
                yield request.output[given]
                given += 1
            self.drain()
        finally:
            self.abort(request)

    def completion(self, request: Request) -> Completion:
        """What a request has come to."""
        return Completion(
            request.request_id,
            list(request.output),
            self.text.of(request),
            request.finish_reason,
            request.cached_tokens,
        )

    def drain(self) -> None:
        """Take the tokens of a step that was launched for nobody."""
        if not (self.state.waiting or self.state.running):
            while self.launched is not None:
                before, self.launched = self.launched, None
                self._commit(before, before.tokens())


def _manager(
    num_blocks: int, block_size: int, prefix_caching: bool, reserved: int
) -> BlockManager | ContiguousReservation:
    """reserved: tokens of contiguous room for each request, rounded up to whole blocks; 0: blocks as they are needed."""
    if reserved:
        return ContiguousReservation(num_blocks * block_size, -(-reserved // block_size) * block_size)
    return BlockManager(num_blocks, block_size, prefix_caching)
