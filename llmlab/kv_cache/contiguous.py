"""The KV cache as it was before paging: one region for each request, as long as the request may ever become.

The methods are the block manager's, with blocks of one slot, so that a policy or a simulator takes either. What
a region holds in reserve, and the gaps between regions that are too short for another, are the waste that paging ends:
Kwon et al. 2023 (PagedAttention, arXiv:2309.06180), figure 2, found tokens in 20% to 38% of such a cache.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from llmlab.arguments import checked, integer
from llmlab.kv_cache.block_pool import OutOfBlocks
from llmlab.kv_cache.held import ById


@dataclass(slots=True)
class Region:
    """Slots ``start`` to ``end`` of one request; the first ``tokens`` hold a token, ``slots`` of them are taken."""

    start: int
    end: int
    tokens: int
    slots: int


class ContiguousReservation:
    """Reserve ``max_length`` adjacent slots of ``num_slots`` for each request, in the first gap that is long enough.

    There is no sharing, hence no hits and no forks. Sizes are slots; one slot holds the keys and values of one token.
    Raises ValueError where not even one request would fit.
    """

    block_size = 1

    @checked(num_slots=integer(at_least=1), max_length=integer(at_least=1))
    def __init__(self, num_slots: int, max_length: int) -> None:
        if max_length > num_slots:
            raise ValueError(f"max_length: expected at most the {num_slots} slots there are, got {max_length}")
        self.num_blocks, self.max_length = num_slots, max_length
        self.num_used_blocks = 0  # slots of all regions
        self.num_tokens_held = 0  # those of them that hold a known token
        self._gaps = [(0, num_slots)]  # free, as (start, end), sorted; no two of them touch
        self._regions: ById[Region] = ById()

    @property
    def num_free_blocks(self) -> int:
        """Slots of no region. ``can_allocate`` can be False although they are enough: they may not be adjacent."""
        return self.num_blocks - self.num_used_blocks

    def can_allocate(self, token_ids: Sequence[int], owed: int = 0, max_length: int | None = None) -> bool:
        """Whether ``allocate`` would find its region now; nobody else is owed any of it. Raises ValueError for an empty prompt."""
        length, gap = self._plan(token_ids, max_length)
        return gap is not None and len(token_ids) <= length

    def allocate(
        self, request_id: Hashable, token_ids: Sequence[int], publish: bool = True, cached_only: bool = False,
        max_length: int | None = None,
    ) -> int:  # fmt: skip
        """Reserve the region of a new request and return 0, the number of its cached tokens.

        max_length: its own longest length where that is known to be less than everyone's. publish: for the block
        manager only. cached_only: the region is reserved, and none of its slots taken yet. Raises OutOfBlocks where no
        gap is long enough or the prompt is longer than the region, ValueError for a request id in use, an empty prompt,
        or a max_length above everyone's; nothing has changed then.
        """
        if request_id in self._regions:
            raise ValueError(f"request_id: expected one that is not in use, got {request_id!r}")
        length, gap = self._plan(token_ids, max_length)
        if len(token_ids) > length:
            raise OutOfBlocks(len(token_ids), length, "slots in a region")
        if gap is None:
            raise OutOfBlocks(length, max((end - start for start, end in self._gaps), default=0), "adjacent slots")
        start, end = self._gaps[gap]
        self._gaps[gap : gap + 1] = [(start + length, end)] if start + length < end else []
        tokens = 0 if cached_only else len(token_ids)
        self._regions[request_id] = Region(start, start + length, tokens, tokens)
        self.num_used_blocks += length
        self.num_tokens_held += tokens
        return 0

    def reserve(self, request_id: Hashable) -> None:
        """Take the next slot of a request's region before its token is known. Raises OutOfBlocks, or KeyError."""
        if not self.reserve_all((request_id,)):
            raise OutOfBlocks(1, 0, "more slots in a region")

    def reserve_all(self, request_ids: Sequence[Hashable], whole_blocks: bool = False) -> int:
        """``reserve`` for each of these in order until a region is full, and return how many of them got their slot.

        whole_blocks: the same, as a block is one slot.
        """
        regions = [self._regions[request_id] for request_id in request_ids]
        for done, region in enumerate(regions):
            if region.start + region.slots == region.end:
                return done
            region.slots += 1
        return len(regions)

    def reserve_slots(self, request_id: Hashable, num_slots: int) -> bool:
        """Take slots of a request's region until it has ``num_slots``. False where it is too short, or KeyError."""
        region = self._regions[request_id]
        if num_slots > region.end - region.start:
            return False
        region.slots = max(region.slots, num_slots)
        return True

    def append(self, request_id: Hashable, token_id: int) -> None:
        """Put a known token into a request's first reserved slot, else into a new one. Raises OutOfBlocks, or KeyError."""
        region = self._regions[request_id]
        if region.slots == region.tokens:
            self.reserve(request_id)
        self.extend(request_id, (token_id,))

    def extend(self, request_id: Hashable, token_ids: Sequence[int]) -> None:
        """Put known tokens into a request's first reserved slots. Raises ValueError where they are fewer, or KeyError."""
        region = self._regions[request_id]
        if region.tokens + len(token_ids) > region.slots:
            reserved = region.slots - region.tokens
            raise ValueError(f"token_ids: {request_id!r} has {reserved} reserved slots, got {len(token_ids)} tokens")
        region.tokens += len(token_ids)
        self.num_tokens_held += len(token_ids)

    def free(self, request_id: Hashable) -> None:
        """Give back a request's region, as one gap with those that it touches. Raises KeyError for an unknown id."""
        region = self._regions[request_id]
        del self._regions[request_id]
        self.num_used_blocks -= region.end - region.start
        self.num_tokens_held -= region.tokens
        gaps: list[tuple[int, int]] = []
        for start, end in sorted([*self._gaps, (region.start, region.end)]):
            first = gaps.pop()[0] if gaps and gaps[-1][1] == start else start
            gaps.append((first, end))
        self._gaps = gaps

    def start(self, request_id: Hashable) -> int:
        """The first slot of a request's region. Raises KeyError."""
        return self._regions[request_id].start

    def block_table(self, request_id: Hashable) -> range:
        """The slots a request has taken, in the order of its tokens. Raises KeyError."""
        region = self._regions[request_id]
        return range(region.start, region.start + region.slots)

    def num_tokens(self, request_id: Hashable) -> int:
        """How many tokens of a request are known; reserved slots do not count. Raises KeyError."""
        return self._regions[request_id].tokens

    def check(self) -> None:
        """Raise AssertionError where gaps and regions do not tile the slots, or a count is wrong."""
        regions = list(self._regions.values())
        pieces = sorted(self._gaps + [(region.start, region.end) for region in regions])
        ends = [0, *(end for _, end in pieces)]
        assert [*(start for start, _ in pieces), self.num_blocks] == ends, f"the slots are not tiled: {pieces}"
        assert all(start < end for start, end in pieces), f"an empty piece in {pieces}"
        assert self._gaps == sorted(self._gaps), f"gaps out of order: {self._gaps}"
        assert not {start for start, _ in self._gaps} & {end for _, end in self._gaps}, f"gaps touch: {self._gaps}"
        for region in regions:
            assert 0 <= region.tokens <= region.slots <= region.end - region.start, f"too much in {region}"
        assert self.num_used_blocks == sum(region.end - region.start for region in regions), "reserved slots miscounted"
        assert self.num_tokens_held == sum(region.tokens for region in regions), "tokens miscounted"

    def _plan(self, token_ids: Sequence[int], max_length: int | None) -> tuple[int, int | None]:
        """How long the region must be, and the index of the first gap that has room for it."""
        if len(token_ids) == 0:
            raise ValueError("token_ids: expected at least one token, got none")
        length = self.max_length if max_length is None else max_length
        if not 0 < length <= self.max_length:
            raise ValueError(f"max_length: expected 1 to {self.max_length}, got {length}")
        return length, next((i for i, (start, end) in enumerate(self._gaps) if end - start >= length), None)
