"""What comes out of the engine."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass
class Completion:
    """What came of one request. finish_reason: "length", "stop", "aborted", or what went wrong."""

    request_id: Hashable
    token_ids: list[int]
    text: str | None
    finish_reason: str
    cached_tokens: int = 0


@dataclass
class StepTimes:
    """Where the host's time of a step goes, in seconds, kept while ``Engine.times`` is a list."""

    schedule: float
    launch: float
    wait: float
    commit: float
    num_seqs: int = field(default=0, kw_only=True)  # that decode
    num_tokens: int = field(default=0, kw_only=True)
