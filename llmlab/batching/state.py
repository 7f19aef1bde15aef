"""What a policy sees and may do: requests that wait, requests that run, and the blocks that they share.

A policy chooses; the state keeps the books, so that no policy, a student's neither, can lose a request or a block. The
engine and the simulator drive it alike: ``schedule`` (the policy's), `State.launch`, and `State.commit` when the tokens
have come, which may be after the next step was launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llmlab.arguments import integer
from llmlab.batching.request import Request


class KVManager(Protocol):
    """What keeps the keys' and values' places: a block manager, or contiguous reservation; its methods are described there."""

    block_size: int  # slots in a block; 1 where there are no blocks
    max_length: int  # slots that one request may have at most

    @property
    def num_used_blocks(self) -> int: ...
    @property
    def num_tokens_held(self) -> int: ...
    def num_tokens(self, request_id: Hashable) -> int: ...
    def can_allocate(self, token_ids: Sequence[int], owed: int = 0) -> bool: ...
    def allocate(self, request_id: Hashable, token_ids: Sequence[int], *, cached_only: bool) -> int: ...
    def reserve_slots(self, request_id: Hashable, num_slots: int) -> bool: ...
    def reserve_all(self, request_ids: Sequence[Hashable], whole_blocks: bool = False) -> int: ...
    def extend(self, request_id: Hashable, token_ids: Sequence[int]) -> None: ...
    def free(self, request_id: Hashable) -> None: ...


@dataclass(slots=True)
class StepPlan:
    """What one step computes.

    decodes: requests of which one token is computed. chunks: requests with how many tokens of their context are.
    preempted: who lost its blocks for it. padding: tokens computed for nobody.
    """

    decodes: list[Request] = field(default_factory=list)
    chunks: list[tuple[Request, int]] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    padding: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(count for _, count in self.chunks)

    @property
    def requests(self) -> list[Request]:
        return [*self.decodes, *(request for request, _ in self.chunks)]

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)


class Policy(Protocol):
    """Chooses what the next step computes: decodes that have their slots by `State.with_slots`, chunks by `State.add_chunk`."""

    def schedule(self, state: State) -> StepPlan: ...


class State:
    """Requests and blocks between two steps.

    waiting: in order of arrival, the preempted first. running: in order of admission; ``decoding`` and ``in_context``
    are its two phases.
    """

    def __init__(self, kv: KVManager, max_num_seqs: int) -> None:
        integer(at_least=1)("max_num_seqs", max_num_seqs)
        self.kv = kv
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.ended: list[Request] = []  # since whoever drives the state looked last, and cleared it
        self._owed = 0  # blocks that the prompts in progress have yet to take
        self._refused: tuple[Request, int] | None = None  # had no blocks, and how many were in use or owed then
        self._untold: dict[Request, None] = {}  # have filled blocks that the KV manager has not been told of
        self._ending: dict[Request, None] = {}  # whose last token a launched step yields
        self._phases: tuple[list[Request], list[Request]] | None = None  # decoding and in context, until that changes

    def decoding(self) -> list[Request]:
        """Running requests that are past their context and not at their end: each step computes one token of them."""
        return self._in_phases()[0].copy()

    def in_context(self) -> list[Request]:
        """Running requests with tokens of their prompt (or, after a preemption, of their own past) to compute."""
        return self._in_phases()[1].copy()

    def _in_phases(self) -> tuple[list[Request], list[Request]]:
        if self._phases is None:
            decoding = [r for r in self.running if r.context <= r.computed_tokens and r.num_tokens < r.max_tokens]
            self._phases = decoding, [r for r in self.running if r.computed_tokens < r.context]
        return self._phases

    def slots_held(self) -> tuple[int, int]:
        """Slots that requests hold, and those of them with keys and values, each once however many requests share it.

        As with ``computed_tokens``, what launched steps write counts as written. `Metrics.held` takes the two.
        """
        ahead = sum(r.computed_tokens - self.kv.num_tokens(r.request_id) for r in self.running)
        return self.kv.num_used_blocks * self.kv.block_size, self.kv.num_tokens_held + ahead

    def add(self, request: Request) -> bool:
        """Let a request wait, or refuse it at once where it could not be served by the whole of the cache.

        False for a refused one; its ``finish_reason`` says why. The last token of all takes no slot.
        """
        slots, most = request.max_tokens - 1, self.kv.max_length
        if slots > most:
            request.finish_reason = (
                f"refused: it may need {slots} slots of the KV cache, which gives {most} to a request"
            )
            return False
        self.waiting.append(request)
        return True

    def admit(self) -> Request | None:
        """Let the first that waits run; None where there is none, no room, or no blocks for the whole of its context.

        What is cached of that is its own now; blocks for the rest are taken chunk by chunk, in ``add_chunk``.
        """
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return None
        request, used = self.waiting[0], self.kv.num_used_blocks + self._owed
        if request.in_flight:
            return None
        if self._refused is not None and self._refused[0] is request and used >= self._refused[1]:
            return None  # to look a long prompt up in the prefix cache takes longer than a step's whole scheduling
        self._tell_of_full_blocks()
        if not self.kv.can_allocate(request.token_ids, self._owed):
            self._refused = (request, used)
            return None
        self._refused = None
        cached = self.kv.allocate(request.request_id, request.token_ids, cached_only=True)
        request.computed_tokens = request.slots = cached
        if not request.preemptions:
            request.cached_tokens = cached
        request.context = len(request.token_ids)
        self._owed += self._owed_to(request)
        request.is_running = True
        self.running.append(self.waiting.popleft())
        self._phases = None
        return request

    def preempt(self, plan: StepPlan | None = None) -> Request:
        """The youngest loses its blocks, and its part in ``plan``; it waits in front with what it has, to be computed again."""
        request = self.running.pop()
        self._free(request)
        request.is_running = False
        request.computed_tokens = request.slots = 0
        request.preemptions += 1
        self.waiting.appendleft(request)
        if plan is not None:
            plan.preempted.append(request)
            plan.decodes = [r for r in plan.decodes if r is not request]
            plan.chunks = [(r, count) for r, count in plan.chunks if r is not request]
        return request

    def add_chunk(self, plan: StepPlan, request: Request, most: int) -> int:
        """Plan the next tokens of a request's context, at most ``most``, and take their blocks; what comes back is how many.

        For want of blocks the youngest are preempted. The youngest itself gets no chunk, and keeps what it has.
        """
        count = min(request.context - request.computed_tokens, most) if request.is_running else 0
        if count <= 0:
            return 0
        wanted, size = request.computed_tokens + count, self.kv.block_size
        while request.slots < wanted and not self.kv.reserve_slots(request.request_id, wanted):
            if self.running[-1] is request:
                return 0
            self.preempt(plan)
        self._owed -= self._owed_to(request)
        request.slots = max(request.slots, -(-wanted // size) * size)
        self._owed += self._owed_to(request)
        plan.chunks.append((request, count))
        return count

    def _owed_to(self, request: Request) -> int:
        """Blocks of a request's context that it has not taken."""
        return max(0, -((request.slots - request.context) // self.kv.block_size))

    def with_slots(self, decodes: list[Request], plan: StepPlan) -> list[Request]:
        """Those of ``decodes`` that have a slot for their next token; for want of blocks the youngest are preempted.

        A slot stays with its request until its token is computed, in this step or a later one.
        """
        wanting = [r for r in decodes if r.slots < r.num_tokens]
        granted = self.kv.reserve_all([r.request_id for r in wanting], whole_blocks=True)
        while granted < len(wanting):
            victim = self.preempt(plan)
            decodes = [r for r in decodes if r is not victim]
            granted -= victim in wanting[:granted]
            wanting = [r for r in wanting if r is not victim]
            granted += self.kv.reserve_all([r.request_id for r in wanting[granted:]], whole_blocks=True)
        size = self.kv.block_size
        for r in wanting:
            r.slots += size - r.slots % size
        return decodes

    def launch(self, plan: StepPlan) -> list[Request]:
        """Count the plan's tokens as computed; what comes back are the requests of which it yields a token, in order.

        Raises ValueError for a plan that computes what is not there, or has no slot; the state is then of no more use.
        """
        yielding = plan.decodes.copy()
        if yielding != self._in_phases()[0] and len(set(yielding)) < len(yielding):
            twice = next(r for r in yielding if yielding.count(r) > 1)
            raise ValueError(f"request {twice.request_id!r} cannot decode twice in one step")
        size = self.kv.block_size
        for r in yielding:
            count = r.num_tokens
            if not (r.computed_tokens + 1 == count <= r.slots and count < r.max_tokens):
                raise ValueError(
                    f"request {r.request_id!r} cannot decode: {count - r.computed_tokens} of its {count} tokens are to be computed, {r.slots} have a slot"
                )
            if count % size == 0:
                self._untold[r] = None
            r.computed_tokens = count
            r.num_tokens = count = count + 1
            if count == r.max_tokens:
                self._ending[r] = self._phases = None
        if plan.chunks:
            self._phases = None
        for r, count in plan.chunks:
            left = r.context - r.computed_tokens if r.is_running else 0
            begin, end = r.computed_tokens, r.computed_tokens + count
            if not 0 < count <= left or end > r.slots:
                raise ValueError(
                    f"a chunk of {count} tokens of request {r.request_id!r}, of whose context {left} are to be computed, {r.slots - begin} have a slot of add_chunk's"
                )
            self.kv.extend(r.request_id, r.token_ids[begin:end])
            r.computed_tokens = end
            if end == r.num_tokens:
                r.num_tokens += 1
                yielding.append(r)
                if r.num_tokens == r.max_tokens:
                    self._ending[r] = None
        return yielding

    def commit(self, yielding: Sequence[Request], tokens: Sequence[int]) -> list[Request]:
        """Take the tokens that a launched step yielded; what comes back are the requests that took one.

        A request that ended since its step was launched takes none. One that has all its tokens ends with "length".
        """
        if len(tokens) != len(yielding):
            raise ValueError(f"tokens: expected one for each of {len(yielding)} requests, got {len(tokens)}")
        taken = [r for r in yielding if not r.finish_reason]
        if len(taken) < len(yielding):
            tokens = [token for r, token in zip(yielding, tokens, strict=True) if not r.finish_reason]
        for r, token in zip(taken, tokens, strict=True):
            r.token_ids.append(token)
        for r in [r for r in self._ending if len(r.token_ids) == r.max_tokens]:
            self.finish(r, "length")
        return taken

    def _tell_of_full_blocks(self) -> None:
        """Before blocks are looked up: let the KV manager know what was computed since. Till then it is nobody's business."""
        untold, self._untold = self._untold, {}
        for r in untold:
            self._tell(r)
            if len(r.token_ids) < r.computed_tokens:  # the token that fills the block has not come
                self._untold[r] = None

    def _tell(self, r: Request) -> None:
        self.kv.extend(r.request_id, r.token_ids[self.kv.num_tokens(r.request_id) : r.computed_tokens])

    def _free(self, request: Request) -> None:
        if request in self._untold:
            del self._untold[request]
            self._tell(request)
        self.kv.free(request.request_id)
        self._owed -= self._owed_to(request)
        self._phases = None

    def finish(self, request: Request, reason: str) -> None:
        """End a request, wherever it is, and give its blocks back. Raises ValueError where it has ended, or is unknown."""
        if request.finish_reason:
            raise ValueError(f"request {request.request_id!r} has ended already: {request.finish_reason}")
        queue = self.running if request.is_running else self.waiting
        try:
            queue.remove(request)
        except ValueError:
            raise ValueError(f"request {request.request_id!r} neither runs nor waits here") from None
        if request.is_running:
            self._free(request)
        self._ending.pop(request, None)
        request.is_running = False
        request.slots = 0
        request.finish_reason = reason
        self.ended.append(request)
