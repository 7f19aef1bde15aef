# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lab: a cache in blocks
#
# | | |
# |---|---|
# | **Device** | any; a laptop's CPU is enough |
# | **Time** | about 60 minutes; the whole notebook runs in under half a minute |
# | **Difficulty** | moderate: short methods, but each must leave the books in order |
# | **Needs** | the chapter *Paged KV cache* |
#
# The KV cache is cut into blocks of `block_size` slots; a slot holds the keys and values of one token. A request's
# *block table* lists its blocks in the order of its tokens, and the blocks may lie anywhere. You will write the
# bookkeeping: how many blocks, which ones, and in which slot each token goes; then the attention that reads through a
# table, and the sharing of blocks. At the end you predict how much of the cache is wasted, and count it.
#
# You write each answer in one cell, in place of `raise NotImplementedError()`. The cell after it checks your answer
# property by property; when you hand in, hidden checks run the same functions on other inputs.
#
# Blocks, slots and positions are counted from 0. Slot number = block number · block_size + offset in the block.
#
# First, say who you are. One exercise draws its requests from your id, so that everyone predicts another number.

# %%
student_id = "student-00"  # your id, as your instructor knows it

# %% nbgrader={"grade_id": "given", "locked": true}
import math

import torch

from llmlab.batching.workload import AzureLengths
from llmlab.grading.checks import CheckFailed, Checks, close, equal, instance, measured, student_rng
from llmlab.grading.withhold import withhold

# These names of the package are the exercises, or answer them, so here they raise. The rest of llmlab works.
withhold(
    [
        "llmlab.kv_cache.block_manager.BlockManager",
        "llmlab.kv_cache.block_pool.BlockPool",
        "llmlab.kv_cache.contiguous.ContiguousReservation",
        "llmlab.kv_cache.paged.PagedCache",
        "llmlab.kv_cache.paged.PagedAttention",
        "llmlab.kernels.reference.decode_attention",
        "llmlab.kernels.reference.chunk_attention",
        "llmlab.kernels.reference.step_attention",
        "llmlab.kernels.reference.gather_inputs",
        "llmlab.engine.engine.Engine",
        "llmlab.engine.engine._manager",
        "llmlab.engine.runner.Runner",
    ]
)

torch.set_num_threads(1)  # the tensors are small; more threads would only wait for each other


class Said(str):
    """Words of our own, which a message shows without quotes."""

    __repr__ = str.__str__


def allowed(call, *arguments):
    """What a call returns that must not be refused."""
    try:
        return call(*arguments)
    except (KeyError, MemoryError, ValueError) as error:
        asked = ", ".join(map(repr, arguments))
        raise CheckFailed(
            Said(f"{type(error).__name__}: {error}"), f"that a call with {asked} is not refused"
        ) from None


def refused(kind, why, call, *arguments):
    """Fail unless the call raises an error of this kind."""
    try:
        call(*arguments)
    except kind:
        return
    raise CheckFailed(Said("no error"), f"a {kind.__name__}: {why}")


def free_blocks(blocks, expected):
    """Fail unless so many blocks are free."""
    if (got := blocks.num_free()) != expected:
        raise CheckFailed(got, f"{expected} free blocks")


def whole_numbers(got, what):
    """These as a list; fails where they are no list of plain ints."""
    if type(got) not in (list, tuple) or any(type(number) is not int for number in got):
        raise CheckFailed(got, f"{what}: a list of plain ints")
    return list(got)


def same_list(got, expected, what):
    """Fail unless these are the expected whole numbers, in this order."""
    if whole_numbers(got, what) != expected:
        raise CheckFailed(got, f"{expected}: {what}")


# %% [markdown]
# ## 1. How many blocks?
#
# A request takes whole blocks, and its last one may be partly empty. Requests that begin with the same tokens, such as a
# long instruction that an application puts before every question, need not store them twice: a block that is **full**
# of common tokens is shared by all of them. The block in which they part is each request's own, as it will hold
# something else in each.
#
# <details><summary>Hint: what of a common prefix is shared?</summary>
#
# Common tokens 0 to prefix - 1 fill some blocks completely. The rest of them stand in a block together with tokens that
# are not common.
# </details>


# %% nbgrader={"grade_id": "blocks_needed", "solution": true}
def blocks_needed(lengths, block_size, prefix=0):
    """How many blocks hold these requests, which all begin with the same ``prefix`` tokens.

    lengths: a list with the number of tokens of each request, 1 or more and none less than prefix, the prefix
    included; may be empty. block_size: slots in a block. prefix: tokens, 0 where nothing is common.
    Returns a whole number.

    1. The blocks that are full of common tokens are needed once, if there is a request at all.
    2. Each request needs blocks of its own for all its other tokens. It shares none of these.
    """
    ### BEGIN SOLUTION
    shared = prefix // block_size
    own = sum(-(-length // block_size) - shared for length in lengths)
    return own + shared if lengths else 0
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_blocks_needed", "grade": true}
check = Checks("blocks_needed")


@check("17 tokens in blocks of 16 take 2 blocks; 16 take 1", points=0.25)
def _(rng):
    equal(blocks_needed([17], 16), 2)
    equal(blocks_needed([16], 16), 1)


@check("requests of 5, 5 and 5 tokens in blocks of 4 take 2 each: 6", points=0.25)
def _(rng):
    equal(blocks_needed([5, 5, 5], 4), 6)


@check(
    "10 common tokens in blocks of 4: requests of 11 and 15 share 2 blocks, and have 1 and 2 of their own: 5;"
    " so do requests of 11 and 13",
    points=0.25,
)
def _(rng):
    equal(blocks_needed([11, 15], 4, 10), 5)
    equal(blocks_needed([11, 13], 4, 10), 5)


@check("no request takes no block, whatever the prefix; two that are nothing but a prefix of 8 take its 2", points=0.25)
def _(rng):
    equal(blocks_needed([], 4, 8), 0)
    equal(blocks_needed([8, 8], 4, 8), 2)


### BEGIN HIDDEN TESTS
def count_blocks(lengths, block_size, prefix):
    """The blocks listed one by one: (request, place), or (None, place) for one that all requests share."""
    found = set()
    for request, length in enumerate(lengths):
        for position in range(length):
            place = position // block_size
            found.add((None if (place + 1) * block_size <= prefix else request, place))
    return len(found)


@check.hidden("without a prefix: every request's last block counts whole", points=0.5)
def _(rng):
    for block_size in (1, 16, rng.randrange(2, 40)):
        lengths = [rng.randrange(1, 200) for _ in range(rng.randrange(3, 9))] + [block_size, 3 * block_size]
        equal(blocks_needed(lengths, block_size), count_blocks(lengths, block_size, 0))


@check.hidden("with a prefix: what is full of it counts once, what is partly full in each request", points=1)
def _(rng):
    for block_size in (rng.randrange(2, 20), rng.randrange(20, 40)):
        for prefix in (block_size - 1, block_size, 2 * block_size + rng.randrange(1, block_size)):
            lengths = [prefix + rng.randrange(0, 90) for _ in range(rng.randrange(3, 9))] + [prefix]
            equal(blocks_needed(lengths, block_size, prefix), count_blocks(lengths, block_size, prefix))
            equal(blocks_needed(lengths[:1], block_size, prefix), count_blocks(lengths[:1], block_size, prefix))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# A hundred requests of 700 tokens, 600 of them a common instruction. What does it save to share, and how much of it is
# lost to a large block?

# %%
for block_size in (1, 16, 64, 256):
    apart, shared = (block_size * blocks_needed([700] * 100, block_size, prefix) for prefix in (0, 600))
    print(f"blocks of {block_size:3}: {apart:,} slots, shared {shared:,}")

# %% [markdown]
# ## 2. Allocate, append, free
#
# Now say which blocks. A request gets the blocks of its prompt at once, and after that one token at a time: most tokens
# go into a slot of its last block, and one in `block_size` of them needs a new block. When the request ends, its blocks
# are free for others, in any order. There is nothing to be moved, ever.
#
# `free_blocks`, `tables` and `lengths` are made for you. Any free block is as good as another.
#
# <details><summary>Hint: when does a token need a new block?</summary>
#
# When all slots of the table's blocks are taken: the request has as many tokens as its blocks have slots.
# </details>
#
# <details><summary>Hint: "nothing has changed then"</summary>
#
# Look whether there are enough blocks <i>before</i> you take the first. Whoever catches the error goes on with the same
# object, and blocks that were taken for a request that was not let in would be lost for good.
# </details>


# %% nbgrader={"grade_id": "BlockTables", "solution": true}
class BlockTables:
    """Which of ``num_blocks`` blocks belong to which request.

    allocate(name, num_tokens): takes the blocks of a new request with so many tokens, 1 or more. Raises ValueError where
    the name is in use, however many blocks are free, and else MemoryError where too few are; nothing has changed then.
    append(name): makes room for one more token of a request and returns the number of its slot. Takes a new block only
    where the last one is full. Raises MemoryError where none is free; nothing has changed then.
    free(name): ends a request and gives its blocks back.
    append and free raise KeyError for a name that is not in use.
    """

    def __init__(self, num_blocks, block_size):
        self.block_size = block_size
        self.free_blocks = list(range(num_blocks))  # in any order
        self.tables = {}  # name: its blocks, in the order of its tokens
        self.lengths = {}  # name: how many tokens it has

    def block_table(self, name):
        """A request's blocks, in the order of its tokens."""
        return list(self.tables[name])

    def num_free(self):
        """How many blocks are free."""
        return len(self.free_blocks)

    def allocate(self, name, num_tokens):
        ### BEGIN SOLUTION
        if name in self.tables:
            raise ValueError(f"{name!r} is in use")
        wanted = -(-num_tokens // self.block_size)
        if wanted > len(self.free_blocks):
            raise MemoryError(f"{wanted} blocks are wanted, {len(self.free_blocks)} are free")
        self.tables[name] = [self.free_blocks.pop() for _ in range(wanted)]
        self.lengths[name] = num_tokens
        ### END SOLUTION

    def append(self, name):
        ### BEGIN SOLUTION
        table, length = self.tables[name], self.lengths[name]
        if length == len(table) * self.block_size:
            if not self.free_blocks:
                raise MemoryError("no block is free")
            table.append(self.free_blocks.pop())
        self.lengths[name] = length + 1
        return table[-1] * self.block_size + length % self.block_size
        ### END SOLUTION

    def free(self, name):
        ### BEGIN SOLUTION
        self.free_blocks.extend(self.tables.pop(name))
        del self.lengths[name]
        ### END SOLUTION


# %% nbgrader={"grade_id": "test_BlockTables", "grade": true}
check = Checks("BlockTables")


def in_order(blocks, held, num_blocks, size):
    """Fail where the tables of ``held``, a dict of names and tokens, are not in order; returns them."""
    tables = {name: whole_numbers(blocks.block_table(name), f"the table of {name!r}") for name in held}
    for name, table in tables.items():
        if len(table) != math.ceil(held[name] / size):
            raise CheckFailed(
                table,
                f"as many blocks of {size} as the {held[name]} tokens of {name!r} need: {math.ceil(held[name] / size)}",
            )
        if not all(0 <= block < num_blocks for block in table):
            raise CheckFailed(table, f"blocks from 0 to {num_blocks - 1}")
    taken = [block for table in tables.values() for block in table]
    if len(set(taken)) != len(taken):
        raise CheckFailed(tables, "no block twice: two requests would write over each other")
    if blocks.num_free() != num_blocks - len(taken):
        raise CheckFailed(
            blocks.num_free(), f"{num_blocks - len(taken)} free blocks: of {num_blocks} {len(taken)} are taken"
        )
    return tables


@check("a prompt of 9 tokens takes 3 of 8 blocks of 4, and another of 4 tokens 1", points=0.25)
def _(rng):
    blocks = BlockTables(8, 4)
    allowed(blocks.allocate, "a", 9)
    allowed(blocks.allocate, "b", 4)
    in_order(blocks, {"a": 9, "b": 4}, 8, 4)


@check("3 tokens behind a prompt of 2, blocks of 4: slots in the first block, and then one in a second", points=0.25)
def _(rng):
    blocks = BlockTables(8, 4)
    allowed(blocks.allocate, "a", 2)
    slots = [allowed(blocks.append, "a") for _ in range(2)]
    in_order(blocks, {"a": 4}, 8, 4)
    slots.append(allowed(blocks.append, "a"))
    (first, second) = in_order(blocks, {"a": 5}, 8, 4)["a"]
    same_list(slots, [4 * first + 2, 4 * first + 3, 4 * second], "slots: block number times 4, and the offset in it")


@check("what was freed can be used again, and is free once", points=0.25)
def _(rng):
    blocks = BlockTables(4, 2)
    allowed(blocks.allocate, "a", 7)
    allowed(blocks.free, "a")
    free_blocks(blocks, 4)
    allowed(blocks.allocate, "a", 3)
    allowed(blocks.allocate, "b", 4)
    in_order(blocks, {"a": 3, "b": 4}, 4, 2)
    slot = allowed(blocks.append, "a")
    last = in_order(blocks, {"a": 4, "b": 4}, 4, 2)["a"][-1]
    same_list([slot], [2 * last + 1], "the slot of the fourth token of 'a'")


@check(
    "4 blocks of 2 have no room for 9 tokens: MemoryError, and then still for 6 and 2, and for no more until 2 are freed",
    points=0.25,
)
def _(rng):
    blocks = BlockTables(4, 2)
    refused(MemoryError, "9 tokens want 5 blocks", blocks.allocate, "a", 9)
    free_blocks(blocks, 4)
    allowed(blocks.allocate, "a", 6)
    allowed(blocks.allocate, "b", 2)
    refused(MemoryError, "all 4 blocks are full", blocks.append, "a")
    allowed(blocks.free, "b")
    slot = allowed(blocks.append, "a")
    last = in_order(blocks, {"a": 7}, 4, 2)["a"][-1]
    same_list([slot], [2 * last], "the slot of the seventh token of 'a'")


@check("a name in use: ValueError; a name that is not: KeyError", points=0.25)
def _(rng):
    blocks = BlockTables(4, 2)
    allowed(blocks.allocate, "a", 3)
    refused(ValueError, "'a' is in use", blocks.allocate, "a", 1)
    refused(ValueError, "'a' is in use, and that there is no room either comes second", blocks.allocate, "a", 9)
    in_order(blocks, {"a": 3}, 4, 2)
    refused(KeyError, "there is no 'b'", blocks.free, "b")
    refused(KeyError, "there is no 'b'", blocks.append, "b")


### BEGIN HIDDEN TESTS
def fresh(rng):
    """An object without requests, and its sizes."""
    num_blocks, size = rng.randrange(20, 40), rng.randrange(3, 9)
    blocks = BlockTables(num_blocks, size)
    equal(blocks.num_free(), num_blocks)
    return blocks, num_blocks, size


@check.hidden("prompts: as many blocks as hold the tokens, none of them twice, to the last block", points=0.5)
def _(rng):
    blocks, num_blocks, size = fresh(rng)
    held = {"even": 2 * size, "one more": 2 * size + 1, "one less": 3 * size - 1, "one": 1}
    for name, tokens in held.items():
        blocks.allocate(name, tokens)
        if name in ("even", "one more"):
            in_order(blocks, {n: held[n] for n in list(held)[: list(held).index(name) + 1]}, num_blocks, size)
    held["rest"] = size * blocks.num_free()
    blocks.allocate("rest", held["rest"])
    in_order(blocks, held, num_blocks, size)


@check.hidden(
    "append: a block more just where one is full, the slot behind the last token, the table's beginning unmoved",
    points=0.75,
)
def _(rng):
    blocks, num_blocks, size = fresh(rng)
    held = {"a": rng.randrange(1, size), "b": size, "c": 2 * size + 1}
    for name, tokens in held.items():
        blocks.allocate(name, tokens)
    before = in_order(blocks, held, num_blocks, size)
    for _ in range(3 * size):
        name = rng.choice(["a", "b", "c"])
        slot = blocks.append(name)
        held[name] += 1
        tables = in_order(blocks, held, num_blocks, size)
        for other, table in before.items():
            same_list(tables[other][: len(table)], table, "the table as it was")
        block, offset = divmod(held[name] - 1, size)
        equal(slot, tables[name][block] * size + offset)
        before = tables


@check.hidden("free: every block comes back, once, and the others keep theirs", points=0.75)
def _(rng):
    blocks, num_blocks, size = fresh(rng)
    held = {}
    for number in range(60):
        tokens = rng.choice([rng.randrange(1, 4 * size), size * rng.randrange(1, 4)])
        if held and rng.random() < 0.45:
            name = rng.choice(sorted(held))
            blocks.free(name)
            del held[name]
            refused(KeyError, "", blocks.free, name)
        elif math.ceil(tokens / size) <= blocks.num_free():
            name = f"request {number % 10}"
            if name not in held:
                blocks.allocate(name, tokens)
                held[name] = tokens
        for name in sorted(held):
            if rng.random() < 0.3 and (held[name] % size or blocks.num_free()):
                blocks.append(name)
                held[name] += 1
        in_order(blocks, held, num_blocks, size)


@check.hidden("a refusal changes nothing: too large a prompt, no block for a token, a name in use", points=0.75)
def _(rng):
    blocks, num_blocks, size = fresh(rng)
    held = {"a": size * (num_blocks - 3), "b": 2 * size}
    for name, tokens in held.items():
        blocks.allocate(name, tokens)
    refused(MemoryError, "", blocks.allocate, "c", size + 1)
    in_order(blocks, held, num_blocks, size)
    refused(KeyError, "", blocks.block_table, "c")
    refused(ValueError, "", blocks.allocate, "b", 1)
    in_order(blocks, held, num_blocks, size)
    held["c"] = size
    blocks.allocate("c", size)
    refused(MemoryError, "", blocks.append, "b")
    refused(MemoryError, "", blocks.append, "b")
    tables = in_order(blocks, held, num_blocks, size)
    blocks.free("c")
    del held["c"]
    slot = blocks.append("b")
    held["b"] += 1
    assert in_order(blocks, held, num_blocks, size)["b"][:2] == tables["b"]
    equal(slot % size, 0)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 3. Slots of a step
#
# A step of the engine computes tokens of several requests at once: a token of each that decodes, and a chunk of a prompt
# here and there. Attention writes their keys and values into the cache, and needs to know the slot of each. And as a
# step recorded for a CUDA graph has a fixed number of tokens, some may be *padding*, computed for nobody: they must be
# written nowhere, which the kernel understands by slot -1.
#
# <details><summary>Hint: from a position to a slot</summary>
#
# Position 37 in blocks of 16 is in the third block of the table, at offset 5. Which block that is, the table says.
# </details>


# %% nbgrader={"grade_id": "slot_mapping", "solution": true}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    """The slot of each token that a step computes.

    block_tables: a list of lists, the blocks of each request. starts, counts: lists of whole numbers; request i computes
    its tokens at the positions starts[i] to starts[i] + counts[i] - 1. padded_to: how many tokens the step has, padding
    included, no fewer than the requests have; or 0 for no padding.
    Returns a list of whole numbers: the slots of the first request's tokens in the order of their positions, then the
    second's, and so on, and -1 for each token of padding at the end. The lists that are handed in stay as they are.
    """
    ### BEGIN SOLUTION
    slots = []
    for request, table in enumerate(block_tables):
        for position in range(starts[request], starts[request] + counts[request]):
            slots.append(table[position // block_size] * block_size + position % block_size)
    return slots + [-1] * (padded_to - len(slots))
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_slot_mapping", "grade": true}
check = Checks("slot_mapping")


@check("a prompt of 6 tokens in blocks 7 and 2 of 4 slots: slots 28 to 31, then 8 and 9", points=0.25)
def _(rng):
    same_list(slot_mapping([[7, 2]], [0], [6], 4), [28, 29, 30, 31, 8, 9], "block number times 4, and the offset in it")


@check("one token at position 5 of the same request: slot 9; and the caller's table is left as it was", points=0.25)
def _(rng):
    table = [7, 2]
    same_list(slot_mapping([table], [5], [1], 4), [9], "the second slot of block 2")
    same_list(table, [7, 2], "the table that was handed in")
    same_list(slot_mapping([table, table], [5, 3], [1, 1], 4), [9, 31], "two requests that share all their blocks")


@check("a chunk that starts in the middle of a block, and a request that decodes", points=0.25)
def _(rng):
    same_list(slot_mapping([[3, 1, 5], [0]], [2, 3], [4, 1], 4), [14, 15, 4, 5, 3], "request by request")


@check("two tokens and two of padding: -1, as slot 0 belongs to somebody", points=0.25)
def _(rng):
    same_list(slot_mapping([[6], [4]], [0, 1], [1, 1], 4, 4), [24, 17, -1, -1], "padding comes last")


### BEGIN HIDDEN TESTS
def drawn_tables(rng, requests):
    """A block size and tables of requests, of blocks that lie anywhere."""
    size = rng.randrange(3, 20)
    numbers = rng.sample(range(1, 400), 10 * requests)
    return size, [[numbers.pop() for _ in range(rng.randrange(4, 10))] for _ in range(requests)]


def all_slots(table, size):
    """Every slot of a table, block by block."""
    return [slot for block in table for slot in range(size * block, size * (block + 1))]


@check.hidden("decodes: one token of each request, at any offset", points=0.5)
def _(rng):
    size, tables = drawn_tables(rng, 6)
    for shift in range(size):
        starts = [(rng.randrange(0, len(table) - 1)) * size + shift for table in tables]
        expected = [all_slots(table, size)[start] for table, start in zip(tables, starts, strict=True)]
        same_list(slot_mapping(tables, starts, [1] * 6, size), expected, "")


@check.hidden("prompts and chunks: from any position over any number of blocks, request by request", points=1)
def _(rng):
    for _ in range(4):
        size, tables = drawn_tables(rng, 4)
        ends = [rng.randrange(2 * size, len(table) * size + 1) for table in tables]
        starts = [0, *(rng.randrange(1, end) for end in ends[1:])]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        counts[2] = 0
        parts = zip(tables, starts, counts, strict=True)
        expected = [slot for table, start, count in parts for slot in all_slots(table, size)[start : start + count]]
        same_list(slot_mapping(tables, starts, counts, size), expected, "")


@check.hidden("padding: -1 for each token that is nobody's, none where the step is full", points=0.5)
def _(rng):
    size, tables = drawn_tables(rng, 3)
    starts = [rng.randrange(1, size) for _ in tables]
    counts = [rng.randrange(2, size + 2) for _ in tables]
    real = [s for t, a, n in zip(tables, starts, counts, strict=True) for s in all_slots(t, size)[a : a + n]]
    for padding in (0, 1, rng.randrange(2, 9)):
        same_list(slot_mapping(tables, starts, counts, size, len(real) + padding), real + [-1] * padding, "")
    same_list(slot_mapping([], [], [], size), [], "")


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 4. Attention through a block table
#
# One request decodes a token: its query must meet the keys of all its tokens so far, itself included, wherever they lie.
#
# $$o_h = \sum_{j < n} \mathrm{softmax}_j\!\left(\frac{q_h \cdot k_j}{\sqrt d}\right) v_j$$
#
# With grouped-query attention $H / H_{kv}$ neighbouring query heads share a key/value head: the first $H / H_{kv}$ of
# them the first one, and so on.
#
# Here you gather the keys into one tensor first, which is easy to read and to check. A kernel does not: it would write
# them all, to read them once more. It reads each block where it lies.
#
# <details><summary>Hint: gathering</summary>
#
# <code>keys[torch.tensor(table)]</code> has the shape [blocks, H_kv, block_size, d]. What you want is
# [H_kv, blocks · block_size, d]: which two dimensions must be neighbours before you put them together?
# </details>
#
# <details><summary>Hint: why do I get NaN?</summary>
#
# Slots behind the last token hold anything: what another request left there, or nothing that is a number. To multiply
# them with a weight of 0 is not enough, as 0 · NaN is NaN. Cut them off.
# </details>


# %% nbgrader={"grade_id": "paged_attention", "solution": true}
def paged_attention(q, keys, values, block_table, num_tokens):
    """The attention of one query over the keys and values of its request in a paged cache.

    q: [H, d]. keys, values: [num_blocks, H_kv, block_size, d], the cache of one layer, with other requests' blocks in it.
    block_table: a list of the request's blocks in the order of its tokens; may list blocks behind the last token.
    num_tokens: n, 1 or more. Slots that hold no token of the request may hold NaN. Returns [H, d], in the dtype of q.

    1. Gather the request's blocks, in the order of the table, and keep the first n keys and values of each head.
    2. Let the query heads that share a key/value head find it.
    3. Weights: softmax over the n keys of q·k / sqrt(d). Output: the values, weighted and summed.
    """
    ### BEGIN SOLUTION
    kv_heads, d = keys.shape[1], q.shape[1]
    blocks = torch.tensor(block_table)
    k, v = (
        cache[blocks]
        .permute(1, 0, 2, 3)
        .reshape(kv_heads, -1, d)[:, :num_tokens]
        .repeat_interleave(len(q) // kv_heads, dim=0)
        for cache in (keys, values)
    )
    weights = torch.softmax(torch.einsum("hd,hnd->hn", q, k) / math.sqrt(d), dim=1)
    return torch.einsum("hn,hnd->hd", weights, v)
    ### END SOLUTION


# %% nbgrader={"grade_id": "test_paged_attention", "grade": true}
check = Checks("paged_attention")


def normal(rng, *shape):
    """Random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rng.getrandbits(48)), dtype=torch.float64)


def shown(x):
    """A tensor's numbers as lists, rounded to four decimals."""
    return x.detach().double().mul(1e4).round().div(1e4).tolist()


def same(got, expected, within=1e-9):
    """Fail unless ``got`` is a tensor like the expected one with the same numbers, but for rounding."""
    if not isinstance(got, torch.Tensor):
        raise CheckFailed(got, f"a tensor of shape {tuple(expected.shape)}")
    if got.shape != expected.shape or got.dtype != expected.dtype:
        kind = f"a {expected.dtype} tensor of shape {tuple(expected.shape)}"
        raise CheckFailed(Said(f"a {got.dtype} tensor of shape {tuple(got.shape)}"), kind)
    if not ((got - expected).abs() <= within * expected.abs().max()).all():
        raise CheckFailed(Said(shown(got)), f"{shown(expected)}, a row for each query head")


def values_only(rows, block_size, num_blocks, table, heads=1):
    """A cache whose keys are all 0 where there is a token, so that the output is the mean of the values; else NaN."""
    keys, values = (torch.full((num_blocks, heads, block_size, 1), math.nan, dtype=torch.float64) for _ in range(2))
    for position, row in enumerate(rows):
        keys[table[position // block_size], :, position % block_size] = 0.0
        values[table[position // block_size], :, position % block_size, 0] = torch.tensor(row, dtype=torch.float64)
    return keys, values


@check("equal keys: the mean of the values, here of 2, 4 and 9 in blocks 3 and 1 of 2 slots", points=0.25)
def _(rng):
    cache = values_only([[2.0], [4.0], [9.0]], 2, 5, [3, 1])
    same(paged_attention(torch.ones(1, 1, dtype=torch.float64), *cache, [3, 1], 3), torch.tensor([[5.0]]).double())


@check("blocks that the table lists behind the last token do not count", points=0.25)
def _(rng):
    cache = values_only([[2.0], [4.0]], 2, 5, [3])
    same(paged_attention(torch.ones(1, 1, dtype=torch.float64), *cache, [3, 1, 0], 2), torch.tensor([[3.0]]).double())


@check("4 query heads and 2 key/value heads: the first two heads read the first", points=0.25)
def _(rng):
    cache = values_only([[2.0, 10.0], [4.0, 30.0], [9.0, 50.0]], 2, 5, [3, 1], heads=2)
    q = torch.ones(4, 1, dtype=torch.float64)
    same(paged_attention(q, *cache, [3, 1], 3), torch.tensor([[5.0], [5.0], [30.0], [30.0]]).double())


@check(
    "scores over the square root of d: of d = 9 and keys that meet the query in 3·ln 3 and 0, weights 3/4 and 1/4",
    points=0.25,
)
def _(rng):
    keys, values = (torch.zeros(1, 1, 2, 9, dtype=torch.float64) for _ in range(2))
    keys[0, 0, 0, 0], values[0, 0, 0, 1] = 3 * math.log(3), 8.0
    q, expected = torch.eye(9, dtype=torch.float64)[:1], torch.zeros(1, 9, dtype=torch.float64)
    expected[0, 1] = 6.0
    same(paged_attention(q, keys, values, [0], 2), expected)


### BEGIN HIDDEN TESTS
def laid_out(rng, kv_heads, d, size, num_tokens, spare=0):
    """Keys and values of a request, [n, H_kv, d]; a cache full of NaN that holds them; and its table, of blocks anywhere."""
    k, v = normal(rng, num_tokens, kv_heads, d), normal(rng, num_tokens, kv_heads, d)
    needed = -(-num_tokens // size)
    table = rng.sample(range(needed + spare + 6), needed + spare)
    cache = [torch.full((needed + spare + 6, kv_heads, size, d), math.nan, dtype=torch.float64) for _ in range(2)]
    for position in range(num_tokens):
        for pool, rows in zip(cache, (k, v), strict=True):
            pool[table[position // size], :, position % size] = rows[position]
    return k, v, cache, table


def contiguous_attention(q, k, v):
    """Head by head and key by key, in the plainest way."""
    heads, d = q.shape
    group, rows = heads // k.shape[1], []
    for head in range(heads):
        weights = [math.exp(float(q[head] @ key) / d**0.5) for key in k[:, head // group]]
        rows.append(sum(w * value for w, value in zip(weights, v[:, head // group], strict=True)) / sum(weights))
    return torch.stack(rows)


@check.hidden("the same as over contiguous keys, wherever the blocks lie", points=1)
def _(rng):
    for size in (1, rng.randrange(2, 5), rng.randrange(5, 9)):
        d = rng.choice([2, 3, 5])
        k, v, cache, table = laid_out(rng, 1, d, size, 4 * size)
        q = normal(rng, 1, d)
        same(paged_attention(q, *cache, table, 4 * size), contiguous_attention(q, k, v))


@check.hidden("a last block that is not full, and blocks behind it: NaN there does not leak", points=0.75)
def _(rng):
    size, d = rng.randrange(4, 8), 3
    for num_tokens in (1, size - 1, size + 1, 3 * size - 2):
        k, v, cache, table = laid_out(rng, 1, d, size, num_tokens, spare=2)
        q = normal(rng, 1, d)
        same(paged_attention(q, *cache, table, num_tokens), contiguous_attention(q, k, v))


@check.hidden("grouped heads: neighbours share a key/value head", points=0.75)
def _(rng):
    for kv_heads, group in ((2, 1), (2, 3), (3, 2), (1, 4)):
        size, d = rng.randrange(2, 6), rng.choice([2, 3])
        num_tokens = size * rng.randrange(1, 4) + rng.randrange(1, size)
        k, v, cache, table = laid_out(rng, kv_heads, d, size, num_tokens, spare=1)
        q = normal(rng, kv_heads * group, d)
        same(paged_attention(q, *cache, table, num_tokens), contiguous_attention(q, k, v))


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 5. Share, and copy on write
#
# To draw several answers to one prompt, the request is *forked*: the child gets a table of its own that lists the same
# blocks. No key or value is copied. `references` counts, for each block, the tables that list it.
#
# Full blocks are never written again, so they can be shared for good. The last block is another matter. Where it has
# room, parent and child both want to write their next token into the same slot. Who writes while others list the block
# takes a **copy** of it first, and writes into that. Who lists it alone writes into it.
#
# <details><summary>Hint: two sharers, how many copies?</summary>
#
# One. The first who writes takes a copy and leaves the block to the other, who then lists it alone.
# </details>
#
# <details><summary>Hint: which free block?</summary>
#
# One with references 0. <code>self.references.index(0)</code> finds the first.
# </details>


# %% nbgrader={"grade_id": "SharedBlocks", "solution": true}
class SharedBlocks:
    """The block tables of a request and of those forked from it.

    It begins with one request, "root", that has ``num_tokens`` tokens in the blocks of ``table``.

    fork(parent, child): gives a new request all tokens of another, by listing the same blocks. Takes no block. Raises
    ValueError where the child's name is in use.
    append(name): makes room for a request's next token and returns a pair (slot, copy). copy is None, or a pair
    (source, destination) of blocks where a block must be copied, at once, before the slot is written.
      1. The last block is full: take a free block for the table's end. No copy.
      2. It has room, and no other table lists it: nothing is taken.
      3. It has room, and another table lists it: a free block takes its place in this table. Copy.
    Raises MemoryError where a block is wanted and none is free; nothing has changed then.
    free(name): ends a request. A block is free when no table lists it.
    fork, append and free raise KeyError for a parent or name that is not in use; nothing has changed then.
    """

    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size = block_size
        self.tables = {"root": list(table)}  # name: its blocks, in the order of its tokens
        self.lengths = {"root": num_tokens}  # name: how many tokens it has
        self.references = [0] * num_blocks  # of each block: how many tables list it
        for block in table:
            self.references[block] += 1

    def block_table(self, name):
        """A request's blocks, in the order of its tokens."""
        return list(self.tables[name])

    def num_free(self):
        """How many blocks no table lists."""
        return self.references.count(0)

    def fork(self, parent, child):
        ### BEGIN SOLUTION
        if child in self.tables:
            raise ValueError(f"{child!r} is in use")
        self.tables[child] = list(self.tables[parent])
        self.lengths[child] = self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1
        ### END SOLUTION

    def append(self, name):
        ### BEGIN SOLUTION
        table = self.tables[name]
        place, offset = divmod(self.lengths[name], self.block_size)
        copy = None
        is_shared = offset > 0 and self.references[table[place]] > 1
        if offset == 0 or is_shared:
            if 0 not in self.references:
                raise MemoryError("no block is free")
            block = self.references.index(0)
            self.references[block] = 1
            if is_shared:
                copy = (table[place], block)
                self.references[table[place]] -= 1
                table[place] = block
            else:
                table.append(block)
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, copy
        ### END SOLUTION

    def free(self, name):
        ### BEGIN SOLUTION
        for block in self.tables.pop(name):
            self.references[block] -= 1
        del self.lengths[name]
        ### END SOLUTION


# %% nbgrader={"grade_id": "test_SharedBlocks", "grade": true}
check = Checks("SharedBlocks")


class Played:
    """A cache that holds a word in each slot, and what each request has written: what it reads must be just that."""

    def __init__(self, table, num_tokens, num_blocks, size):
        self.blocks, self.num_blocks, self.size = SharedBlocks(table, num_tokens, num_blocks, size), num_blocks, size
        self.cache = {}
        self.words = {"root": [f"root {position}" for position in range(num_tokens)]}
        for position, word in enumerate(self.words["root"]):
            self.cache[table[position // size] * size + position % size] = word
        if self.blocks.block_table("root") != list(table):
            raise CheckFailed(self.blocks.block_table("root"), f"{list(table)}, the table of a fresh root")

    def fork(self, parent, child):
        free = self.blocks.num_free()
        allowed(self.blocks.fork, parent, child)
        self.words[child] = list(self.words[parent])
        same_list(self.blocks.block_table(child), self.blocks.block_table(parent), "a child lists its parent's blocks")
        if self.blocks.num_free() != free:
            raise CheckFailed(self.blocks.num_free(), f"{free} free blocks, as before: a fork takes none")

    def append(self, name):
        """Append a word; says whether a block was copied."""
        got = allowed(self.blocks.append, name)
        if type(got) not in (tuple, list) or len(got) != 2:
            raise CheckFailed(got, "a pair (slot, copy)")
        slot, copy = got
        if copy is not None:
            source, destination = whole_numbers(copy, "copy, a pair of blocks")
            for offset in range(self.size):
                self.cache[destination * self.size + offset] = self.cache.get(source * self.size + offset)
        self.words[name].append(f"{name} {len(self.words[name])}")
        whole_numbers([slot], "the slot")
        self.cache[slot] = self.words[name][-1]
        return copy is not None

    def copies(self, name, expected):
        """Append a word, and fail unless that copies a block or not, as expected."""
        if self.append(name) != expected:
            said = ["no copy of a block", "a copy of a block"]
            raise CheckFailed(Said(said[not expected]), f"{said[expected]} for the next token of {name!r}")

    def free(self, name):
        allowed(self.blocks.free, name)
        del self.words[name]

    def look(self):
        """Fail where a request reads anything but its own words, or blocks are lost, or taken in vain; returns the tables."""
        tables = {name: whole_numbers(self.blocks.block_table(name), f"the table of {name!r}") for name in self.words}
        for name, table in tables.items():
            read = [self.cache.get(block * self.size + offset) for block in table for offset in range(self.size)]
            if read[: len(self.words[name])] != self.words[name]:
                raise CheckFailed(read[: len(self.words[name])], f"{self.words[name]}, what {name!r} has written")
            if len(table) != math.ceil(len(self.words[name]) / self.size):
                raise CheckFailed(
                    table, f"as many blocks of {self.size} as the {len(self.words[name])} tokens of {name!r} need"
                )
        listed = {block for table in tables.values() for block in table}
        if self.blocks.num_free() != self.num_blocks - len(listed):
            listed_or_free = (
                f"{self.num_blocks - len(listed)} free blocks: {len(listed)} of {self.num_blocks} are listed"
            )
            raise CheckFailed(self.blocks.num_free(), listed_or_free)
        return tables


@check("a fork takes no block, and each reads its own tokens after both have written", points=0.25)
def _(rng):
    run = Played([4, 1], 6, 8, 4)
    run.fork("root", "child")
    run.append("child")
    run.append("root")
    run.look()


@check("two sharers of a last block with room: one copies it, the other writes in place", points=0.25)
def _(rng):
    run = Played([4, 1], 6, 8, 4)
    run.fork("root", "child")
    run.copies("child", True)
    run.copies("root", False)
    run.copies("child", False)


@check("three sharers of a last block with room: two copies, in any order, and the third writes in place", points=0.25)
def _(rng):
    run = Played([4, 1], 6, 8, 4)
    run.fork("root", "a")
    run.fork("a", "b")
    run.copies("a", True)
    run.copies("root", True)
    run.copies("b", False)
    run.look()


@check("full blocks are shared for good: the next token takes a new block and no copy", points=0.25)
def _(rng):
    run = Played([4, 1], 8, 8, 4)
    run.fork("root", "child")
    for name in ("root", "child"):
        run.copies(name, False)
    tables = run.look()
    same_list(tables["child"][:2], [4, 1], "the shared blocks")


@check("a block is free when nobody lists it: after the root has ended the child reads on", points=0.25)
def _(rng):
    run = Played([4, 1], 6, 8, 4)
    run.fork("root", "child")
    run.free("root")
    run.look()
    run.copies("child", False)
    run.fork("child", "root")
    run.free("root")
    run.free("child")
    free_blocks(run.blocks, 8)


@check(
    "no block for a copy: MemoryError, and the same token finds room later; a name in use: ValueError; one that is"
    " not: KeyError",
    points=0.25,
)
def _(rng):
    run = Played([1, 0], 3, 3, 2)
    run.fork("root", "a")
    run.fork("root", "b")
    run.copies("a", True)
    refused(MemoryError, "all 3 blocks are listed", run.blocks.append, "b")
    refused(ValueError, "'b' is in use", run.blocks.fork, "root", "b")
    refused(KeyError, "there is no 'c'", run.blocks.fork, "c", "d")
    refused(KeyError, "there is no 'd'", run.blocks.append, "d")
    run.look()
    run.free("a")
    run.copies("b", True)
    run.copies("root", False)
    run.look()


### BEGIN HIDDEN TESTS
def drawn_run(rng, tail, num_blocks=40):
    """A root whose last block holds ``tail`` tokens (0: it is full), in blocks anywhere."""
    size, full = rng.randrange(4, 8), rng.randrange(2, 4)
    table = rng.sample(range(num_blocks), full + (tail > 0))
    return Played(table, full * size + tail, num_blocks, size)


@check.hidden("n children: n copies of the tail at the most, the last who lists it writes in place", points=0.5)
def _(rng):
    for children in (2, rng.randrange(3, 6)):
        run = drawn_run(rng, rng.randrange(1, 4))
        names = ["root", *(f"child {number}" for number in range(children))]
        for name in names[1:]:
            run.fork(rng.choice(sorted(run.words)), name)
        rng.shuffle(names)
        for place, name in enumerate(names):
            run.copies(name, place < children)
            run.look()
        for name in names:
            run.copies(name, False)


@check.hidden("full blocks are shared for good, and only the tail's place in a table ever changes", points=0.5)
def _(rng):
    run = drawn_run(rng, 0)
    before = run.look()["root"]
    run.fork("root", "a")
    run.fork("a", "b")
    for name in ("b", "root", "a"):
        run.copies(name, False)
    for table in run.look().values():
        same_list(table[:-1], before, "")
    run.fork("b", "c")
    run.copies("c", True)
    run.copies("b", False)
    same_list(run.look()["c"][:-1], before, "")


@check.hidden("any order of forks, tokens and ends: each reads what it wrote, and no block is lost", points=1)
def _(rng):
    for _ in range(2):
        run = drawn_run(rng, rng.randrange(0, 4), 60)
        for number in range(50):
            name, kind = rng.choice(sorted(run.words)), rng.random()
            if kind < 0.25 and len(run.words) < 5:
                run.fork(name, f"child {number}")
            elif kind < 0.4 and len(run.words) > 1:
                run.free(name)
            elif run.blocks.num_free():
                tables = run.look()
                others = [block for other, table in tables.items() if other != name for block in table]
                has_room = len(run.words[name]) % run.size > 0
                run.copies(name, has_room and tables[name][-1] in others)
            run.look()
        for name in list(run.words):
            run.free(name)
        free_blocks(run.blocks, 60)


@check.hidden("a refusal changes nothing", points=0.5)
def _(rng):
    size = rng.randrange(4, 7)
    for tokens in (2 * size - 2, 2 * size):
        run = Played([2, 0], tokens, 3, size)
        run.fork("root", "a")
        run.append("root")
        if tokens == 2 * size:
            refused(MemoryError, "", run.blocks.append, "a")
        else:
            run.fork("a", "b")
            refused(MemoryError, "", run.blocks.append, "a")
            refused(ValueError, "", run.blocks.fork, "root", "b")
        tables = run.look()
        run.free("root")
        run.copies("a", tokens < 2 * size)
        same_list(run.look()["a"][:1], tables["a"][:1], "")


### END HIDDEN TESTS
check.report()

# %% [markdown]
# ## 6. Predict, then count
#
# Here are a few requests with lengths of a real service that completes code, drawn from your id, and a block size.
# All start in the same step, and there is memory enough. A request with a prompt of $n$ tokens that puts out $m$ runs
# for $m$ steps. In the first it holds the $n$ tokens of its prompt, in each step after that one token more, and in the
# last $n + m - 1$: the last token that it puts out is never stored. Then it ends and its blocks are free.
#
# **Before** you run the cell behind the checks, commit to a number: which fraction of the slots that requests hold, added
# up over all steps, holds no token? This is the chapter's KV waste, with a step for the unit of time. It is a number
# between 0 and 1. The value is exact, and it is graded within 0.1 % of it: give six decimals. Half a block for each request
# is a fair guess for many requests, and not good enough for these few.
#
# <details><summary>Hint: waste of what?</summary>
#
# 1 - (slots with a token) / (slots in blocks that a request holds). Add up each of the two over all requests and all their
# steps first, and divide then. A request that runs longer counts more often.
# </details>


# %% nbgrader={"grade_id": "draw", "locked": true}
def draw_run(rng):
    """A block size, and a few requests as pairs (prompt, output) in tokens."""
    return rng.choice([64, 128, 256]), AzureLengths("code").sample(8, rng.getrandbits(32))


my_block_size, my_requests = draw_run(student_rng(student_id, "paged_kv_cache"))
print(f"blocks of {my_block_size}")
for request in my_requests:
    print(request)

# %% nbgrader={"grade_id": "predicted_waste", "solution": true}
# Set predicted_waste to your prediction: a fraction between 0 and 1, a plain number.
### BEGIN SOLUTION
with_token = sum(sum(range(prompt, prompt + output)) for prompt, output in my_requests)
held = sum(
    math.ceil(tokens / my_block_size) * my_block_size
    for prompt, output in my_requests
    for tokens in range(prompt, prompt + output)
)
predicted_waste = 1 - with_token / held
### END SOLUTION

# %% nbgrader={"grade_id": "test_predicted_waste", "grade": true}
check = Checks("predicted_waste")


@check("student_id (first code cell) is your own", points=0)
def _(rng):
    student_rng(student_id, "paged_kv_cache")
    assert student_id != "student-00", "it is still the placeholder student-00"


@check("a prediction is committed, as a plain number; whether it is right shows below, and when it is graded", points=0)
def _(rng):
    assert type(predicted_waste) in (int, float), "expected an int or a float; float(...) makes one of most numbers"


@check("it can be: a fraction above 0 and below what one slot less than a block for each request would waste", points=0)
def _(rng):
    block_size, requests = draw_run(student_rng(student_id, "paged_kv_cache"))
    steps = sum(output for _, output in requests)
    tokens = sum(sum(range(prompt, prompt + output)) for prompt, output in requests)
    most = steps * (block_size - 1) / (tokens + steps * (block_size - 1))
    if type(predicted_waste) not in (int, float) or not 0 < predicted_waste < most:
        raise CheckFailed(
            predicted_waste, f"above 0 and below {most:.4f} (a fraction of the slots held, no percentage)"
        )


### BEGIN HIDDEN TESTS
def counted_waste(block_size, requests):
    """Step by step and slot by slot, as the run goes."""
    empty = held = 0
    for step in range(max(output for _, output in requests)):
        for prompt, output in requests:
            if step < output:
                tokens = prompt + step
                slots = tokens
                while slots % block_size:
                    slots += 1
                empty += slots - tokens
                held += slots
    return empty / held


@check.hidden("the prediction for your requests is right within 0.1 %", points=2)
def _(rng):
    close(predicted_waste, counted_waste(*draw_run(student_rng(student_id, "paged_kv_cache"))), relative=0.001)


### END HIDDEN TESTS
check.report()

# %% [markdown]
# Now count. The cell runs your requests through your own `BlockTables`, step by step, writes each token into the slot
# that your class gives it, and counts the slots that are written and the blocks that are held. It is worth no points; a
# difference is worth a thought. The waste is shown in millionths.

# %%
blocks = BlockTables(2_000, my_block_size)
written = {}  # of each slot with a token: whose it is
with_token = held = 0
for step in range(max(output for _, output in my_requests)):
    for name, (prompt, output) in enumerate(my_requests):
        if step == 0:
            blocks.allocate(name, prompt)
            table = blocks.block_table(name)
            written.update(dict.fromkeys(slot_mapping([table], [0], [prompt], my_block_size), name))
        elif step < output:
            written[blocks.append(name)] = name
        elif step == output:
            blocks.free(name)
            written = {slot: owner for slot, owner in written.items() if owner != name}
    with_token += len(written)
    held += (2_000 - blocks.num_free()) * my_block_size

unit = "millionths of the slots held"
measured(f"blocks of {my_block_size}", 1e6 * predicted_waste, 1e6 * (1 - with_token / held), unit)

longest = 8192
steps = sum(output for _, output in my_requests)
print(f"a contiguous region of {longest:,} slots for each request: {1 - with_token / (steps * longest):.1%} wasted")

# %% [markdown]
# ## Explain
#
# Two sentences for yourself; they are not graded. Blocks of one slot would waste nothing at all. What would they cost,
# in the block tables and for the kernel that reads through them?
