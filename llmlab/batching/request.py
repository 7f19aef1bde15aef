"""A request and how far it has come."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmlab.arguments import integer, number

_whole, _real = integer(at_least=1), number()


@dataclass(slots=True, eq=False)
class Request:
    """One request: what is asked for, and how far it has come.

    Tokens are counted from the prompt's first. ``num_tokens`` counts those that are known and those that launched steps
    will yield; ``computed_tokens`` those whose keys and values are in the cache, or will be by launched steps. A step
    that computes the last of ``num_tokens`` yields one more. The last token of all is never computed.

    Raises ValueError for an empty prompt, no token to generate, or an arrival that is not finite; TypeError for an
    argument of another kind.
    """

    request_id: Hashable
    token_ids: list[int]  # the prompt, then what was generated and has reached the host
    max_new_tokens: int
    arrival: float = 0.0  # seconds
    sampling: Any = None  # what whoever runs the steps needs to choose tokens; policies do not look at it

    num_prompt: int = field(init=False)
    num_tokens: int = field(init=False)
    max_tokens: int = field(init=False)  # prompt and output together, at most
    computed_tokens: int = field(default=0, init=False)
    context: int = field(default=0, init=False)  # tokens known when it was admitted; the others come one by one
    slots: int = field(default=0, init=False)  # tokens that have a place in the KV cache
    cached_tokens: int = field(default=0, init=False)  # of the prompt, in the prefix cache at the first admission
    is_running: bool = field(default=False, init=False)
    finish_reason: str = field(default="", init=False)  # "length", "stop", "aborted" or an error's words; "" before
    preemptions: int = field(default=0, init=False)
    row: int = field(default=-1, init=False)  # of the engine's block tables, while it runs there

    def __post_init__(self) -> None:
        if isinstance(self.token_ids, str):
            raise TypeError(f"token_ids of request {self.request_id!r}: expected token ids, got a text")
        self.token_ids = list(self.token_ids)
        if not self.token_ids:
            raise ValueError(f"token_ids of request {self.request_id!r}: expected at least one token, got none")
        _whole(f"max_new_tokens of request {self.request_id!r}", self.max_new_tokens)
        _real(f"arrival of request {self.request_id!r}", self.arrival)
        self.num_prompt = self.num_tokens = len(self.token_ids)
        self.max_tokens = self.num_prompt + self.max_new_tokens

    @property
    def remaining(self) -> int:
        """Tokens that can be computed now: 1 in decoding, more in a prompt, 0 when the last one is on its way."""
        return self.num_tokens - self.computed_tokens if self.num_tokens < self.max_tokens else 0

    @property
    def in_flight(self) -> int:
        """Tokens that launched steps will yield and the host does not know yet."""
        return self.num_tokens - len(self.token_ids)

    @property
    def output(self) -> Sequence[int]:
        """The generated tokens that have reached the host."""
        return self.token_ids[self.num_prompt :]
