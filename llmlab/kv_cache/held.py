"""What one request holds of a paged KV cache."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Held:
    """A request's blocks and tokens.

    table: its blocks, in the order of its tokens. tokens: those that are known.
    slots: how many are taken, one for each known token and then the reserved ones.
    limit: slots may rise to this without a look at the blocks; below the table's end where the tail may be shared.
    hash_at: how many tokens fill the first block that is not published; 0 without prefix caching.
    """

    table: list[int]
    tokens: array[int]
    slots: int
    limit: int
    hash_at: int


class ById(dict[Hashable, T]):
    """What each request holds; an id that holds nothing is named in the error."""

    def __missing__(self, request_id: Hashable) -> T:
        raise KeyError(f"request_id: {request_id!r} holds nothing: never allocated, or freed already")
