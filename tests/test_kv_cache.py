"""The KV cache's bookkeeping, against a brute-force model and against what the slots really hold.

The numbers are those of the invariants that the block manager has to keep.
"""

import collections
import copy
import hashlib
import inspect
import random
import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmlab.kv_cache import BlockManager, ContiguousReservation, OutOfBlocks, block_manager


def snapshot(manager):
    """Everything a manager keeps, orders included."""
    return repr({**vars(manager), "_pool": vars(manager._pool)} if hasattr(manager, "_pool") else vars(manager))


class Full(Exception):
    """The model has no free block."""


class Model:
    """What a block manager should do, by searching lists: no counters, no hashes, no index."""

    def __init__(self, num_blocks, block_size, prefix_caching):
        self.size, self.caching = block_size, prefix_caching
        self.free = list(range(num_blocks))  # in the order in which blocks were given back
        self.contents = {}  # block -> all tokens from the first on to its end, for blocks that can be hit
        self.tables, self.tokens, self.reserved, self.published = {}, {}, {}, {}
        self.copied = set()  # blocks that wait for their copy
        self.seen = collections.Counter()

    def references(self, block):
        return sum(block in table for table in self.tables.values())

    def take(self):
        if not self.free:
            raise Full
        block = next((b for b in self.free if b not in self.contents), self.free[0])
        self.free.remove(block)
        self.seen["evictions"] += block in self.contents
        self.contents.pop(block, None)
        return block

    def match(self, tokens):
        hits = []
        for end in range(self.size, len(tokens), self.size):
            found = [b for b, content in self.contents.items() if content == tuple(tokens[:end])]
            if not found:
                break
            hits.append(found[0])
        return hits

    def allocate(self, name, tokens, publish, cached_only=False):
        hits = self.match(tokens)
        if cached_only:
            tokens = tokens[: len(hits) * self.size]
        wanted = -(-len(tokens) // self.size) - len(hits)
        if wanted > len(set(self.free) - set(hits)):
            raise Full
        self.free = [b for b in self.free if b not in hits]
        self.tables[name] = hits + [self.take() for _ in range(wanted)]
        self.tokens[name], self.reserved[name], self.published[name] = list(tokens), 0, len(hits)
        if publish:
            self.publish(name, len(tokens))
        self.seen["hits"] += len(hits)
        self.seen["free hits"] += sum(self.references(block) == 1 for block in hits)
        return len(hits) * self.size

    def publish(self, name, num_tokens):
        for index in range(self.published[name], num_tokens // self.size if self.caching else 0):
            block = self.tables[name][index]
            self.contents.setdefault(block, tuple(self.tokens[name][: (index + 1) * self.size]))
            self.published[name] = index + 1

    def reserve(self, name):
        table, slots = self.tables[name], len(self.tokens[name]) + self.reserved[name]
        if slots == len(table) * self.size:
            table.append(self.take())
        elif self.references(table[-1]) > 1:
            block = self.take()
            table[-1] = block
            self.copied.add(block)
            self.seen["copies"] += 1
        self.reserved[name] += 1

    def reserve_slots(self, name, num_slots):
        """One slot after the other, to the end of a block, in a copy that takes this one's place where all of them are free."""
        trial, size = copy.deepcopy(self), self.size
        try:
            while len(trial.tokens[name]) + trial.reserved[name] < num_slots:
                trial.reserve(name)
                while (len(trial.tokens[name]) + trial.reserved[name]) % size:
                    trial.reserve(name)
        except Full:
            return False
        vars(self).update(vars(trial))
        return True

    def append(self, name, token):
        if not self.reserved[name]:
            self.reserve(name)
        self.reserved[name] -= 1
        self.tokens[name].append(token)
        if len(self.tokens[name]) == (self.published[name] + 1) * self.size:
            self.publish(name, len(self.tokens[name]))

    def fork(self, parent, child):
        for kept in (self.tables, self.tokens, self.reserved, self.published):
            kept[child] = copy.copy(kept[parent])

    def drop(self, name):
        table = self.tables[name]
        while table:
            block = table.pop()
            if not self.references(block):
                self.free.append(block)
                self.copied.discard(block)
        for kept in (self.tables, self.tokens, self.reserved, self.published):
            del kept[name]


class Pair:
    """A block manager, its model, and a memory of slots into which tokens are written as an engine would."""

    def __init__(self, num_blocks, block_size, prefix_caching=True):
        self.manager = BlockManager(num_blocks, block_size, prefix_caching)
        self.model = Model(num_blocks, block_size, prefix_caching)
        self.memory = [["never written"] * block_size for _ in range(num_blocks)]
        self.written = {}  # request -> for each of its tokens, whether its slot was written
        self.past = []  # the tokens of requests that are gone
        self.count = 0

    def new_name(self):
        self.count += 1
        return f"request {self.count}"

    def both(self, on_manager, on_model):
        """The same result of both, or OutOfBlocks of both and a manager that has not changed."""
        before = snapshot(self.manager)
        try:
            expected = on_model()
        except Full:
            with pytest.raises(OutOfBlocks):
                on_manager()
            assert snapshot(self.manager) == before
            self.model.seen["failures"] += 1
            return None
        result = on_manager()
        assert result == expected
        return True if result is None else result

    def allocate(self, tokens, publish=True, cached_only=False):
        name = self.new_name()
        before = snapshot(self.manager)
        possible = [self.manager.can_allocate(tokens, owed) for owed in range(self.manager.num_blocks + 1)]
        assert snapshot(self.manager) == before
        wanted = -(-len(tokens) // self.model.size) - len(hits := self.model.match(tokens))
        assert possible == [wanted + owed <= len(set(self.model.free) - set(hits)) for owed in range(len(possible))]
        cached = self.both(
            lambda: self.manager.allocate(name, tokens, publish, cached_only),
            lambda: self.model.allocate(name, tokens, publish, cached_only),
        )
        assert cached_only or possible[0] == (cached is not None)
        if cached is not None:
            self.written[name] = [True] * cached + [False] * (len(self.model.tokens[name]) - cached)
            if publish:
                self.launch(name, len(self.model.tokens[name]))
        return name

    def chunk(self, name, tokens):
        """Slots for the next tokens of a prompt, which are reserved first, then known and written; False where they are not free."""
        before, known = snapshot(self.manager), len(self.model.tokens[name])
        if not self.model.reserve_slots(name, known + len(tokens)):
            assert not self.manager.reserve_slots(name, known + len(tokens))
            assert snapshot(self.manager) == before
            self.model.seen["chunks without blocks"] += 1
            return False
        assert self.manager.reserve_slots(name, known + len(tokens))
        self.compare()
        self.manager.extend(name, tokens)
        for token in tokens:
            self.model.append(name, token)
        self.written[name] += [False] * len(tokens)
        self.launch(name, known + len(tokens))
        return True

    def publish(self, name, num_tokens):
        self.both(lambda: self.manager.publish(name, num_tokens), lambda: self.model.publish(name, num_tokens))
        self.launch(name, num_tokens)

    def reserve_all(self, names):
        granted = 0
        try:
            for name in names:
                self.model.reserve(name)
                granted += 1
        except Full:
            pass
        assert self.manager.reserve_all(names) == granted
        if granted < len(names):
            before = snapshot(self.manager)
            with pytest.raises(OutOfBlocks, match="wanted 1 more blocks, 0 free"):
                self.manager.reserve(names[granted])
            assert snapshot(self.manager) == before

    def append(self, name, token, launch=True):
        """launch: whether a step writes the token at once; who fills a block does not wait, for it may be hit from now on."""
        if self.both(lambda: self.manager.append(name, token), lambda: self.model.append(name, token)):
            self.written[name].append(False)
            if launch or len(self.written[name]) % self.model.size == 0:
                self.launch(name, len(self.written[name]))

    def fork(self, parent):
        child = self.new_name()
        if self.model.reserved[parent]:
            before = snapshot(self.manager)
            with pytest.raises(ValueError, match="parent_id"):
                self.manager.fork(parent, child)
            assert snapshot(self.manager) == before
            return parent
        self.manager.fork(parent, child)
        self.model.fork(parent, child)
        self.written[child] = self.written[parent].copy()
        return child

    def free(self, name):
        self.past.append(self.model.tokens[name])
        self.manager.free(name)
        self.model.drop(name)
        del self.written[name]

    def apply_copies(self):
        copies = self.manager.take_copies()
        assert {to for _, to in copies} == self.model.copied
        assert len(copies) == len(self.model.copied)
        contents = [self.memory[source].copy() for source, _ in copies]
        for (_, to), content in zip(copies, contents, strict=True):
            self.memory[to] = content
        self.model.copied.clear()

    def launch(self, name, num_tokens):
        """A step: what was to be copied is copied, then the first tokens of a request are written to their slots."""
        self.apply_copies()
        for position in range(num_tokens):
            if not self.written[name][position]:
                index, offset = divmod(position, self.model.size)
                block, token = self.manager.block_table(name)[index], self.model.tokens[name][position]
                for other, table in self.model.tables.items():
                    if block in table:
                        assert self.model.tokens[other][position] == token, "another request reads this slot"
                self.memory[block][offset] = token
                self.written[name][position] = True
        self.read_back()

    def read_back(self):
        """Every request finds every token that was written for it, through its block table."""
        for block in self.model.free:
            if block not in self.model.contents:
                self.memory[block] = [f"junk {self.count}"] * self.model.size
        for name, tokens in self.model.tokens.items():
            for position, token in enumerate(tokens):
                if self.written[name][position]:
                    index, offset = divmod(position, self.model.size)
                    assert self.memory[self.manager.block_table(name)[index]][offset] == token

    def compare(self):
        self.manager.check()
        model, manager = self.model, self.manager
        filled = set()
        for name, table in model.tables.items():
            assert manager.block_table(name) == table
            assert manager.num_tokens(name) == len(model.tokens[name])
            filled |= {(table[p // model.size], p % model.size) for p in range(len(model.tokens[name]))}
        used = {block for table in model.tables.values() for block in table}
        assert manager.num_free_blocks == len(model.free) == manager.num_blocks - len(used)
        assert manager.num_used_blocks == len(used)
        assert manager.num_tokens_held == len(filled)


TOKENS = st.integers(0, 1)
PICK = st.integers(0, 10**6)


class Machine(RuleBasedStateMachine):
    """Any order of operations on few blocks and two kinds of tokens, so that hits, forks and shortage are common."""

    caching = True

    def __init__(self):
        super().__init__()
        self.pair = None

    @precondition(lambda self: self.pair is None)
    @rule(num_blocks=st.integers(1, 9), block_size=st.integers(1, 4))
    def create(self, num_blocks, block_size):
        self.pair = Pair(num_blocks, block_size, self.caching)

    def names(self, picks):
        names = list(self.pair.model.tables)
        return list(dict.fromkeys(names[pick % len(names)] for pick in picks))

    held = precondition(lambda self: self.pair is not None and self.pair.model.tables)

    @precondition(lambda self: self.pair is not None)
    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=14), publish=st.booleans())
    def allocate(self, tokens, publish):
        self.pair.allocate(tokens, publish)

    @held
    @rule(pick=PICK, tokens=st.lists(TOKENS, min_size=1, max_size=6), cut=st.integers(0, 4))
    def allocate_with_a_prefix_that_is_there(self, pick, tokens, cut):
        (name,) = self.names([pick])
        known = self.pair.model.tokens[name]
        self.pair.allocate(known[: max(0, len(known) - cut)] + tokens)

    @precondition(lambda self: self.pair is not None and self.pair.past)
    @rule(pick=PICK, tokens=st.lists(TOKENS, min_size=1, max_size=6), cut=st.integers(0, 4))
    def allocate_with_a_prefix_that_was_there(self, pick, tokens, cut):
        known = self.pair.past[pick % len(self.pair.past)]
        self.pair.allocate(known[: max(0, len(known) - cut)] + tokens)

    @precondition(lambda self: self.pair is not None)
    @rule(picks=st.lists(PICK, max_size=1), tokens=st.lists(TOKENS, min_size=1, max_size=14))
    def allocate_what_is_cached(self, picks, tokens):
        known = self.pair.past[picks[0] % len(self.pair.past)] if picks and self.pair.past else []
        self.pair.allocate([*known, *tokens], cached_only=True)

    @held
    @rule(pick=PICK, tokens=st.lists(TOKENS, min_size=1, max_size=9))
    def chunk(self, pick, tokens):
        self.pair.chunk(*self.names([pick]), tokens)

    @held
    @rule(pick=PICK, missing=st.integers(0, 6))
    def publish(self, pick, missing):
        (name,) = self.names([pick])
        self.pair.publish(name, max(0, len(self.pair.model.tokens[name]) - missing))

    @held
    @rule(picks=st.lists(PICK, max_size=5))
    def reserve(self, picks):
        self.pair.reserve_all(self.names(picks))

    @held
    @rule(picks=st.lists(PICK, max_size=5), tokens=st.lists(TOKENS, min_size=5, max_size=5), launch=st.booleans())
    def append(self, picks, tokens, launch):
        for name, token in zip(self.names(picks), tokens, strict=False):
            self.pair.append(name, token, launch)

    @held
    @rule(pick=PICK)
    def fork(self, pick):
        self.pair.fork(*self.names([pick]))

    @held
    @rule(pick=PICK)
    def free(self, pick):
        self.pair.free(*self.names([pick]))

    @invariant()
    def agrees(self):
        if self.pair is not None:
            self.pair.compare()

    def teardown(self):
        if self.pair is not None:
            self.pair.apply_copies()
            self.pair.read_back()
            for name in list(self.pair.model.tables):
                self.pair.free(name)
            self.pair.compare()
            assert self.pair.manager.num_free_blocks == self.pair.manager.num_blocks


class MachineWithoutCaching(Machine):
    caching = False


class TestAnyOrderOfOperations(Machine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class TestAnyOrderOfOperationsWithoutCaching(MachineWithoutCaching.TestCase):
    settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("caching", [True, False])
def test_ten_thousand_operations_keep_every_block_accounted_for(caching):
    """Invariants 1, 10, 14: free and referenced blocks are all blocks, after each of 10,000 random operations."""
    rng = random.Random(7)
    pair = Pair(24, 4, caching)
    for _ in range(10_000):
        names = list(pair.model.tables)
        some = rng.sample(names, min(len(names), rng.randint(1, 6)))
        operation = rng.choices(("allocate", "chunk", "publish", "reserve", "append", "fork", "free"),
                                (20, 5, 5, 10, 40, 12, 24))[0]  # fmt: skip
        if operation == "allocate" or not names:
            start = rng.choice([[], *pair.past[-5:], *(pair.model.tokens[name] for name in some)])
            start = start[: rng.randint(0, 20)]
            tokens = start + [rng.randint(0, 2) for _ in range(rng.randint(1, 12))]
            pair.allocate(tokens, publish=rng.random() < 0.7, cached_only=rng.random() < 0.3)
        elif operation == "chunk":
            pair.chunk(some[0], [rng.randint(0, 2) for _ in range(rng.randint(1, 12))])
        elif operation == "publish":
            pair.publish(some[0], rng.randint(0, len(pair.model.tokens[some[0]])))
        elif operation == "reserve":
            pair.reserve_all(some)
        elif operation == "append":
            launch = rng.random() < 0.5
            for name in some:
                pair.append(name, rng.randint(0, 2), launch)
        elif operation == "fork":
            pair.fork(some[0])
        else:
            pair.free(some[0])
        pair.compare()
    usual = ("failures", "chunks without blocks", "copies")
    for what in (*usual, *(("hits", "free hits", "evictions") if caching else ())):
        assert pair.model.seen[what] > 100, pair.model.seen
    for name in list(pair.model.tables):
        pair.free(name)
    pair.compare()
    assert pair.manager.num_free_blocks == 24


def prompt(length, first=100):
    return list(range(first, first + length))


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("full", [0, 1, 3])
def test_a_prompt_takes_its_blocks_and_only_full_ones_can_be_hit(block_size, full):
    """Invariant 2: k full blocks and r > 0 tokens take k + 1 blocks; exactly the k are hashed."""
    for rest in range(1, block_size):
        manager = BlockManager(10, block_size)
        tokens = prompt(full * block_size + rest)
        assert manager.allocate("a", tokens) == 0
        assert len(manager.block_table("a")) == manager.num_used_blocks == full + 1
        hashes = manager._pool.hashes
        assert [hashes[block] is not None for block in manager.block_table("a")] == [True] * full + [False]
        # Seen from outside: a longer prompt hits the full blocks and not the partial one.
        assert manager.allocate("b", [*tokens, *prompt(block_size, 900)]) == full * block_size
        manager.check()


def test_a_block_is_the_same_only_after_the_same_tokens():
    """Invariant 3: equal tokens after another prefix never hit, whatever differs, and however little."""
    manager = BlockManager(100, 4)
    first, second = prompt(4), prompt(4, 500)
    manager.allocate("a", [*first, *second, 1])
    assert manager.allocate("second alone", [*second, 1]) == 0
    assert manager.allocate("another before", [*prompt(4, 700), *second, 1]) == 0
    assert manager.allocate("in another order", [*first[::-1], *second, 1]) == 0
    assert manager.allocate("one bit", [*first[:3], first[3] ^ 1, *second, 1]) == 0
    assert manager.allocate("a high bit", [*first[:3], first[3] + 2**32, *second, 1]) == 0
    assert manager.allocate("negative", [-token for token in first] + [1]) == 0
    assert manager.allocate("shifted", [0, *first, *second, 1]) == 0
    assert manager.allocate("the same", [*first, *second, 1]) == 8


@pytest.mark.parametrize("salt", [b"", b"tenant"])
def test_the_hash_covers_salt_prefix_and_tokens(salt):
    """Invariant 3: the chain, computed by hand from its definition."""
    manager = BlockManager(4, 2, salt=salt)
    manager.allocate("a", [7, 8, 2**40, -1, 5])
    root = hashlib.sha256(salt).digest()
    first = hashlib.sha256(root + struct.pack("=2q", 7, 8)).digest()
    second = hashlib.sha256(first + struct.pack("=2q", 2**40, -1)).digest()
    assert [manager._pool.hashes[block] for block in manager.block_table("a")] == [first, second, None]


def test_salts_isolate():
    """Invariant 3: with another salt no block has the hash that its tokens have elsewhere."""
    hashes = []
    for salt in (b"", b"one", b"two"):
        manager = BlockManager(8, 2, salt=salt)
        manager.allocate("a", prompt(9))
        hashes.append({name for name in manager._pool.hashes if name})
    assert [len(names) for names in hashes] == [4, 4, 4]
    assert len(set.union(*hashes)) == 12


def test_a_second_request_shares_the_prefix_and_takes_only_its_suffix():
    """Invariant 4: the same block ids, counted twice; only the suffix is allocated."""
    manager = BlockManager(20, 4)
    shared = prompt(12)
    manager.allocate("a", [*shared, 1, 2])
    assert manager.num_used_blocks == 4
    assert manager.allocate("b", [*shared, 3, 4, 5, 6, 7]) == 12
    assert manager.block_table("b")[:3] == manager.block_table("a")[:3]
    assert not set(manager.block_table("b")[3:]) & set(manager.block_table("a"))
    assert manager.num_used_blocks == 4 + 2
    assert manager.num_tokens_held == 14 + 5
    assert [manager._pool.references[block] for block in manager.block_table("b")] == [2, 2, 2, 1, 1]
    manager.free("a")
    assert manager.num_used_blocks == 5  # the shared ones stay with their other owner
    manager.check()


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_hit_leaves_a_token_to_compute_in_a_block_of_its_own(block_size):
    """Invariants 4 and 5: of a prompt that is cached to its end the last block is private."""
    for blocks in (1, 2, 3):
        manager = BlockManager(20, block_size)
        tokens = prompt(blocks * block_size)
        manager.allocate("a", tokens)
        assert manager.allocate("b", tokens) == (blocks - 1) * block_size
        assert manager.block_table("b")[:-1] == manager.block_table("a")[:-1]
        assert manager.block_table("b")[-1] != manager.block_table("a")[-1]
        assert manager.allocate("c", [*tokens, 5]) == blocks * block_size
        manager.check()


def test_freed_blocks_are_hit_until_they_are_reused():
    """Invariant 6: and a hit takes the block off the free list."""
    manager = BlockManager(4, 2)
    tokens = prompt(4)
    manager.allocate("a", [*tokens, 1])
    table = manager.block_table("a").copy()
    manager.free("a")
    assert manager.num_free_blocks == 4
    assert manager.allocate("b", [*tokens, 2]) == 4
    assert manager.block_table("b")[:2] == table[:2]
    assert manager.num_free_blocks == 1
    manager.free("b")
    manager.allocate("c", prompt(8, 900))  # reuses all four
    manager.free("c")
    assert manager.allocate("d", [*tokens, 3]) == 0


def test_blocks_are_reused_in_order():
    """Invariant 7: never cached first, then the longest free; of one request leaves before roots."""
    manager = BlockManager(9, 1)
    manager.allocate("old", [1, 2, 3])
    manager.allocate("young", [4, 5, 6])
    old, young = manager.block_table("old").copy(), manager.block_table("young").copy()
    manager.allocate("unpublished", [7, 8, 9], publish=False)
    never_cached = manager.block_table("unpublished").copy()
    for name in ("old", "young", "unpublished"):
        manager.free(name)
    taken = []
    for index in range(9):
        manager.allocate(index, [100 + index], publish=False)
        taken += manager.block_table(index)
    assert set(taken[:3]) == set(never_cached)
    assert taken[3:] == [*reversed(old), *reversed(young)]


def test_a_hit_makes_a_block_recently_used():
    """Invariant 7: the order is that of the last use, and a root outlives the leaves of both its requests."""
    manager = BlockManager(6, 1)
    manager.allocate("a", [1, 2, 3])
    root, leaf, last = manager.block_table("a")
    manager.free("a")
    manager.allocate("b", [4, 5])
    other = manager.block_table("b").copy()
    manager.free("b")
    assert manager.allocate("c", [1, 9]) == 1
    assert manager.block_table("c")[0] == root
    manager.free("c")
    taken = []
    for index in range(6):
        manager.allocate(index, [100 + index], publish=False)
        taken += manager.block_table(index)
    assert taken[0] == last  # "c" took the sixth block, which was never cached: it is cached now, and comes after
    assert taken[1:4] == [leaf, *reversed(other)]
    assert taken[5] == root


def test_as_blocks_run_short_a_prefix_is_lost_from_its_end():
    """Invariant 7, as its purpose: what is left of a freed prompt can still be hit."""
    manager = BlockManager(6, 2)
    tokens = prompt(12)
    manager.allocate("a", tokens)
    manager.free("a")
    for taken in range(1, 6):
        manager.allocate(taken, [900 + taken], publish=False)
        trial = copy.deepcopy(manager)
        for index in range(1, taken + 1):
            trial.free(index)
        assert trial.allocate("b", tokens) == min(10, 12 - 2 * taken)


def test_a_reused_block_is_forgotten():
    """Invariant 8: its hash and its entry go; nothing of the old contents is hit, the new ones are."""
    manager = BlockManager(2, 2)
    manager.allocate("a", [1, 2, 3])
    manager.free("a")
    manager.allocate("b", [5, 6, 7, 8])
    assert len(manager._pool._carriers) == 2
    manager.free("b")
    assert manager.allocate("c", [5, 6, 9]) == 2
    manager.free("c")
    assert manager.allocate("d", [1, 2, 3]) == 0
    manager.check()


def test_two_blocks_may_carry_one_hash():
    """Invariant 8: evicting one keeps the other, whichever is evicted."""
    for first in ("a", "b"):
        manager = BlockManager(4, 2)
        manager.allocate("a", [1, 2, 3], publish=False)
        manager.allocate("b", [1, 2, 3], publish=False)
        manager.publish("a", 3)
        manager.publish("b", 3)
        names = [name for name in manager._pool.hashes if name]
        assert len(names) == 2
        assert len(set(names)) == 1
        manager.free(first)
        manager.allocate("evicts", [7, 8, 9])  # takes the freed request's two blocks
        manager.free("evicts")
        assert manager.allocate("c", [1, 2, 4]) == 2
        assert manager.block_table("c")[0] == manager.block_table("b" if first == "a" else "a")[0]
        manager.check()


def test_matched_blocks_are_not_evicted_for_their_own_request():
    """Invariant 9: free blocks that are hit are taken, and do not count as available."""
    manager = BlockManager(3, 2)
    manager.allocate("a", [1, 2, 3, 4, 5])
    root, second, tail = manager.block_table("a").copy()
    manager.free("a")
    wants_four = [1, 2, 3, 4, 5, 6, 7]
    assert not manager.can_allocate(wants_four)
    with pytest.raises(OutOfBlocks, match="wanted 2 more blocks, 1 free") as caught:
        manager.allocate("b", wants_four)
    assert (caught.value.wanted, caught.value.free) == (2, 1)
    assert isinstance(caught.value, RuntimeError)
    assert manager.allocate("c", [1, 2, 3, 4, 9]) == 4
    assert manager.block_table("c") == [root, second, tail]


def test_the_oldest_blocks_are_not_evicted_when_they_are_hit():
    """Invariant 9: the matched blocks are the next to be reused, and no other is blank: others are reused instead."""
    manager = BlockManager(4, 1)
    manager.allocate("a", [1, 2])
    manager.allocate("b", [3, 4])
    matched, others = manager.block_table("a").copy(), manager.block_table("b").copy()
    manager.free("a")
    manager.free("b")
    assert manager.allocate("c", [1, 2, 5]) == 2
    assert manager.block_table("c") == [*matched, others[1]]
    manager.check()


def test_hits_on_blocks_in_use_make_room():
    """Invariant 9's other half: a prompt longer than the free blocks fits where others hold its prefix."""
    manager = BlockManager(5, 2)
    tokens = prompt(8)
    manager.allocate("a", tokens)
    assert not manager.can_allocate(prompt(3, 500))
    assert manager.can_allocate([*tokens[:6], 1])
    assert manager.can_allocate(tokens)
    assert manager.allocate("b", tokens) == 6
    assert not manager.can_allocate(tokens)


def test_a_failed_allocation_changes_nothing():
    """Invariant 10: for allocate, reserve, append and extend, with hits and forks about."""
    manager = BlockManager(6, 2)
    manager.allocate("a", [1, 2, 3, 4])
    manager.free("a")
    manager.allocate("b", [1, 2, 5])
    manager.allocate("c", [6, 7])
    manager.fork("b", "d")
    failures = (
        lambda: manager.allocate("e", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        lambda: manager.allocate("e", prompt(8, 500)),
        lambda: manager.append("nobody", 1),
        lambda: manager.append("b", "two"),  # a copy would be made first
        lambda: manager.append("b", None),
        lambda: manager.append("c", "two"),  # a block would be taken first
        lambda: manager.extend("nobody", [1]),
        lambda: manager.extend("b", [1]),
        lambda: manager.extend("b", ["two"]),
        lambda: manager.reserve_all(["b", "nobody"]),
        lambda: manager.fork("b", "c"),
        lambda: manager.fork("nobody", "f"),
        lambda: manager.publish("b", 4),
    )
    for fail in failures:
        before = snapshot(manager)
        with pytest.raises((OutOfBlocks, ValueError, KeyError, TypeError)):
            fail()
        assert snapshot(manager) == before
    manager.allocate("fills", prompt(6, 800))
    for fail in (
        lambda: manager.append("c", 1),
        lambda: manager.reserve("c"),
        lambda: manager.append("b", 1),
        lambda: manager.reserve("b"),
    ):
        before = snapshot(manager)
        with pytest.raises(OutOfBlocks):
            fail()
        assert snapshot(manager) == before
    manager.free("d")
    manager.append("b", 1)  # alone in its block now: no copy, and no block
    assert manager.take_copies() == []


def test_the_last_of_those_who_share_a_tail_keeps_it():
    """Invariant 10: so n sharers want n - 1 blocks, and who finds none is left as it was."""
    for sharers in (2, 3, 5):
        for free in range(sharers + 1):
            manager = BlockManager(2 + free, 4)
            names = list(range(sharers))
            manager.allocate(0, prompt(6))
            for name in names[1:]:
                manager.fork(0, name)
            tail = manager.block_table(0)[1]
            served = names if free >= sharers - 1 else names[:free]
            for name in served:
                manager.append(name, name)
            for name in names[len(served) :]:
                before = snapshot(manager)
                with pytest.raises(OutOfBlocks, match="wanted 1 more blocks, 0 free"):
                    manager.append(name, name)
                assert snapshot(manager) == before
            copied = served[: sharers - 1]
            assert manager.take_copies() == [(tail, manager.block_table(name)[1]) for name in copied]
            assert {manager.block_table(name)[1] for name in names[len(copied) :]} == {tail}
            assert manager.num_free_blocks == free - len(copied)
            manager.check()


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
@pytest.mark.parametrize("reserve_first", [False, True])
def test_decoding_takes_a_block_only_at_a_boundary(block_size, reserve_first):
    """Invariant 11: at every offset from 0 to the block size, slack costs nothing, and the boundary one block."""
    for offset in range(block_size + 1):
        manager = BlockManager(8, block_size)
        length = block_size + offset
        manager.allocate("a", prompt(length))
        for _ in range(2 * block_size):
            before = manager.num_used_blocks
            assert before == -(-length // block_size)
            if reserve_first:
                manager.reserve("a")
                taken = manager.num_used_blocks
                manager.append("a", length)
                assert manager.num_used_blocks == taken
            else:
                manager.append("a", length)
            assert manager.num_used_blocks - before == (1 if length % block_size == 0 else 0)
            length += 1
            assert manager.num_tokens("a") == length
            manager.check()


def test_without_caching_nothing_is_hit_and_exhaustion_is_reported():
    """Invariant 12: no hash is ever kept, and no block is reused before it is freed."""
    manager = BlockManager(4, 2, prefix_caching=False)
    tokens = prompt(4)
    assert manager.allocate("a", tokens) == 0
    manager.publish("a", 4)
    manager.append("a", 1)
    manager.append("a", 2)
    assert manager._pool.hashes == [None] * 4
    assert not manager.can_allocate(tokens)
    with pytest.raises(OutOfBlocks, match="wanted 2 more blocks, 1 free"):
        manager.allocate("b", tokens)
    manager.free("a")
    assert manager.allocate("b", tokens) == 0
    assert manager.allocate("c", tokens) == 0
    assert manager._pool.hashes == [None] * 4
    with pytest.raises(OutOfBlocks):
        manager.append("b", 1)


@pytest.mark.parametrize("children", [1, 2, 5])
@pytest.mark.parametrize("reserve_first", [False, True])
def test_a_fork_copies_the_unfilled_tail_on_the_first_write_only(children, reserve_first):
    """Invariant 13: n children share full blocks; the list of copies is exact, and the parent's block stays."""
    manager = BlockManager(20, 4)
    manager.allocate("parent", prompt(10))
    table = manager.block_table("parent").copy()
    names = [f"child {index}" for index in range(children)]
    for name in names:
        manager.fork("parent", name)
    assert manager.num_used_blocks == 3
    assert manager.take_copies() == []
    expected = []
    for index, name in enumerate(names):
        if reserve_first:
            manager.reserve(name)
        else:
            manager.append(name, index)
        assert manager.block_table(name)[:2] == table[:2]
        expected.append((table[2], manager.block_table(name)[2]))
        assert manager.num_used_blocks == 3 + index + 1
        manager.check()
    assert manager.take_copies() == expected
    assert manager.take_copies() == []
    assert len({to for _, to in expected} | {table[2]}) == children + 1
    manager.append("parent", 0)  # all others have left the tail: no copy
    for name in names:
        manager.append(name, 7)
    assert manager.take_copies() == []
    assert manager.block_table("parent") == table
    assert manager.num_tokens_held == 8 + 3 + children * (3 if reserve_first else 4)
    manager.check()


def test_the_parent_copies_when_it_writes_first():
    """Invariant 13: who writes first makes the copy, the parent too; the last sharer writes in place."""
    manager = BlockManager(20, 4)
    manager.allocate("parent", prompt(6))
    tail = manager.block_table("parent")[1]
    manager.fork("parent", "child")
    manager.append("parent", 1)
    assert manager.take_copies() == [(tail, manager.block_table("parent")[1])]
    assert manager.block_table("child")[1] == tail
    manager.append("child", 2)
    assert manager.take_copies() == []
    assert manager.block_table("child")[1] == tail


def test_a_fork_at_a_boundary_copies_nothing():
    """Invariant 13: full blocks are never copied."""
    manager = BlockManager(20, 4)
    manager.allocate("parent", prompt(8))
    manager.fork("parent", "child")
    manager.append("parent", 1)
    manager.append("child", 2)
    assert manager.take_copies() == []
    assert manager.block_table("parent")[:2] == manager.block_table("child")[:2]
    assert manager.block_table("parent")[2] != manager.block_table("child")[2]


def test_copies_stay_exact_when_requests_go_before_they_are_made():
    """Invariant 13: no copy to a block that was given back, and none from a block that is still to be copied itself."""
    manager = BlockManager(20, 4)
    manager.allocate("parent", prompt(6))
    tail = manager.block_table("parent")[1]
    for name in ("goes", "stays"):
        manager.fork("parent", name)
        manager.append(name, 1)
    manager.fork("stays", "grandchild")
    manager.reserve("grandchild")
    manager.free("goes")
    manager.free("parent")
    assert manager.take_copies() == [
        (tail, manager.block_table("stays")[1]),
        (tail, manager.block_table("grandchild")[1]),
    ]
    manager.check()


def test_freeing_everything_returns_everything_and_a_double_free_raises():
    """Invariant 14: whatever was allocated, forked and reserved; the error says what is wrong."""
    manager = BlockManager(12, 4)
    manager.allocate("a", prompt(10))
    manager.fork("a", "b")
    manager.append("a", 1)
    manager.append("b", 2)
    manager.reserve_all(["a", "b", "a"])
    for name in ("a", "b"):
        manager.free(name)
    assert manager.num_free_blocks == 12
    assert manager.num_tokens_held == manager.num_used_blocks == 0
    assert manager.take_copies() == []
    for call in (
        lambda: manager.free("a"),
        lambda: manager.append("a", 1),
        lambda: manager.reserve("a"),
        lambda: manager.extend("a", [1]),
        lambda: manager.publish("a", 1),
        lambda: manager.num_tokens("a"),
        lambda: manager.block_table("a"),
        lambda: manager.fork("a", "c"),
    ):
        with pytest.raises(KeyError, match="request_id: 'a' holds nothing: never allocated, or freed already"):
            call()
    manager.check()


def test_unpublished_blocks_are_not_hit_until_they_are_published():
    """Nobody hits a block whose contents are not written: hashes come with ``publish``, by full blocks."""
    manager = BlockManager(40, 4)
    tokens = prompt(14)
    manager.allocate("a", tokens, publish=False)
    for number, (published, cached) in enumerate([(0, 0), (3, 0), (4, 4), (7, 4), (12, 12), (5, 12), (14, 12)]):
        manager.publish("a", published)
        assert manager.allocate(number, tokens, publish=False) == cached
        manager.free(number)
    manager.check()


def test_blocks_filled_by_append_are_hashed_once_all_before_them_are():
    manager = BlockManager(40, 2)
    manager.allocate("a", [1, 2, 3], publish=False)
    manager.append("a", 4)
    assert manager.allocate("b", [1, 2, 3, 4, 5]) == 0  # published itself, as other blocks
    manager.free("b")
    manager = BlockManager(40, 2)
    manager.allocate("a", [1, 2, 3], publish=False)
    manager.append("a", 4)
    manager.publish("a", 2)
    assert manager.allocate("b", [1, 2, 3, 4, 5], publish=False) == 2
    manager.publish("a", 4)
    assert manager.allocate("c", [1, 2, 3, 4, 5], publish=False) == 4
    manager.append("a", 5)
    assert manager.allocate("d", [1, 2, 3, 4, 5, 6, 7], publish=False) == 4
    manager.reserve("a")
    assert manager.allocate("e", [1, 2, 3, 4, 5, 6, 7], publish=False) == 4  # a reserved slot holds no token yet
    manager.append("a", 6)
    assert manager.allocate("f", [1, 2, 3, 4, 5, 6, 7], publish=False) == 6


def test_several_reservations_are_filled_in_order_and_freed():
    """A reserved slot holds no token; tokens that come go into the first ones, and what is left goes with the request."""
    manager = BlockManager(8, 2)
    manager.allocate("a", [1, 2, 3])
    for _ in range(4):
        manager.reserve("a")
    table = manager.block_table("a").copy()
    assert manager.num_used_blocks == len(table) == 4
    assert (manager.num_tokens("a"), manager.num_tokens_held) == (3, 3)
    for token in (4, 5, 6):
        manager.append("a", token)
        assert manager.num_tokens("a") == manager.num_tokens_held == token
        assert manager.block_table("a") == table
        manager.check()
    assert manager.allocate("b", [1, 2, 3, 4, 5, 6, 7]) == 6
    manager.free("b")
    manager.free("a")
    assert (manager.num_used_blocks, manager.num_tokens_held) == (0, 0)
    manager.check()


def test_reserve_all_stops_where_blocks_run_out_and_can_go_on():
    manager = BlockManager(4, 2)
    manager.allocate("a", [1, 2])
    manager.allocate("b", [3])
    manager.allocate("c", [4, 5])
    assert manager.reserve_all(["a", "b", "c"]) == 2
    assert manager.reserve_all(["b", "c"]) == 0  # the second slot of "b" would need a block as well
    manager.free("a")
    assert manager.reserve_all(["c", "b"]) == 2
    assert manager.reserve_all([]) == 0
    manager.check()


def test_hashing_is_done_only_where_it_decides(monkeypatch):
    """A prompt that fits anyway is not hashed, a search ends at its first miss, and without caching there is none."""
    hashed = []

    def counted(previous, tokens, original=block_manager.block_hash):
        hashed.append(len(tokens))
        return original(previous, tokens)

    monkeypatch.setattr(block_manager, "block_hash", counted)
    manager = BlockManager(10, 2)
    assert manager.can_allocate(prompt(20))
    assert len(hashed) == 0
    manager.allocate("a", prompt(6))
    assert len(hashed) == 1 + 3
    assert not manager.can_allocate(prompt(20, 500))
    assert len(hashed) == 4 + 1
    assert manager.can_allocate(prompt(20))
    assert len(hashed) == 5 + 4
    manager.publish("a", 6)
    manager.append("a", 1)
    assert len(hashed) == 9
    manager.append("a", 1)
    assert len(hashed) == 9 + 1
    hashed.clear()
    manager = BlockManager(10, 2, prefix_caching=False)
    manager.allocate("a", prompt(7))
    manager.append("a", 1)
    manager.publish("a", 8)
    assert not manager.can_allocate(prompt(20))
    assert hashed == []


@given(length=st.integers(1, 40), block_size=st.integers(1, 9), steps=st.integers(0, 20))
def test_waste_is_only_in_the_last_block(length, block_size, steps):
    """The paper's claim: less than one block a request is taken and not filled (Kwon et al. 2023, section 4.3)."""
    manager = BlockManager(100, block_size)
    manager.allocate("a", prompt(length))
    for _ in range(steps):
        manager.append("a", 1)
    assert manager.num_tokens_held == length + steps
    assert 0 <= manager.num_used_blocks * block_size - manager.num_tokens_held < block_size


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4), ValueError, "num_blocks: expected a whole number of at least 1, got 0"),
        ((4, 0), ValueError, "block_size: expected a whole number of at least 1, got 0"),
        ((1.5, 4), TypeError, "num_blocks: expected a whole number, got float 1.5"),
        ((4, True), ValueError, "block_size: expected a whole number of at least 1, got True"),
        ((4, 4, "yes"), TypeError, "prefix_caching: expected a bool, got str 'yes'"),
        ((4, 4, True, "salt"), TypeError, "salt: expected a bytes, got str 'salt'"),
    ],
)
def test_wrong_sizes_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        BlockManager(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("tokens", ["text", [1.5, 2], [None], [2**63], 7, ["1"]])
def test_what_is_no_token_is_refused(tokens):
    manager = BlockManager(4, 2)
    manager.allocate("a", [1])
    before = snapshot(manager)
    with pytest.raises(TypeError):
        manager.allocate("b", tokens)
    with pytest.raises(TypeError):
        manager.extend("a", tokens)
    assert snapshot(manager) == before


@pytest.mark.parametrize("token", ["text", "1", b"1", 1.5, None, 2**63, -(2**63) - 1, [1]])
def test_what_is_no_token_is_not_appended(token):
    """Whether it would go into the last block, into a reserved slot, into a copy of a shared tail or into a new block."""
    manager = BlockManager(12, 4)
    manager.allocate("slack", [1])
    manager.allocate("reserved", [2])
    manager.reserve("reserved")
    manager.allocate("shared", [3])
    manager.fork("shared", "child")
    manager.allocate("full", [4, 5, 6, 7])
    before = snapshot(manager)
    for name in ("slack", "reserved", "shared", "child", "full"):
        with pytest.raises(TypeError, match="token_ids: expected whole numbers of at most 64 bits"):
            manager.append(name, token)
        assert snapshot(manager) == before


def test_tokens_may_come_in_other_containers():
    """Numpy arrays, tuples and bytes are sequences of numbers; bytes are not read as memory."""
    import numpy

    manager = BlockManager(40, 4)
    assert manager.allocate("a", numpy.arange(97, 107)) == 0
    assert manager.allocate("b", tuple(range(97, 107))) == 8
    assert manager.allocate("c", bytes(range(97, 107))) == 8
    for name, token in zip(("a", "b"), numpy.array([1, 2]), strict=True):
        manager.append(name, token)
    assert manager.reserve_all(("c", "c")) == 2
    manager.extend("c", numpy.array([3, 4]))
    assert manager.num_tokens_held == 8 + 3 + 3 + 4
    manager.check()


def test_wrong_requests_are_refused():
    manager = BlockManager(4, 2)
    for call in (manager.can_allocate, lambda tokens: manager.allocate("a", tokens)):
        with pytest.raises(ValueError, match="token_ids: expected at least one token, got none"):
            call([])
    manager.allocate("a", [1])
    with pytest.raises(ValueError, match="request_id: expected one that is not in use, got 'a'"):
        manager.allocate("a", [1])
    for num_tokens in (2, -1):
        with pytest.raises(ValueError, match=f"num_tokens: expected 0 to the 1 of 'a', got {num_tokens}"):
            manager.publish("a", num_tokens)
    assert not manager.can_allocate(prompt(9))  # never: larger than the pool
    assert manager.max_length == 8


def test_check_sees_what_is_broken():
    """Each way to break the structure by hand is told by ``check``, which is silent before."""

    def fresh():
        manager = BlockManager(8, 2)
        manager.allocate("a", [1, 2, 3, 4, 5])
        manager.fork("a", "b")
        manager.allocate("gone", [7, 8, 9])
        manager.free("gone")
        manager.check()
        return manager, manager._pool, manager._requests["a"]

    def lose_a_free_block(manager, pool, request):
        pool._blank.pop()
        return "the free list is .*, unused are"

    def list_a_free_block_twice(manager, pool, request):
        pool._blank.append(pool._blank[0])
        return "the free list is .*, unused are"

    def free_a_used_block(manager, pool, request):
        pool._blank.append(request.table[0])
        return "the free list is .*, unused are"

    def miscount_references(manager, pool, request):
        pool.references[request.table[0]] -= 1
        return "references are .*, the tables say"

    def forget_an_entry(manager, pool, request):
        pool._carriers.clear()
        return "blocks' names and the index differ"

    def keep_a_stale_entry(manager, pool, request):
        pool._carriers[b"stale"] = {pool._blank[0]: None}
        return "blocks' names and the index differ"

    def keep_an_empty_entry(manager, pool, request):
        pool._carriers[b"empty"] = {}
        return "the index has a name without a block"

    def blank_a_named_block(manager, pool, request):
        pool._blank.append(pool._evictable.popitem()[0])
        return "a block on the blank list has a name"

    def make_a_blank_block_evictable(manager, pool, request):
        pool._evictable[pool._blank.pop()] = None
        return "a block on the evictable list has no name"

    def name_a_partial_block(manager, pool, request):
        pool.publish(request.table[2], b"too early")
        return "has a name before it is full"

    def lose_a_published_name(manager, pool, request):
        name, pool.hashes[request.table[0]] = pool.hashes[request.table[0]], None
        del pool._carriers[name]
        return "published block 0 has no name"

    def cut_a_table(manager, pool, request):
        pool.drop(request.table.pop())
        return "5 slots in 2 blocks of 2"

    def lengthen_a_table(manager, pool, request):
        request.table.append(pool.take())
        return "5 slots in 4 blocks of 2"

    def list_a_block_twice(manager, pool, request):
        pool.share(request.table[0])
        pool.drop(request.table[1])
        request.table[1] = request.table[0]
        return "'a' lists a block twice"

    def hold_more_tokens_than_slots(manager, pool, request):
        request.tokens.append(6)
        return "6 tokens in 5 slots"

    def fill_a_shared_tail(manager, pool, request):
        request.tokens.append(6)
        request.slots = request.limit = 6
        return "sharers fill a block differently"

    def let_a_sharer_write(manager, pool, request):
        request.limit = 6
        return "'a' writes to a shared block"

    def let_slots_outgrow_the_table(manager, pool, request):
        request.limit = 7
        return "limit 7, but 5 of 6 slots"

    def miscount_tokens(manager, pool, request):
        manager.num_tokens_held += 1
        return "6 tokens counted, 5 held"

    def copy_to_a_free_block(manager, pool, request):
        manager._copies[pool._blank[0]] = request.table[0]
        return "a copy to a block that nobody holds"

    ways = [way for name, way in locals().items() if name != "fresh"]
    assert len(ways) == 20
    for way in ways:
        broken = fresh()
        message = way(*broken)
        with pytest.raises(AssertionError, match=message):
            broken[0].check()


def test_check_sees_what_is_broken_in_regions():
    def gap_too_long(manager):
        manager._gaps[-1] = (4, 9)
        return "the slots are not tiled"

    def gap_in_a_region(manager):
        manager._gaps.insert(0, (2, 4))
        return "the slots are not tiled"

    def empty_gap(manager):
        manager._gaps.append((12, 12))
        return "an empty piece"

    def gaps_that_touch(manager):
        manager._gaps[-1:] = [(4, 8), (8, 12)]
        return "gaps touch"

    def gaps_out_of_order(manager):
        manager.allocate("b", [1])
        manager.free("a")
        manager._gaps.reverse()
        return "gaps out of order"

    def too_many_slots(manager):
        manager._regions["a"].slots = 5
        return "too much in"

    def miscount_reserved(manager):
        manager.num_used_blocks -= 1
        return "reserved slots miscounted"

    def miscount_tokens(manager):
        manager.num_tokens_held -= 1
        return "tokens miscounted"

    ways = list(locals().values())
    assert len(ways) == 8
    for way in ways:
        manager = ContiguousReservation(12, 4)
        manager.allocate("a", [1])
        manager.check()
        message = way(manager)
        with pytest.raises(AssertionError, match=message):
            manager.check()


def test_the_bookkeeping_needs_neither_torch_nor_numpy():
    code = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import llmlab.kv_cache"
    subprocess.run([sys.executable, "-c", code], check=True)


# The contiguous reservation, against an array that says who owns each slot.


class Slots:
    """The model of a contiguous reservation: the owner of every slot, written out."""

    def __init__(self, num_slots, max_length):
        self.owners, self.max_length = [None] * num_slots, max_length
        self.tokens, self.taken = {}, {}

    def allocate(self, name, num_tokens, length, cached_only=False):
        if num_tokens > length:
            raise Full
        for start in range(len(self.owners) - length + 1):
            if not any(self.owners[start : start + length]):
                self.owners[start : start + length] = [name] * length
                self.tokens[name] = self.taken[name] = 0 if cached_only else num_tokens
                return 0
        raise Full

    def reserve_slots(self, name, num_slots):
        if num_slots > self.owners.count(name):
            return False
        self.taken[name] = max(self.taken[name], num_slots)
        return True

    def append(self, name):
        if self.tokens[name] == self.owners.count(name):
            raise Full
        self.tokens[name] += 1
        self.taken[name] = max(self.taken[name], self.tokens[name])

    def free(self, name):
        self.owners = [None if owner == name else owner for owner in self.owners]
        del self.tokens[name], self.taken[name]


class ContiguousMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.manager = None
        self.count = 0

    created = precondition(lambda self: self.manager is not None)
    held = precondition(lambda self: self.manager is not None and self.slots.tokens)

    @precondition(lambda self: self.manager is None)
    @rule(num_slots=st.integers(8, 40), max_length=st.integers(1, 8))
    def create(self, num_slots, max_length):
        self.manager, self.slots = ContiguousReservation(num_slots, max_length), Slots(num_slots, max_length)

    def names(self, picks):
        names = list(self.slots.tokens)
        return list(dict.fromkeys(names[pick % len(names)] for pick in picks))

    def both(self, on_manager, on_model):
        before = snapshot(self.manager)
        try:
            expected = on_model()
        except Full:
            with pytest.raises(OutOfBlocks, match="wanted"):
                on_manager()
            assert snapshot(self.manager) == before
        else:
            assert on_manager() == expected

    @created
    @rule(num_tokens=st.integers(1, 9), own=st.none() | st.integers(1, 8), cached_only=st.booleans())
    def allocate(self, num_tokens, own, cached_only):
        self.count += 1
        name, tokens = f"request {self.count}", [5] * num_tokens
        own = None if own is None else min(own, self.slots.max_length)
        possible = self.manager.can_allocate(tokens, num_tokens, own)
        self.both(
            lambda: self.manager.allocate(name, tokens, cached_only=cached_only, max_length=own),
            lambda: self.slots.allocate(name, num_tokens, own or self.slots.max_length, cached_only),
        )
        assert possible == (name in self.slots.tokens)

    @held
    @rule(picks=st.lists(PICK, max_size=4))
    def append(self, picks):
        for name in self.names(picks):
            self.both(lambda name=name: self.manager.append(name, 1), lambda name=name: self.slots.append(name))

    @held
    @rule(picks=st.lists(PICK, max_size=4))
    def reserve(self, picks):
        names, granted = self.names(picks), 0
        for name in names:
            if self.slots.taken[name] == self.slots.owners.count(name):
                break
            self.slots.taken[name] += 1
            granted += 1
        assert self.manager.reserve_all(names) == granted
        if granted < len(names):
            self.both(lambda: self.manager.reserve(names[granted]), self.full)

    @held
    @rule(pick=PICK, num_slots=st.integers(0, 9))
    def reserve_slots(self, pick, num_slots):
        (name,) = self.names([pick])
        before = snapshot(self.manager)
        granted = self.manager.reserve_slots(name, num_slots)
        assert granted == self.slots.reserve_slots(name, num_slots)
        assert granted or snapshot(self.manager) == before

    def full(self):
        raise Full

    @held
    @rule(pick=PICK)
    def free(self, pick):
        (name,) = self.names([pick])
        self.manager.free(name)
        self.slots.free(name)

    @invariant()
    def agrees(self):
        if self.manager is None:
            return
        self.manager.check()
        owners = self.slots.owners
        for name, known in self.slots.tokens.items():
            start = owners.index(name)
            assert self.manager.start(name) == start
            assert list(self.manager.block_table(name)) == list(range(start, start + self.slots.taken[name]))
            assert self.manager.num_tokens(name) == known
        assert self.manager.num_free_blocks == owners.count(None)
        assert self.manager.num_used_blocks == len(owners) - owners.count(None)
        assert self.manager.num_tokens_held == sum(self.slots.tokens.values())


class TestContiguous(ContiguousMachine.TestCase):
    settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_a_region_is_as_long_as_the_request_may_become():
    """What paging ends: of 3 · 8 reserved slots 6 are used, 4 free slots hold no fourth request."""
    manager = ContiguousReservation(28, 8)
    for name in "abc":
        assert manager.allocate(name, [1, 2]) == 0
    assert [manager.start(name) for name in "abc"] == [0, 8, 16]
    assert (manager.num_used_blocks, manager.num_tokens_held, manager.num_free_blocks) == (24, 6, 4)
    assert not manager.can_allocate([1])
    with pytest.raises(OutOfBlocks, match="wanted 8 adjacent slots, 4 free"):
        manager.allocate("d", [1])
    manager.free("b")
    manager.allocate("d", [1] * 8)
    assert manager.start("d") == 8
    with pytest.raises(OutOfBlocks, match="wanted 1 more slots in a region, 0 free"):
        manager.append("d", 1)
    with pytest.raises(OutOfBlocks, match="wanted 9 slots in a region, 8 free"):
        manager.allocate("e", [1] * 9)
    manager.check()


def test_gaps_that_touch_become_one():
    """Freed in any order, neighbours are joined, and what no gap held alone fits then."""
    for order in (("a", "b", "c"), ("c", "b", "a"), ("a", "c", "b"), ("b", "a", "c")):
        manager = ContiguousReservation(12, 12)
        for name in "abcd":
            manager.allocate(name, [1], max_length=3)
        for index, name in enumerate(order):
            assert not manager.can_allocate([1], max_length=9)
            manager.free(name)
            assert manager.num_free_blocks == 3 * (index + 1)
            manager.check()
        manager.allocate("e", [1], max_length=9)
        assert manager.start("e") == 0


def test_enough_slots_that_are_not_adjacent_are_not_enough():
    """External fragmentation: 6 free slots, and no place for a region of 4."""
    manager = ContiguousReservation(12, 12)
    for name in "abcd":
        manager.allocate(name, [1], max_length=3)
    manager.free("a")
    manager.free("c")
    assert manager.num_free_blocks == 6
    with pytest.raises(OutOfBlocks, match="wanted 4 adjacent slots, 3 free"):
        manager.allocate("e", [1], max_length=4)


def test_policies_can_call_either_manager():
    """Each method of the block manager but those of shared blocks is there, with its parameters first and in order."""
    for name, method in inspect.getmembers(BlockManager, inspect.isfunction):
        if not name.startswith("_") and name not in ("fork", "publish", "take_copies"):
            expected = list(inspect.signature(method).parameters)
            other = list(inspect.signature(getattr(ContiguousReservation, name)).parameters)
            assert other[: len(expected)] == expected, name
    for manager in (BlockManager(32, 1), ContiguousReservation(32, 16)):
        assert manager.can_allocate([1, 2, 3])
        manager.allocate(1, [1, 2, 3])
        assert manager.reserve_all([1]) == 1
        manager.append(1, 4)
        manager.reserve(1)
        assert (manager.num_tokens(1), manager.num_tokens_held, len(manager.block_table(1))) == (4, 4, 5)
        manager.extend(1, [5])
        manager.append(1, 6)
        assert (manager.num_tokens(1), manager.num_tokens_held, len(manager.block_table(1))) == (6, 6, 6)
        assert manager.reserve_slots(1, 9)
        assert (manager.num_tokens(1), manager.num_tokens_held, len(manager.block_table(1))) == (6, 6, 9)
        assert not manager.reserve_slots(1, manager.max_length + 1)
        assert manager.num_used_blocks * manager.block_size >= 6
        assert manager.max_length <= manager.num_blocks == manager.num_used_blocks + manager.num_free_blocks == 32
        manager.free(1)
        assert manager.num_tokens_held == 0
        manager.check()
        for call in (
            lambda manager=manager: manager.free(1),
            lambda manager=manager: manager.reserve(1),
            lambda manager=manager: manager.reserve_slots(1, 1),
            lambda manager=manager: manager.append(1, 1),
            lambda manager=manager: manager.extend(1, [1]),
        ):
            with pytest.raises(KeyError, match="holds nothing"):
                call()


def test_wrong_arguments_of_a_region_are_refused():
    with pytest.raises(ValueError, match="max_length: expected at most the 8 slots there are, got 9"):
        ContiguousReservation(8, 9)
    with pytest.raises(ValueError, match="num_slots: expected a whole number of at least 1, got 0"):
        ContiguousReservation(0, 1)
    manager = ContiguousReservation(8, 4)
    manager.allocate("a", [1])
    before = snapshot(manager)
    for call, message in (
        (lambda: manager.can_allocate([]), "token_ids: expected at least one token, got none"),
        (lambda: manager.allocate("b", []), "token_ids: expected at least one token, got none"),
        (lambda: manager.allocate("a", [1]), "request_id: expected one that is not in use, got 'a'"),
        (lambda: manager.allocate("b", [1], max_length=5), "max_length: expected 1 to 4, got 5"),
        (lambda: manager.allocate("b", [1], max_length=0), "max_length: expected 1 to 4, got 0"),
        (lambda: manager.extend("a", [1]), "token_ids: 'a' has 0 reserved slots, got 1 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert snapshot(manager) == before


def test_whole_blocks_are_reserved_with_the_slot_that_is_wanted():
    kv = BlockManager(4, 4)
    kv.allocate("a", [1, 2, 3])
    kv.allocate("b", [5, 6, 7, 8])
    with pytest.raises(ValueError, match="'a' has 0 reserved slots, got 1 tokens"):
        kv.extend("a", [4])  # its block has room, but nothing is reserved in it
    assert kv.reserve_all(["a", "b"], whole_blocks=True) == 2
    assert (len(kv.block_table("a")), len(kv.block_table("b")), kv.num_free_blocks) == (1, 2, 1)
    with pytest.raises(ValueError, match="'a' has 1 reserved slots, got 2 tokens"):
        kv.extend("a", [4, 4])
    with pytest.raises(ValueError, match="'b' has 4 reserved slots, got 5 tokens"):
        kv.extend("b", [9] * 5)
    kv.extend("b", [9] * 4)
    kv.extend("a", [4])
    assert (kv.num_tokens("a"), kv.num_tokens("b"), kv.num_tokens_held) == (4, 8, 12)
    kv.check()
    assert kv.reserve_all(["a", "b"], whole_blocks=True) == 1  # one block is left
    kv.check()
    with pytest.raises(KeyError):
        kv.extend("c", [1])


def test_a_block_that_an_extension_fills_is_hit_and_waits_for_an_earlier_one():
    """Invariants 2 and 3, by ``extend``."""
    for publish in (True, False):
        kv = BlockManager(12, 4)
        kv.allocate("a", [1, 2, 3, 4, 5, 6], publish=publish)
        kv.reserve_all(["a"], whole_blocks=True)
        kv.extend("a", [7, 8])
        assert kv.allocate("b", [1, 2, 3, 4, 5, 6, 7, 8, 9]) == (8 if publish else 0)
        if not publish:
            kv.publish("a", 8)
        kv.check()
        assert kv.allocate("c", [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8


def test_a_region_takes_known_tokens_into_its_slots():
    kv = ContiguousReservation(20, 10)
    kv.allocate("a", [1, 2])
    assert kv.reserve_all(["a"], whole_blocks=True) == 1
    with pytest.raises(ValueError, match="'a' has 1 reserved slots, got 2 tokens"):
        kv.extend("a", [3, 4])
    kv.extend("a", [3])
    assert (kv.num_tokens("a"), kv.num_tokens_held) == (3, 3)
    kv.check()


def test_a_prompt_can_begin_with_what_is_cached_and_take_the_rest_in_chunks():
    """Blocks of 4: one of the prompt's three is cached. Each chunk takes whole blocks, and is hit when it is known."""
    kv = BlockManager(6, 4)
    kv.allocate("a", [1] * 4)
    kv.free("a")
    prompt = [1] * 4 + [2] * 7
    assert kv.allocate("b", prompt, cached_only=True) == 4
    assert (kv.num_used_blocks, kv.num_tokens("b"), kv.num_tokens_held) == (1, 4, 4)
    assert kv.reserve_slots("b", 7)
    assert kv.reserve_slots("b", 8)  # is in the block that the 7 have taken
    assert (kv.num_used_blocks, kv.num_tokens_held) == (2, 4)
    assert kv.can_allocate([9] * 16)
    assert not kv.can_allocate([9] * 16, owed=1)
    kv.extend("b", prompt[4:7])
    assert kv.allocate("too early", prompt, cached_only=True) == 4
    kv.extend("b", prompt[7:8])
    assert kv.allocate("in time", prompt, cached_only=True) == 8
    assert kv.reserve_slots("b", 11)
    kv.allocate("rest", [5] * 10, publish=False)
    before = snapshot(kv)
    assert not kv.reserve_slots("in time", 9)
    assert snapshot(kv) == before
    kv.check()
    assert kv.allocate("nothing yet", [7] * 9, cached_only=True) == 0
    assert kv.block_table("nothing yet") == []
    kv.check()
    kv.free("nothing yet")
    with pytest.raises(KeyError, match="holds nothing"):
        kv.reserve_slots("nothing yet", 1)


def test_slots_behind_a_shared_tail_cost_its_copy_too():
    kv = BlockManager(4, 4)
    kv.allocate("a", [1] * 6)
    kv.fork("a", "b")
    before = snapshot(kv)
    assert kv.reserve_slots("b", 6)
    assert snapshot(kv) == before
    assert not kv.reserve_slots("b", 13)  # two blocks and a copy, and two are free
    assert snapshot(kv) == before
    assert kv.reserve_slots("b", 12)
    assert kv.take_copies() == [(kv.block_table("a")[1], kv.block_table("b")[1])]
    assert not kv.reserve_slots("a", 9)
    assert kv.reserve_slots("a", 8)  # who is left with the tail keeps it
    kv.check()
