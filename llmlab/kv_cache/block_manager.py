"""Which block of the KV cache holds which tokens of which request.

The cache is cut into blocks of ``block_size`` slots; a slot holds the keys and values of one token, and a request's
block table lists its blocks in the order of its tokens. Blocks are taken as the request grows, shared by requests with
equal prefixes, copied when one of the sharers writes, and can still be found after they are freed, until they are
reused. Only numbers are kept here: the tensors, and the copying, are the caller's.

Source: Kwon et al. 2023 (PagedAttention, arXiv:2309.06180), sections 4.2 to 4.4; the hashes are those of later vLLM.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import replace
from hashlib import sha256

from llmlab.arguments import checked, instance_of, integer
from llmlab.kv_cache.block_pool import BlockPool, OutOfBlocks, block_hash, token_array
from llmlab.kv_cache.held import ById, Held


class BlockManager:
    """Allocate, share, copy and free the blocks of a paged KV cache.

    num_blocks, block_size: blocks in the pool, and slots (tokens) in a block.
    prefix_caching: whether full blocks are found again by their contents.
    salt: goes into the hash of every block, so that contents of different owners never match.

    A full block can be hit once its tokens are said to be written: by ``allocate(publish=True)``, ``publish`` or
    ``append``. Say so when the step that writes these slots is launched, and never of a token whose keys and values
    will not be computed, such as the last one of a finished request. Source: Kwon et al. 2023.
    """

    @checked(
        num_blocks=integer(at_least=1), block_size=integer(at_least=1),
        prefix_caching=instance_of(bool), salt=instance_of(bytes),
    )  # fmt: skip
    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True, salt: bytes = b"") -> None:
        self.num_blocks, self.block_size, self.prefix_caching = num_blocks, block_size, prefix_caching
        self.max_length = num_blocks * block_size  # tokens of the longest request that can ever be held
        self.num_tokens_held = 0
        self._root = sha256(salt).digest()
        self._pool = BlockPool(num_blocks)
        self._requests: ById[Held] = ById()
        self._copies: dict[int, int] = {}  # destination -> source

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds, those that can still be hit included."""
        return self._pool.num_free()

    @property
    def num_used_blocks(self) -> int:
        """Blocks that at least one request holds, each counted once; ``num_tokens_held`` of their slots hold a known token.

        Reserved slots are not among those. The waste is 1 - num_tokens_held / (num_used_blocks · block_size).
        """
        return self.num_blocks - self.num_free_blocks

    def can_allocate(self, token_ids: Sequence[int], owed: int = 0) -> bool:
        """Whether ``allocate`` would find its blocks now, and leave ``owed`` others free. Raises ValueError for an empty prompt."""
        if 0 < len(token_ids) <= (self.num_free_blocks - owed) * self.block_size:
            return True  # hits can only lower what is wanted: nothing need be hashed
        _, _, wanted, free = self._plan(token_ids)
        return wanted <= free - owed

    def allocate(
        self, request_id: Hashable, token_ids: Sequence[int], publish: bool = True, cached_only: bool = False
    ) -> int:
        """Take the blocks of a new request's prompt, and return how many of its tokens are cached already.

        That is a multiple of block_size and less than the prompt: the model must see a token to yield the next one.
        publish: whether the full blocks can be hit at once; where not, ``publish`` says when.
        cached_only: begin with the cached tokens alone; the others come by ``reserve_slots`` and ``extend``.
        Raises OutOfBlocks, ValueError for a request id in use or an empty prompt; nothing has changed then.
        """
        if request_id in self._requests:
            raise ValueError(f"request_id: expected one that is not in use, got {request_id!r}")
        tokens, hits, wanted, free = self._plan(token_ids)
        size, pool = self.block_size, self._pool
        if cached_only:
            tokens, wanted = tokens[: len(hits) * size], 0
        if wanted > free:
            raise OutOfBlocks(wanted, free)
        for block in hits:  # all of them before a block is taken: none is evicted for the request that hit it
            if not pool.references[block]:
                self.num_tokens_held += size
            pool.share(block)
        table = hits + [pool.take() for _ in range(wanted)]
        cached = len(hits) * size
        self.num_tokens_held += len(tokens) - cached
        hash_at = cached + size if self.prefix_caching else 0
        self._requests[request_id] = request = Held(table, tokens, len(tokens), len(table) * size, hash_at)
        if publish:
            self._publish(request, len(tokens))
        return cached

    def publish(self, request_id: Hashable, num_tokens: int) -> None:
        """Let the full blocks among a request's first tokens be hit: their writes are launched. Raises ValueError, KeyError."""
        request = self._requests[request_id]
        if not 0 <= num_tokens <= len(request.tokens):
            raise ValueError(f"num_tokens: expected 0 to the {len(request.tokens)} of {request_id!r}, got {num_tokens}")
        self._publish(request, num_tokens)

    def reserve(self, request_id: Hashable) -> None:
        """Take a slot for a request's next token before the token is known. Raises OutOfBlocks, or KeyError."""
        if not self.reserve_all((request_id,)):
            raise OutOfBlocks(1, 0)

    def reserve_all(self, request_ids: Sequence[Hashable], whole_blocks: bool = False) -> int:
        """``reserve`` for each of these in order until blocks run out, and return how many of them got their slot.

        Only a request at the end of its last block takes a new one, and who shares its unfilled last block takes a copy.
        whole_blocks: take all slots of the block, too. Raises KeyError for an unknown id; nothing has changed then.
        """
        held = self._requests
        requests = [held[request_id] for request_id in request_ids]
        for done, request in enumerate(requests):
            slots = request.slots
            if slots == request.limit and not self._make_room(request):
                return done
            request.slots = request.limit if whole_blocks else slots + 1
        return len(requests)

    def reserve_slots(self, request_id: Hashable, num_slots: int) -> bool:
        """Take whole blocks until a request has ``num_slots`` slots. False where they are not free, and nothing has changed.

        Raises KeyError.
        """
        request, pool, size = self._requests[request_id], self._pool, self.block_size
        blocks = max(0, -(-num_slots // size) - len(request.table))
        copied = request.limit < len(request.table) * size and pool.references[request.table[-1]] > 1
        if num_slots > request.limit and blocks + copied > pool.num_free():
            return False
        if num_slots > request.slots:
            if copied:
                self._make_room(request)
            request.table += [pool.take() for _ in range(blocks)]
            request.slots = request.limit = len(request.table) * size
        return True

    def append(self, request_id: Hashable, token_id: int) -> None:
        """Put a known token into a request's first reserved slot, else into a new one; a block that fills can be hit from now on.

        One that fills while an earlier one is unpublished waits for the next ``publish``. Raises OutOfBlocks, KeyError,
        TypeError; nothing has changed then.
        """
        request, tokens = self._requests[request_id], token_array((token_id,))
        if request.slots == len(request.tokens):
            self.reserve(request_id)
        self.extend(request_id, tokens)

    def extend(self, request_id: Hashable, token_ids: Sequence[int]) -> None:
        """``append`` several tokens, into reserved slots. Raises ValueError where they are fewer, KeyError, or TypeError."""
        request, tokens = self._requests[request_id], token_array(token_ids)
        if len(request.tokens) + len(tokens) > request.slots:
            room = request.slots - len(request.tokens)
            raise ValueError(f"token_ids: {request_id!r} has {room} reserved slots, got {len(tokens)} tokens")
        waits = request.hash_at <= len(request.tokens)  # an earlier block is not published
        request.tokens.extend(tokens)
        self.num_tokens_held += len(tokens)
        if not waits:
            self._publish(request, len(request.tokens))

    def fork(self, parent_id: Hashable, child_id: Hashable) -> None:
        """Give a new request all tokens of another by sharing its blocks; who writes to a shared tail copies it first.

        Fork before slots are reserved: a reserved slot has one writer. What is not published yet, each publishes for
        itself. Raises ValueError, or KeyError. Source: Kwon et al. 2023, section 4.4.
        """
        parent = self._requests[parent_id]
        if child_id in self._requests:
            raise ValueError(f"child_id: expected one that is not in use, got {child_id!r}")
        if reserved := parent.slots - len(parent.tokens):
            raise ValueError(f"parent_id: expected a request without reserved slots, {parent_id!r} has {reserved}")
        for block in parent.table:
            self._pool.share(block)
        parent.limit = parent.slots  # neither may go on without a look at the tail
        self._requests[child_id] = replace(parent, table=parent.table[:], tokens=parent.tokens[:])

    def take_copies(self) -> list[tuple[int, int]]:
        """The (source, destination) blocks to copy before the next step writes, each told once, no destination twice.

        Read all sources before any destination is written: a source can be the destination of a later copy.
        """
        copies = [(source, destination) for destination, source in self._copies.items()]
        self._copies.clear()
        return copies

    def free(self, request_id: Hashable) -> None:
        """Drop a request; its published blocks can be hit until they are reused. Raises KeyError for an unknown id."""
        request = self._requests[request_id]
        del self._requests[request_id]
        table, size = request.table, self.block_size
        while table:  # from the last one down: a leaf is reused before the blocks that lead to it
            block = table.pop()
            if self._pool.drop(block):
                self.num_tokens_held -= min(size, max(0, len(request.tokens) - len(table) * size))
                self._copies.pop(block, None)

    def block_table(self, request_id: Hashable) -> list[int]:
        """A request's blocks in the order of its tokens: the live list, for reading only. Raises KeyError."""
        return self._requests[request_id].table

    def num_tokens(self, request_id: Hashable) -> int:
        """How many tokens of a request are known; reserved slots do not count. Raises KeyError."""
        return len(self._requests[request_id].tokens)

    def check(self) -> None:
        """Raise AssertionError where what is kept differs from what the block tables say. Slow, for tests."""
        size, references = self.block_size, [0] * self.num_blocks
        filled: dict[int, set[int]] = {}
        for name, request in self._requests.items():
            tokens, slots, table = len(request.tokens), request.slots, request.table
            room = len(table) * size
            assert 0 <= tokens <= slots, f"{name!r}: {tokens} tokens in {slots} slots"
            assert room - size < slots <= room, f"{name!r}: {slots} slots in {len(table)} blocks of {size}"
            assert request.limit in (slots, room), f"{name!r}: limit {request.limit}, but {slots} of {room} slots"
            assert request.limit == slots or self._pool.references[table[-1]] == 1, f"{name!r} writes to a shared block"
            assert len(set(table)) == len(table), f"{name!r} lists a block twice"
            for index, block in enumerate(table):
                full, end = tokens >= (index + 1) * size, (index + 1) * size
                references[block] += 1
                filled.setdefault(block, set()).add(size if full else max(0, tokens - index * size))
                assert self._pool.hashes[block] or end >= request.hash_at, f"published block {block} has no name"
                assert full or not self._pool.hashes[block], f"block {block} has a name before it is full"
        self._pool.check(references)
        assert all(len(counts) == 1 for counts in filled.values()), f"sharers fill a block differently: {filled}"
        held = sum(max(counts) for counts in filled.values())
        assert held == self.num_tokens_held, f"{self.num_tokens_held} tokens counted, {held} held"
        assert all(references[block] for block in self._copies), f"a copy to a block that nobody holds: {self._copies}"

    def _plan(self, token_ids: Sequence[int]) -> tuple[array[int], list[int], int, int]:
        """A prompt's tokens, the cached blocks it starts with, how many more it wants, and how many are free for it."""
        tokens, hits = token_array(token_ids), []
        if not tokens:
            raise ValueError("token_ids: expected at least one token, got none")
        size, name = self.block_size, self._root
        # The range ends before the last token. The last block of a prompt that is cached to its end is computed again,
        # in a block of its own: the model needs only its last token, but writing that into the cached block would
        # change it under those who read it, for the same values computed in another batch may be rounded otherwise.
        for end in range(size, len(tokens), size) if self.prefix_caching else ():
            name = block_hash(name, tokens[end - size : end])
            block = self._pool.find(name)
            if block is None:
                break
            hits.append(block)
        matched_free = sum(not self._pool.references[block] for block in hits)
        return tokens, hits, -(-len(tokens) // size) - len(hits), self.num_free_blocks - matched_free

    def _make_room(self, request: Held) -> bool:
        """Raise a request's limit: by a new block, by a copy of a shared tail, or by seeing that it is not shared."""
        pool, table = self._pool, request.table
        at_end = request.slots == len(table) * self.block_size
        if at_end or pool.references[table[-1]] > 1:
            if not pool.num_free():
                return False
            block = pool.take()
            if at_end:
                table.append(block)
            else:
                self._copies[block] = self._copies.get(table[-1], table[-1])  # what the tail itself is to be a copy of
                pool.drop(table[-1])
                table[-1] = block
                self.num_tokens_held += request.slots % self.block_size
        request.limit = len(table) * self.block_size
        return True

    def _publish(self, request: Held, num_tokens: int) -> None:
        """Name the full blocks among a request's first tokens, from the first that is not published."""
        size, pool, table = self.block_size, self._pool, request.table
        while 0 < request.hash_at <= num_tokens:
            index = request.hash_at // size - 1
            previous = pool.hashes[table[index - 1]] if index else self._root
            assert previous is not None
            pool.publish(table[index], block_hash(previous, request.tokens[index * size : request.hash_at]))
            request.hash_at += size
