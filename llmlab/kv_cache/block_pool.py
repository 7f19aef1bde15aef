"""The blocks of a KV cache by their number: who is free, what a block is known to hold, which one is reused next."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from hashlib import sha256


class OutOfBlocks(RuntimeError):
    """More was wanted than is free, and nothing has changed. ``wanted`` and ``free`` count blocks, or slots."""

    def __init__(self, wanted: int, free: int, unit: str = "more blocks") -> None:
        super().__init__(f"wanted {wanted} {unit}, {free} free")
        self.wanted, self.free = wanted, free


def block_hash(previous: bytes, tokens: array[int]) -> bytes:
    """The name of a full block's contents: SHA-256 of the name of the block before it and of its own tokens.

    So it covers every token from the first on. A hit is believed without comparing tokens, and whoever could make two
    contents with one name could read what another's prompt left: hence a cryptographic hash at its full 256 bits, of
    which nobody can make a collision, and not Python's ``hash``.
    """
    return sha256(previous + tokens.tobytes()).digest()


def token_array(token_ids: Iterable[int]) -> array[int]:
    """Tokens as 64-bit integers, 8 bytes each, that are hashed as they lie in memory. TypeError for anything else."""
    try:
        return array("q", list(token_ids))  # without the list, array would take bytes for memory
    except (TypeError, OverflowError) as error:
        raise TypeError(f"token_ids: expected whole numbers of at most 64 bits: {error}") from None


class BlockPool:
    """Reference counts, a free list in the order of reuse, and an index from contents to blocks.

    ``references`` counts the block tables that list a block; ``hashes`` is a full block's name, None where it has none.
    A free block with a name can still be found until it is reused. Every operation takes constant time.
    """

    def __init__(self, num_blocks: int) -> None:
        self.references = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self._carriers: dict[bytes, dict[int, None]] = {}  # name -> the blocks that carry it, the oldest first
        self._blank = deque(range(num_blocks))  # free, without a name: reused first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # free, with a name: then these, longest free first

    def num_free(self) -> int:
        return len(self._blank) + len(self._evictable)

    def find(self, name: bytes) -> int | None:
        """A block with these contents, free or not."""
        carriers = self._carriers.get(name)
        return next(iter(carriers)) if carriers else None

    def take(self) -> int:
        """A free block for new contents; what it held before is forgotten. The caller has seen that one is free."""
        if self._blank:
            block = self._blank.popleft()
        else:
            block, _ = self._evictable.popitem(last=False)
            name, self.hashes[block] = self.hashes[block], None
            assert name is not None
            del self._carriers[name][block]
            if not self._carriers[name]:
                del self._carriers[name]
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more block table lists this block; it leaves the free list if it was there."""
        if not self.references[block]:
            del self._evictable[block]
        self.references[block] += 1

    def drop(self, block: int) -> bool:
        """One block table less lists this block; true where it was the last."""
        self.references[block] -= 1
        if self.references[block]:
            return False
        if self.hashes[block] is None:
            self._blank.append(block)
        else:
            self._evictable[block] = None
        return True

    def publish(self, block: int, name: bytes) -> None:
        """Let a full block be found by its contents; each of its sharers may say so. Several blocks may carry one name."""
        self.hashes[block] = name
        self._carriers.setdefault(name, {})[block] = None

    def check(self, references: Sequence[int]) -> None:
        """Raise AssertionError where the pool contradicts itself or the reference counts of the block tables."""
        assert self.references == references, f"references are {self.references}, the tables say {references}"
        free = [*self._blank, *self._evictable]
        unused = [block for block, count in enumerate(references) if not count]
        assert sorted(free) == unused, f"the free list is {free}, unused are {unused}"
        assert not any(self.hashes[b] for b in self._blank), "a block on the blank list has a name"
        assert all(self.hashes[b] for b in self._evictable), "a block on the evictable list has no name"
        carried = {(name, block) for block, name in enumerate(self.hashes) if name}
        listed = {(name, block) for name, blocks in self._carriers.items() for block in blocks}
        assert carried == listed, f"blocks' names and the index differ in {carried ^ listed}"
        assert all(self._carriers.values()), "the index has a name without a block"
