# %% [markdown]
# Answers to the lab `paged_kv_cache`, to try its grader with: the mistakes that the chapter warns of, and other ways to be right.

# %% answer={"exercise": "blocks_needed", "name": "the last block rounded away", "fails": "17 tokens in blocks"}
def blocks_needed(lengths, block_size, prefix=0):
    shared = prefix // block_size
    return shared * bool(lengths) + sum(length // block_size - shared for length in lengths)

# %% answer={"exercise": "blocks_needed", "name": "always a block more", "fails": "without a prefix"}
def blocks_needed(lengths, block_size, prefix=0):
    shared = prefix // block_size
    return shared * bool(lengths) + sum(length // block_size + 1 - shared for length in lengths)

# %% answer={"exercise": "blocks_needed", "name": "requests packed into each other's last blocks", "fails": "requests of 5, 5 and 5"}
def blocks_needed(lengths, block_size, prefix=0):
    tokens = sum(length - prefix for length in lengths) + (prefix if lengths else 0)
    return math.ceil(tokens / block_size)

# %% answer={"exercise": "blocks_needed", "name": "a block shared that is only partly common", "fails": "10 common tokens"}
def blocks_needed(lengths, block_size, prefix=0):
    shared = math.ceil(prefix / block_size)
    return shared * bool(lengths) + sum(max(0, math.ceil(length / block_size) - shared) for length in lengths)

# %% answer={"exercise": "blocks_needed", "name": "nothing shared", "fails": "with a prefix"}
def blocks_needed(lengths, block_size, prefix=0):
    return sum(math.ceil(length / block_size) for length in lengths)

# %% answer={"exercise": "blocks_needed", "name": "the prefix apart from the rest, in blocks of its own", "fails": "10 common tokens"}
def blocks_needed(lengths, block_size, prefix=0):
    own = sum(math.ceil((length - prefix) / block_size) for length in lengths)
    return own + (math.ceil(prefix / block_size) if lengths else 0)

# %% answer={"exercise": "blocks_needed", "name": "what is not common in blocks of its own, the prefix rounded down", "fails": "10 common tokens"}
def blocks_needed(lengths, block_size, prefix=0):
    own = sum(math.ceil((length - prefix) / block_size) for length in lengths)
    return own + (prefix // block_size if lengths else 0)

# %% answer={"exercise": "blocks_needed", "name": "a block of its own for every request", "fails": "no request takes no block"}
def blocks_needed(lengths, block_size, prefix=0):
    shared = prefix // block_size
    return shared * bool(lengths) + sum(max(1, math.ceil(length / block_size) - shared) for length in lengths)

# %% answer={"exercise": "blocks_needed", "name": "the prefix kept for nobody", "fails": "no request takes no block"}
def blocks_needed(lengths, block_size, prefix=0):
    shared = prefix // block_size
    return shared + sum(math.ceil(length / block_size) - shared for length in lengths)

# %% answer={"exercise": "blocks_needed", "name": "slots instead of blocks", "fails": "17 tokens in blocks"}
def blocks_needed(lengths, block_size, prefix=0):
    shared = prefix // block_size
    own = sum(math.ceil(length / block_size) - shared for length in lengths)
    return (own + shared * bool(lengths)) * block_size

# %% answer={"exercise": "blocks_needed", "name": "what sharing saves, subtracted", "right": true}
def blocks_needed(lengths, block_size, prefix=0):
    apart = sum(math.ceil(length / block_size) for length in lengths)
    saved = max(0, len(lengths) - 1) * (prefix // block_size)
    return apart - saved

# %% answer={"exercise": "blocks_needed", "name": "the common part cut off first", "right": true}
def blocks_needed(lengths, block_size, prefix=0):
    if not lengths:
        return 0
    common = prefix - prefix % block_size
    blocks = common // block_size
    for length in lengths:
        whole, rest = divmod(length - common, block_size)
        blocks += whole + (rest > 0)
    return blocks

# %% answer={"exercise": "BlockTables", "name": "a block more than the prompt needs", "fails": "prompts"}
class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.block_size, self.free_blocks, self.tables, self.lengths = block_size, list(range(num_blocks)), {}, {}

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return len(self.free_blocks)

    def allocate(self, name, num_tokens):
        if name in self.tables:
            raise ValueError(name)
        wanted = num_tokens // self.block_size + 1
        if wanted > len(self.free_blocks):
            raise MemoryError(wanted)
        self.tables[name] = [self.free_blocks.pop() for _ in range(wanted)]
        self.lengths[name] = num_tokens

    def append(self, name):
        length = self.lengths[name]
        if length == len(self.tables[name]) * self.block_size:
            if not self.free_blocks:
                raise MemoryError(name)
            self.tables[name].append(self.free_blocks.pop())
        self.lengths[name] += 1
        return self.tables[name][length // self.block_size] * self.block_size + length % self.block_size

    def free(self, name):
        self.free_blocks += self.tables.pop(name)
        del self.lengths[name]

# %% answer={"exercise": "BlockTables", "name": "blocks taken before it is seen that they are too few", "fails": "a refusal changes nothing"}
class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.block_size, self.free_blocks, self.tables, self.lengths = block_size, list(range(num_blocks)), {}, {}

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return len(self.free_blocks)

    def allocate(self, name, num_tokens):
        if name in self.tables:
            raise ValueError(name)
        table = []
        for _ in range(math.ceil(num_tokens / self.block_size)):
            if not self.free_blocks:
                raise MemoryError(name)
            table.append(self.free_blocks.pop())
        self.tables[name], self.lengths[name] = table, num_tokens

    def append(self, name):
        length = self.lengths[name]
        if length == len(self.tables[name]) * self.block_size:
            if not self.free_blocks:
                raise MemoryError(name)
            self.tables[name].append(self.free_blocks.pop())
        self.lengths[name] += 1
        return self.tables[name][-1] * self.block_size + length % self.block_size

    def free(self, name):
        self.free_blocks += self.tables.pop(name)
        del self.lengths[name]

# %% answer={"exercise": "BlockTables", "name": "a new block for the token that fills one", "fails": "3 tokens behind"}
class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.block_size, self.free_blocks, self.tables, self.lengths = block_size, list(range(num_blocks)), {}, {}

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return len(self.free_blocks)

    def allocate(self, name, num_tokens):
        if name in self.tables:
            raise ValueError(name)
        wanted = math.ceil(num_tokens / self.block_size)
        if wanted > len(self.free_blocks):
            raise MemoryError(wanted)
        self.tables[name] = [self.free_blocks.pop() for _ in range(wanted)]
        self.lengths[name] = num_tokens

    def append(self, name):
        self.lengths[name] += 1
        length = self.lengths[name]
        if length == len(self.tables[name]) * self.block_size:
            if not self.free_blocks:
                raise MemoryError(name)
            self.tables[name].append(self.free_blocks.pop())
        return self.tables[name][(length - 1) // self.block_size] * self.block_size + (length - 1) % self.block_size

    def free(self, name):
        self.free_blocks += self.tables.pop(name)
        del self.lengths[name]

# %% answer={"exercise": "BlockTables", "name": "a block for every token", "fails": "append"}
class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.block_size, self.free_blocks, self.tables, self.lengths = block_size, list(range(num_blocks)), {}, {}

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return len(self.free_blocks)

    def allocate(self, name, num_tokens):
        if name in self.tables:
            raise ValueError(name)
        wanted = math.ceil(num_tokens / self.block_size)
        if wanted > len(self.free_blocks):
            raise MemoryError(wanted)
        self.tables[name] = [self.free_blocks.pop() for _ in range(wanted)]
        self.lengths[name] = num_tokens

    def append(self, name):
        if not self.free_blocks:
            raise MemoryError(name)
        self.tables[name].append(self.free_blocks.pop())
        self.lengths[name] += 1
        return self.tables[name][-1] * self.block_size

    def free(self, name):
        self.free_blocks += self.tables.pop(name)
        del self.lengths[name]

# %% answer={"exercise": "BlockTables", "name": "the last block forgotten when a request ends", "fails": "free"}
class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.block_size, self.free_blocks, self.tables, self.lengths = block_size, list(range(num_blocks)), {}, {}

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return len(self.free_blocks)

    def allocate(self, name, num_tokens):
        if name in self.tables:
            raise ValueError(name)
        wanted = math.ceil(num_tokens / self.block_size)
        if wanted > len(self.free_blocks):
            raise MemoryError(wanted)
        self.tables[name] = [self.free_blocks.pop() for _ in range(wanted)]
        self.lengths[name] = num_tokens

    def append(self, name):
        length = self.lengths[name]
        if length == len(self.tables[name]) * self.block_size:
            if not self.free_blocks:
                raise MemoryError(name)
            self.tables[name].append(self.free_blocks.pop())
        self.lengths[name] += 1
        return self.tables[name][-1] * self.block_size + length % self.block_size

    def free(self, name):
        self.free_blocks += self.tables.pop(name)[: self.lengths.pop(name) // self.block_size]

# %% answer={"exercise": "BlockTables", "name": "freed blocks are listed by the table still", "fails": "free"}
class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.block_size, self.free_blocks, self.tables, self.lengths = block_size, list(range(num_blocks)), {}, {}

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return len(self.free_blocks)

    def allocate(self, name, num_tokens):
        if name in self.tables:
            raise ValueError(name)
        wanted = math.ceil(num_tokens / self.block_size)
        if wanted > len(self.free_blocks):
            raise MemoryError(wanted)
        self.tables[name] = [self.free_blocks.pop() for _ in range(wanted)]
        self.lengths[name] = num_tokens

    def append(self, name):
        length = self.lengths[name]
        if length == len(self.tables[name]) * self.block_size:
            if not self.free_blocks:
                raise MemoryError(name)
            self.tables[name].append(self.free_blocks.pop())
        self.lengths[name] += 1
        return self.tables[name][-1] * self.block_size + length % self.block_size

    def free(self, name):
        self.free_blocks += self.tables[name]

# %% answer={"exercise": "BlockTables", "name": "the slot's place in the request, not in the cache", "fails": "append"}
class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.block_size, self.free_blocks, self.tables, self.lengths = block_size, list(range(num_blocks)), {}, {}

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return len(self.free_blocks)

    def allocate(self, name, num_tokens):
        if name in self.tables:
            raise ValueError(name)
        wanted = math.ceil(num_tokens / self.block_size)
        if wanted > len(self.free_blocks):
            raise MemoryError(wanted)
        self.tables[name] = [self.free_blocks.pop() for _ in range(wanted)]
        self.lengths[name] = num_tokens

    def append(self, name):
        length = self.lengths[name]
        if length == len(self.tables[name]) * self.block_size:
            if not self.free_blocks:
                raise MemoryError(name)
            self.tables[name].append(self.free_blocks.pop())
        self.lengths[name] += 1
        return length

    def free(self, name):
        self.free_blocks += self.tables.pop(name)
        del self.lengths[name]

# %% answer={"exercise": "BlockTables", "name": "a request in use is overwritten", "fails": "a name in use"}
class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.block_size, self.free_blocks, self.tables, self.lengths = block_size, list(range(num_blocks)), {}, {}

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return len(self.free_blocks)

    def allocate(self, name, num_tokens):
        wanted = math.ceil(num_tokens / self.block_size)
        if wanted > len(self.free_blocks):
            raise MemoryError(wanted)
        self.tables[name] = [self.free_blocks.pop() for _ in range(wanted)]
        self.lengths[name] = num_tokens

    def append(self, name):
        length = self.lengths[name]
        if length == len(self.tables[name]) * self.block_size:
            if not self.free_blocks:
                raise MemoryError(name)
            self.tables[name].append(self.free_blocks.pop())
        self.lengths[name] += 1
        return self.tables[name][-1] * self.block_size + length % self.block_size

    def free(self, name):
        self.free_blocks += self.tables.pop(name)
        del self.lengths[name]

# %% answer={"exercise": "BlockTables", "name": "the token counted before it has room", "fails": "4 blocks of 2 have no room"}
class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.block_size, self.free_blocks, self.tables, self.lengths = block_size, list(range(num_blocks)), {}, {}

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return len(self.free_blocks)

    def allocate(self, name, num_tokens):
        if name in self.tables:
            raise ValueError(name)
        wanted = math.ceil(num_tokens / self.block_size)
        if wanted > len(self.free_blocks):
            raise MemoryError(wanted)
        self.tables[name] = [self.free_blocks.pop() for _ in range(wanted)]
        self.lengths[name] = num_tokens

    def append(self, name):
        length = self.lengths[name]
        self.lengths[name] += 1
        if length == len(self.tables[name]) * self.block_size:
            if not self.free_blocks:
                raise MemoryError(name)
            self.tables[name].append(self.free_blocks.pop())
        return self.tables[name][-1] * self.block_size + length % self.block_size

    def free(self, name):
        self.free_blocks += self.tables.pop(name)
        del self.lengths[name]

# %% answer={"exercise": "BlockTables", "name": "a queue of free blocks, and slots counted in the table", "right": true}
from collections import deque


class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.block_size, self.free_blocks, self.tables, self.lengths = block_size, deque(range(num_blocks)), {}, {}

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return len(self.free_blocks)

    def allocate(self, name, num_tokens):
        if name in self.lengths:
            raise ValueError("in use")
        if num_tokens > len(self.free_blocks) * self.block_size:
            raise MemoryError("too few")
        table = []
        while len(table) * self.block_size < num_tokens:
            table.append(self.free_blocks.popleft())
        self.tables[name], self.lengths[name] = table, num_tokens

    def append(self, name):
        block, offset = divmod(self.lengths[name], self.block_size)
        if offset == 0:
            try:
                self.tables[name].append(self.free_blocks.popleft())
            except IndexError:
                raise MemoryError("no block") from None
        self.lengths[name] += 1
        return self.tables[name][block] * self.block_size + offset

    def free(self, name):
        for block in reversed(self.tables[name]):
            self.free_blocks.append(block)
        del self.tables[name], self.lengths[name]

# %% answer={"exercise": "BlockTables", "name": "the owner of each block in one list", "right": true}
class BlockTables:
    def __init__(self, num_blocks, block_size):
        self.size, self.owner, self.order, self.count = block_size, [None] * num_blocks, {}, {}

    def block_table(self, name):
        return self.order[name][:]

    def num_free(self):
        return sum(owner is None for owner in self.owner)

    def _take(self, name):
        block = self.owner.index(None)
        self.owner[block] = (name,)
        self.order[name].append(block)

    def allocate(self, name, num_tokens):
        wanted = 1 + (num_tokens - 1) // self.size
        if name in self.order:
            raise ValueError(name)
        if self.num_free() < wanted:
            raise MemoryError(name)
        self.order[name], self.count[name] = [], num_tokens
        for _ in range(wanted):
            self._take(name)

    def append(self, name):
        if self.count[name] % self.size == 0:
            if not self.num_free():
                raise MemoryError(name)
            self._take(name)
        self.count[name] += 1
        return self.order[name][-1] * self.size + (self.count[name] - 1) % self.size

    def free(self, name):
        del self.order[name], self.count[name]
        self.owner = [None if owner == (name,) else owner for owner in self.owner]

# %% answer={"exercise": "slot_mapping", "name": "positions as slots, as if the cache were contiguous", "fails": "a prompt of 6 tokens"}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    slots = [start + i for start, count in zip(starts, counts) for i in range(count)]
    return slots + [-1] * (padded_to - len(slots))

# %% answer={"exercise": "slot_mapping", "name": "chunks written from the beginning of the table", "fails": "one token at position 5"}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    slots = []
    for table, count in zip(block_tables, counts):
        slots += [table[i // block_size] * block_size + i % block_size for i in range(count)]
    return slots + [-1] * (padded_to - len(slots))

# %% answer={"exercise": "slot_mapping", "name": "the offset starts again with each chunk", "fails": "prompts and chunks"}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    slots = []
    for table, start, count in zip(block_tables, starts, counts):
        for i in range(count):
            slots.append(table[(start + i) // block_size] * block_size + i % block_size)
    return slots + [-1] * (padded_to - len(slots))

# %% answer={"exercise": "slot_mapping", "name": "a chunk taken to lie in one piece from its first slot on", "fails": "prompts and chunks"}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    slots = []
    for table, start, count in zip(block_tables, starts, counts):
        if count:
            first = table[start // block_size] * block_size + start % block_size
            slots += range(first, first + count)
    return slots + [-1] * (padded_to - len(slots))

# %% answer={"exercise": "slot_mapping", "name": "the block's number, not times the block size", "fails": "decodes"}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    slots = []
    for table, start, count in zip(block_tables, starts, counts):
        slots += [table[p // block_size] + p % block_size for p in range(start, start + count)]
    return slots + [-1] * (padded_to - len(slots))

# %% answer={"exercise": "slot_mapping", "name": "padding written to slot 0", "fails": "two tokens and two of padding"}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    slots = []
    for table, start, count in zip(block_tables, starts, counts):
        slots += [table[p // block_size] * block_size + p % block_size for p in range(start, start + count)]
    return slots + [0] * (padded_to - len(slots))

# %% answer={"exercise": "slot_mapping", "name": "padding in front", "fails": "padding: -1"}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    slots = []
    for table, start, count in zip(block_tables, starts, counts):
        slots += [table[p // block_size] * block_size + p % block_size for p in range(start, start + count)]
    return [-1] * (padded_to - len(slots)) + slots

# %% answer={"exercise": "slot_mapping", "name": "the table's blocks sorted", "fails": "a prompt of 6 tokens"}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    slots = []
    for table, start, count in zip(block_tables, starts, counts):
        slots += [sorted(table)[p // block_size] * block_size + p % block_size for p in range(start, start + count)]
    return slots + [-1] * (padded_to - len(slots))

# %% answer={"exercise": "slot_mapping", "name": "the caller's tables used up", "fails": "one token at position 5"}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    slots = []
    for table, start, count in zip(block_tables, starts, counts):
        del table[: start // block_size]
        first = start - start % block_size
        slots += [table[(p - first) // block_size] * block_size + p % block_size for p in range(start, start + count)]
    return slots + [-1] * (padded_to - len(slots))

# %% answer={"exercise": "slot_mapping", "name": "all slots of a table, sliced", "right": true}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    slots = []
    for table, start, count in zip(block_tables, starts, counts):
        every = [slot for block in table for slot in range(block * block_size, (block + 1) * block_size)]
        slots.extend(every[start : start + count])
    while len(slots) < padded_to:
        slots.append(-1)
    return slots

# %% answer={"exercise": "slot_mapping", "name": "by tensors", "right": true}
def slot_mapping(block_tables, starts, counts, block_size, padded_to=0):
    parts = [torch.empty(0, dtype=torch.long)]
    for table, start, count in zip(block_tables, starts, counts):
        positions = torch.arange(start, start + count)
        parts.append(torch.tensor(table)[positions // block_size] * block_size + positions % block_size)
    slots = torch.cat(parts)
    return torch.nn.functional.pad(slots, (0, max(0, padded_to - len(slots))), value=-1).tolist()

# %% answer={"exercise": "paged_attention", "name": "all slots of the last block", "fails": "a last block"}
def paged_attention(q, keys, values, block_table, num_tokens):
    n = math.ceil(num_tokens / keys.shape[2])
    k, v = (c[torch.tensor(block_table[:n])].transpose(1, 2).flatten(0, 1) for c in (keys, values))
    k, v = (x.repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))
    weights = torch.softmax(torch.einsum("hd,nhd->hn", q, k) / q.shape[1] ** 0.5, 1)
    return torch.einsum("hn,nhd->hd", weights, v)

# %% answer={"exercise": "paged_attention", "name": "scores of empty slots masked, their values not", "fails": "a last block"}
def paged_attention(q, keys, values, block_table, num_tokens):
    k, v = (c[torch.tensor(block_table)].transpose(1, 2).flatten(0, 1) for c in (keys, values))
    k, v = (x.repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("hd,nhd->hn", q, k) / q.shape[1] ** 0.5
    scores[:, num_tokens:] = -math.inf
    return torch.einsum("hn,nhd->hd", torch.softmax(scores, 1), v)

# %% answer={"exercise": "paged_attention", "name": "empty slots set to 0 and counted", "fails": "blocks that the table lists"}
def paged_attention(q, keys, values, block_table, num_tokens):
    k, v = (c[torch.tensor(block_table)].transpose(1, 2).flatten(0, 1).clone() for c in (keys, values))
    k[num_tokens:] = v[num_tokens:] = 0
    k, v = (x.repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))
    weights = torch.softmax(torch.einsum("hd,nhd->hn", q, k) / q.shape[1] ** 0.5, 1)
    return torch.einsum("hn,nhd->hd", weights, v)

# %% answer={"exercise": "paged_attention", "name": "heads taken in turns", "fails": "4 query heads and 2"}
def paged_attention(q, keys, values, block_table, num_tokens):
    k, v = (c[torch.tensor(block_table)].transpose(1, 2).flatten(0, 1)[:num_tokens] for c in (keys, values))
    k, v = (x.repeat(1, len(q) // x.shape[1], 1) for x in (k, v))
    weights = torch.softmax(torch.einsum("hd,nhd->hn", q, k) / q.shape[1] ** 0.5, 1)
    return torch.einsum("hn,nhd->hd", weights, v)

# %% answer={"exercise": "paged_attention", "name": "blocks and heads put together without being turned", "fails": "grouped heads"}
def paged_attention(q, keys, values, block_table, num_tokens):
    kv_heads, d = keys.shape[1], q.shape[1]
    k, v = (c[torch.tensor(block_table)].reshape(kv_heads, -1, d)[:, :num_tokens] for c in (keys, values))
    k, v = (x.repeat_interleave(len(q) // kv_heads, 0) for x in (k, v))
    weights = torch.softmax(torch.einsum("hd,hnd->hn", q, k) / d**0.5, 1)
    return torch.einsum("hn,hnd->hd", weights, v)

# %% answer={"exercise": "paged_attention", "name": "scores not scaled", "fails": "scores over the square root"}
def paged_attention(q, keys, values, block_table, num_tokens):
    k, v = (c[torch.tensor(block_table)].transpose(1, 2).flatten(0, 1)[:num_tokens] for c in (keys, values))
    k, v = (x.repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))
    return torch.einsum("hn,nhd->hd", torch.softmax(torch.einsum("hd,nhd->hn", q, k), 1), v)

# %% answer={"exercise": "paged_attention", "name": "scores halved, whatever d is", "fails": "scores over the square root"}
def paged_attention(q, keys, values, block_table, num_tokens):
    k, v = (c[torch.tensor(block_table)].transpose(1, 2).flatten(0, 1)[:num_tokens] for c in (keys, values))
    k, v = (x.repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))
    return torch.einsum("hn,nhd->hd", torch.softmax(torch.einsum("hd,nhd->hn", q, k) / 2, 1), v)

# %% answer={"exercise": "paged_attention", "name": "blocks in the order of their numbers", "fails": "the same as over contiguous"}
def paged_attention(q, keys, values, block_table, num_tokens):
    n = math.ceil(num_tokens / keys.shape[2])
    table = torch.tensor(sorted(block_table[:n]))
    k, v = (c[table].transpose(1, 2).flatten(0, 1)[:num_tokens].nan_to_num() for c in (keys, values))
    k, v = (x.repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v.roll(1, 0)))
    weights = torch.softmax(torch.einsum("hd,nhd->hn", q, k) / q.shape[1] ** 0.5, 1)
    return torch.einsum("hn,nhd->hd", weights, v)

# %% answer={"exercise": "paged_attention", "name": "the table ignored, the cache read from its beginning", "fails": "equal keys"}
def paged_attention(q, keys, values, block_table, num_tokens):
    k, v = (c.transpose(1, 2).flatten(0, 1)[:num_tokens] for c in (keys, values))
    k, v = (x.repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))
    weights = torch.softmax(torch.einsum("hd,nhd->hn", q, k) / q.shape[1] ** 0.5, 1)
    return torch.einsum("hn,nhd->hd", weights, v)

# %% answer={"exercise": "paged_attention", "name": "the query's own token left out", "fails": "equal keys"}
def paged_attention(q, keys, values, block_table, num_tokens):
    k, v = (c[torch.tensor(block_table)].transpose(1, 2).flatten(0, 1)[: num_tokens - 1] for c in (keys, values))
    k, v = (x.repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))
    weights = torch.softmax(torch.einsum("hd,nhd->hn", q, k) / q.shape[1] ** 0.5, 1)
    return torch.einsum("hn,nhd->hd", weights, v)

# %% answer={"exercise": "paged_attention", "name": "block by block with a running maximum, as a kernel does", "right": true}
def paged_attention(q, keys, values, block_table, num_tokens):
    heads, d = q.shape
    size, group = keys.shape[2], heads // keys.shape[1]
    highest = torch.full((heads, 1), -math.inf, dtype=q.dtype)
    total, out = torch.zeros(heads, 1, dtype=q.dtype), torch.zeros_like(q)
    for place in range(math.ceil(num_tokens / size)):
        there = min(size, num_tokens - place * size)
        k = keys[block_table[place], :, :there].repeat_interleave(group, 0)
        v = values[block_table[place], :, :there].repeat_interleave(group, 0)
        scores = (k @ q[:, :, None])[:, :, 0] / math.sqrt(d)
        new = torch.maximum(highest, scores.max(1, keepdim=True).values)
        weights, shrink = torch.exp(scores - new), torch.exp(highest - new)
        total = total * shrink + weights.sum(1, keepdim=True)
        out = out * shrink + (weights[:, None] @ v)[:, 0]
        highest = new
    return out / total

# %% answer={"exercise": "paged_attention", "name": "by slots, and torch's own attention", "right": true}
def paged_attention(q, keys, values, block_table, num_tokens):
    positions = torch.arange(num_tokens)
    blocks, offsets = torch.tensor(block_table)[positions // keys.shape[2]], positions % keys.shape[2]
    k, v = (cache[blocks, :, offsets].transpose(0, 1) for cache in (keys, values))
    heads = torch.arange(len(q)) // (len(q) // keys.shape[1])
    out = torch.nn.functional.scaled_dot_product_attention(q[None, :, None], k[heads][None], v[heads][None])
    return out[0, :, 0]

# %% answer={"exercise": "SharedBlocks", "name": "child and parent share one list", "fails": "a fork takes no block"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = self.tables[parent], self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1

    def append(self, name):
        table, (place, offset), copy = self.tables[name], divmod(self.lengths[name], self.block_size), None
        if offset == 0 or self.references[table[place]] > 1:
            if 0 not in self.references:
                raise MemoryError(name)
            block = self.references.index(0)
            self.references[block] = 1
            if offset:
                copy = (table[place], block)
                self.references[table[place]] -= 1
                table[place] = block
            else:
                table.append(block)
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, copy

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] -= 1

# %% answer={"exercise": "SharedBlocks", "name": "no copy: sharers write into the same slot", "fails": "a fork takes no block"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1

    def append(self, name):
        table, (place, offset) = self.tables[name], divmod(self.lengths[name], self.block_size)
        if offset == 0:
            if 0 not in self.references:
                raise MemoryError(name)
            table.append(self.references.index(0))
            self.references[table[-1]] = 1
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, None

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] -= 1

# %% answer={"exercise": "SharedBlocks", "name": "a new block, and what was in the old one is not copied", "fails": "a fork takes no block"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1

    def append(self, name):
        table, (place, offset) = self.tables[name], divmod(self.lengths[name], self.block_size)
        if offset == 0 or self.references[table[place]] > 1:
            if 0 not in self.references:
                raise MemoryError(name)
            block = self.references.index(0)
            self.references[block] = 1
            if offset:
                self.references[table[place]] -= 1
                table[place] = block
            else:
                table.append(block)
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, None

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] -= 1

# %% answer={"exercise": "SharedBlocks", "name": "the old block keeps its reference: the last one copies too", "fails": "two sharers"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1

    def append(self, name):
        table, (place, offset), copy = self.tables[name], divmod(self.lengths[name], self.block_size), None
        if offset == 0 or self.references[table[place]] > 1:
            if 0 not in self.references:
                raise MemoryError(name)
            block = self.references.index(0)
            self.references[block] = 1
            if offset:
                copy = (table[place], block)
                table[place] = block
            else:
                table.append(block)
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, copy

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] -= 1

# %% answer={"exercise": "SharedBlocks", "name": "a full last block copied", "fails": "full blocks are shared for good: the next"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1

    def append(self, name):
        table, (place, offset), copy = self.tables[name], divmod(self.lengths[name], self.block_size), None
        if self.references[table[-1]] > 1:
            if 0 not in self.references:
                raise MemoryError(name)
            copy = (table[-1], self.references.index(0))
            self.references[copy[0]] -= 1
            self.references[copy[1]] = 1
            table[-1] = copy[1]
        if offset == 0:
            if 0 not in self.references:
                raise MemoryError(name)
            table.append(self.references.index(0))
            self.references[table[-1]] = 1
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, copy

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] -= 1

# %% answer={"exercise": "SharedBlocks", "name": "whoever ends frees all blocks of its table", "fails": "a block is free when nobody lists it"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1

    def append(self, name):
        table, (place, offset), copy = self.tables[name], divmod(self.lengths[name], self.block_size), None
        if offset == 0 or self.references[table[place]] > 1:
            if 0 not in self.references:
                raise MemoryError(name)
            block = self.references.index(0)
            self.references[block] = 1
            if offset:
                copy = (table[place], block)
                self.references[table[place]] -= 1
                table[place] = block
            else:
                table.append(block)
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, copy

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] = 0

# %% answer={"exercise": "SharedBlocks", "name": "the tail copied when it is forked, written to or not", "fails": "a fork takes no block"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]
        self.copies = {}

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1
        if self.lengths[child] % self.block_size:
            block = self.references.index(0)
            self.copies[child] = (self.tables[child][-1], block)
            self.references[self.tables[child][-1]] -= 1
            self.references[block] = 1
            self.tables[child][-1] = block

    def append(self, name):
        table, (place, offset) = self.tables[name], divmod(self.lengths[name], self.block_size)
        if offset == 0:
            if 0 not in self.references:
                raise MemoryError(name)
            table.append(self.references.index(0))
            self.references[table[-1]] = 1
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, self.copies.pop(name, None)

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] -= 1

# %% answer={"exercise": "SharedBlocks", "name": "the pair of blocks the wrong way round", "fails": "a fork takes no block"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1

    def append(self, name):
        table, (place, offset), copy = self.tables[name], divmod(self.lengths[name], self.block_size), None
        if offset == 0 or self.references[table[place]] > 1:
            if 0 not in self.references:
                raise MemoryError(name)
            block = self.references.index(0)
            self.references[block] = 1
            if offset:
                copy = (block, table[place])
                self.references[table[place]] -= 1
                table[place] = block
            else:
                table.append(block)
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, copy

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] -= 1

# %% answer={"exercise": "SharedBlocks", "name": "every fork makes it two sharers", "fails": "three sharers"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] = 2

    def append(self, name):
        table, (place, offset), copy = self.tables[name], divmod(self.lengths[name], self.block_size), None
        if offset == 0 or self.references[table[place]] > 1:
            if 0 not in self.references:
                raise MemoryError(name)
            block = self.references.index(0)
            self.references[block] = 1
            if offset:
                copy = (table[place], block)
                self.references[table[place]] -= 1
                table[place] = block
            else:
                table.append(block)
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, copy

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] = max(0, self.references[block] - 1)

# %% answer={"exercise": "SharedBlocks", "name": "a copy for two sharers and not for three", "fails": "three sharers"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1

    def append(self, name):
        table, (place, offset), copy = self.tables[name], divmod(self.lengths[name], self.block_size), None
        if offset == 0 or self.references[table[place]] == 2:
            if 0 not in self.references:
                raise MemoryError(name)
            block = self.references.index(0)
            self.references[block] = 1
            if offset:
                copy = (table[place], block)
                self.references[table[place]] -= 1
                table[place] = block
            else:
                table.append(block)
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, copy

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] = max(0, self.references[block] - 1)

# %% answer={"exercise": "SharedBlocks", "name": "the old block given up before there is a new one", "fails": "no block for a copy"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1

    def append(self, name):
        table, (place, offset), copy = self.tables[name], divmod(self.lengths[name], self.block_size), None
        if offset == 0 or self.references[table[place]] > 1:
            if offset:
                self.references[table[place]] -= 1
            if 0 not in self.references:
                raise MemoryError(name)
            block = self.references.index(0)
            self.references[block] = 1
            if offset:
                copy = (table[place], block)
                table[place] = block
            else:
                table.append(block)
        self.lengths[name] += 1
        return table[place] * self.block_size + offset, copy

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] = max(0, self.references[block] - 1)

# %% answer={"exercise": "SharedBlocks", "name": "the token counted before it has room", "fails": "no block for a copy"}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.block_size, self.tables, self.lengths = block_size, {"root": list(table)}, {"root": num_tokens}
        self.references = [int(block in table) for block in range(num_blocks)]

    def block_table(self, name):
        return list(self.tables[name])

    def num_free(self):
        return self.references.count(0)

    def fork(self, parent, child):
        if child in self.tables:
            raise ValueError(child)
        self.tables[child], self.lengths[child] = list(self.tables[parent]), self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1

    def append(self, name):
        table, (place, offset), copy = self.tables[name], divmod(self.lengths[name], self.block_size), None
        self.lengths[name] += 1
        if offset == 0 or self.references[table[place]] > 1:
            if 0 not in self.references:
                raise MemoryError(name)
            block = self.references.index(0)
            self.references[block] = 1
            if offset:
                copy = (table[place], block)
                self.references[table[place]] -= 1
                table[place] = block
            else:
                table.append(block)
        return table[place] * self.block_size + offset, copy

    def free(self, name):
        for block in self.tables.pop(name):
            self.references[block] = max(0, self.references[block] - 1)

# %% answer={"exercise": "SharedBlocks", "name": "the sharers of a block as a set of names", "right": true}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.size, self.order, self.tokens = block_size, {"root": list(table)}, {"root": num_tokens}
        self.sharers = [{"root"} if block in table else set() for block in range(num_blocks)]

    def block_table(self, name):
        return self.order[name][:]

    def num_free(self):
        return sum(not names for names in self.sharers)

    def fork(self, parent, child):
        if child in self.order:
            raise ValueError(child)
        self.order[child], self.tokens[child] = self.order[parent][:], self.tokens[parent]
        for names in self.sharers:
            if parent in names:
                names.add(child)

    def _take(self, name):
        for block, names in enumerate(self.sharers):
            if not names:
                names.add(name)
                return block
        raise MemoryError(name)

    def append(self, name):
        offset, copy = self.tokens[name] % self.size, None
        if not offset:
            self.order[name].append(self._take(name))
        elif len(self.sharers[self.order[name][-1]]) > 1:
            block, old = self._take(name), self.order[name].pop()
            self.sharers[old].discard(name)
            self.order[name].append(block)
            copy = (old, block)
        self.tokens[name] += 1
        return self.order[name][-1] * self.size + offset, copy

    def free(self, name):
        for block in self.order.pop(name):
            self.sharers[block].discard(name)

# %% answer={"exercise": "SharedBlocks", "name": "nothing counted: the tables are searched", "right": true}
class SharedBlocks:
    def __init__(self, table, num_tokens, num_blocks, block_size):
        self.num_blocks, self.size = num_blocks, block_size
        self.requests = {"root": (list(table), num_tokens)}

    def block_table(self, name):
        return list(self.requests[name][0])

    def unlisted(self):
        return sorted(set(range(self.num_blocks)).difference(*(table for table, _ in self.requests.values())))

    def num_free(self):
        return len(self.unlisted())

    def fork(self, parent, child):
        if child in self.requests:
            raise ValueError(child)
        table, tokens = self.requests[parent]
        self.requests[child] = (list(table), tokens)

    def append(self, name):
        table, tokens = self.requests[name]
        full, copy = tokens == len(table) * self.size, None
        if full or sum(table[-1] in other for other, _ in self.requests.values()) > 1:
            free = self.unlisted()
            if not free:
                raise MemoryError(name)
            if full:
                table = [*table, free[-1]]
            else:
                copy, table = (table[-1], free[-1]), [*table[:-1], free[-1]]
        self.requests[name] = (table, tokens + 1)
        return table[-1] * self.size + tokens % self.size, copy

    def free(self, name):
        del self.requests[name]

# %% answer={"exercise": "predicted_waste", "name": "in percent", "fails": "the prediction for your requests"}
held = sum(math.ceil(n / my_block_size) * my_block_size for p, m in my_requests for n in range(p, p + m))
predicted_waste = 100 * (1 - sum(sum(range(p, p + m)) for p, m in my_requests) / held)

# %% answer={"exercise": "predicted_waste", "name": "the share that is used", "fails": "the prediction for your requests"}
held = sum(math.ceil(n / my_block_size) * my_block_size for p, m in my_requests for n in range(p, p + m))
predicted_waste = sum(sum(range(p, p + m)) for p, m in my_requests) / held

# %% answer={"exercise": "predicted_waste", "name": "the prompts alone", "fails": "the prediction for your requests"}
held = sum(math.ceil(p / my_block_size) * my_block_size for p, m in my_requests)
predicted_waste = 1 - sum(p for p, m in my_requests) / held

# %% answer={"exercise": "predicted_waste", "name": "the last step alone", "fails": "the prediction for your requests"}
held = sum(math.ceil((p + m - 1) / my_block_size) * my_block_size for p, m in my_requests)
predicted_waste = 1 - sum(p + m - 1 for p, m in my_requests) / held

# %% answer={"exercise": "predicted_waste", "name": "the last token out stored too, from the second step on", "fails": "the prediction for your requests"}
held = sum(math.ceil(n / my_block_size) * my_block_size for p, m in my_requests for n in range(p + 1, p + m + 1))
predicted_waste = 1 - sum(sum(range(p + 1, p + m + 1)) for p, m in my_requests) / held

# %% answer={"exercise": "predicted_waste", "name": "a step more than it runs", "fails": "the prediction for your requests"}
held = sum(math.ceil(n / my_block_size) * my_block_size for p, m in my_requests for n in range(p, p + m + 1))
predicted_waste = 1 - sum(sum(range(p, p + m + 1)) for p, m in my_requests) / held

# %% answer={"exercise": "predicted_waste", "name": "the mean of the requests' own waste", "fails": "the prediction for your requests"}
wastes = []
for p, m in my_requests:
    held = sum(math.ceil(n / my_block_size) * my_block_size for n in range(p, p + m))
    wastes.append(1 - sum(range(p, p + m)) / held)
predicted_waste = sum(wastes) / len(wastes)

# %% answer={"exercise": "predicted_waste", "name": "half a block for each request", "fails": "the prediction for your requests"}
tokens = sum(sum(range(p, p + m)) for p, m in my_requests)
empty = sum(m * (my_block_size - 1) / 2 for p, m in my_requests)
predicted_waste = empty / (tokens + empty)

# %% answer={"exercise": "predicted_waste", "name": "a contiguous region as long as the longest", "fails": "the prediction for your requests"}
longest = max(p + m for p, m in my_requests)
steps = sum(m for p, m in my_requests)
predicted_waste = 1 - sum(sum(range(p, p + m)) for p, m in my_requests) / (steps * longest)

# %% answer={"exercise": "predicted_waste", "name": "empty slots in place of held ones", "right": true}
empty = sum(-n % my_block_size for p, m in my_requests for n in range(p, p + m))
tokens = sum(m * p + m * (m - 1) // 2 for p, m in my_requests)
predicted_waste = empty / (empty + tokens)

# %% answer={"exercise": "predicted_waste", "name": "step by step, as it runs", "right": true}
empty = held = 0
for step in range(max(m for _, m in my_requests)):
    for p, m in my_requests:
        if step < m:
            slots = (p + step + my_block_size - 1) // my_block_size * my_block_size
            empty, held = empty + slots - p - step, held + slots
predicted_waste = round(empty / held, 6)

# %% equivalent={"exercise": "slot_mapping", "mutant": "0 → -1", "because": "padded_to is compared with the number of slots: a list times a number below 0 is as empty as times 0."}
