"""Latency, throughput and waste of serving, defined first and computed after.

For a request that arrives at a and whose n output tokens come at t_1 ≤ t_2 ≤ … ≤ t_n, in seconds:

TTFT                time to first token: t_1 - a
ITL                 inter-token latencies: the n - 1 gaps t_{i+1} - t_i
TPOT                time per output token after the first: (t_n - t_1) / (n - 1), their mean; undefined for n = 1
end to end          t_n - a
normalised latency  (t_n - a) / n, seconds a token

For a run whose first request arrives at A and whose last token comes at Z, with N tokens put out:

throughput          N / (Z - A), tokens a second
goodput             requests that end and keep a bound on TTFT and one on TPOT, divided by Z - A
KV waste            ∫ (allocated - used) dt / ∫ allocated dt, in slots of the KV cache: allocated to requests, and used
                    by a token's keys and values. What no request holds is not wasted: it can be given to one.
padding             tokens computed for nobody / all tokens computed

A percentile q of n sorted values lies at rank h = (n - 1)·q/100, counted from 0, and between two ranks on the straight
line: x_⌊h⌋ + (h - ⌊h⌋)·(x_⌊h⌋₊₁ - x_⌊h⌋), as in numpy's default.

Sources: Yu et al., OSDI 2022 (Orca), normalised latency; Kwon et al., SOSP 2023 (vLLM), KV waste; Agrawal et al., OSDI
2024 (Sarathi-Serve), TTFT and the gaps between tokens; Zhong et al., OSDI 2024 (DistServe), goodput; Hyndman and Fan
1996, definition 7, percentiles.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from llmlab.arguments import checked, number
from llmlab.batching.request import Request

PERCENTILES = (50, 90, 99)


@checked(q=number(at_least=0, at_most=100))
def percentile(values: Iterable[float], q: float) -> float:
    """The value that q percent of ``values`` do not exceed: x_⌊h⌋ + (h - ⌊h⌋)·(x_⌊h⌋₊₁ - x_⌊h⌋), h = (n - 1)·q/100.

    Raises ValueError for no values, or a q outside 0 to 100. Source: Hyndman and Fan 1996, definition 7.
    """
    return _percentile_of_sorted(sorted(values), q)


def _percentile_of_sorted(ordered: list[float], q: float) -> float:
    if not ordered:
        raise ValueError("values: expected at least one, got none")
    rank = (len(ordered) - 1) * q / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


@dataclass(slots=True, eq=False)
class RequestRecord:
    """What is known of one request when the run is over; ``times`` are those of its tokens, in seconds."""

    request_id: Hashable
    arrival: float
    num_prompt: int
    times: list[float] = field(default_factory=list)
    finish_reason: str = ""  # "" for a request that has not ended
    preemptions: int = 0
    cached_tokens: int = 0

    @property
    def ttft(self) -> float:
        """t_1 - a, in seconds; nan where no token came."""
        return self.times[0] - self.arrival if self.times else math.nan

    @property
    def itl(self) -> list[float]:
        """The gaps t_{i+1} - t_i, in seconds."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def tpot(self) -> float:
        """(t_n - t_1) / (n - 1), in seconds; nan for fewer than two tokens."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else math.nan

    @property
    def end_to_end(self) -> float:
        """t_n - a, in seconds; nan where no token came."""
        return self.times[-1] - self.arrival if self.times else math.nan

    @property
    def normalised_latency(self) -> float:
        """(t_n - a) / n, in seconds a token; nan where no token came."""
        return self.end_to_end / len(self.times) if self.times else math.nan


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the timeline: when it began, how long it took, whose tokens it computed, and how many for nobody."""

    start: float
    seconds: float
    tokens: list[tuple[Hashable, int]]
    padding: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed for a request."""
        return sum(count for _, count in self.tokens)


class Metrics:
    """Collects what happens in a run, simulated or measured, and sums it up.

    Whoever runs the steps calls ``arrived``, ``token``, ``ended``, ``held`` and ``step``, with times in seconds of one
    clock. requests: the records by request id. steps: the timeline.
    """

    def __init__(self) -> None:
        self.requests: dict[Hashable, RequestRecord] = {}
        self.steps: list[Step] = []
        self._held: tuple[float, int, int] | None = None
        self._allocated_seconds = 0.0  # ∫ allocated dt, slots · s
        self._used_seconds = 0.0

    def arrived(self, request: Request) -> None:
        """A request came in, at ``request.arrival``. Raises ValueError for a request id that came before."""
        if request.request_id in self.requests:
            raise ValueError(f"request_id: expected a new one, got {request.request_id!r} again")
        self.requests[request.request_id] = RequestRecord(request.request_id, request.arrival, request.num_prompt)

    def token(self, request: Request, time: float) -> None:
        """A token of a request came out. Raises KeyError for a request that has not arrived."""
        self.requests[request.request_id].times.append(time)

    def ended(self, request: Request) -> None:
        """A request has ended, or was refused, for its ``finish_reason``. Raises KeyError as ``token``."""
        record = self.requests[request.request_id]
        record.finish_reason = request.finish_reason
        record.preemptions, record.cached_tokens = request.preemptions, request.cached_tokens

    def held(self, time: float, allocated_slots: int, used_slots: int) -> None:
        """From ``time`` to the next call, so many slots of the KV cache are allocated, and so many of them used.

        Raises ValueError for a time before the last one, and for more slots used than allocated.
        """
        if not 0 <= used_slots <= allocated_slots:
            raise ValueError(f"used_slots: expected 0 to the {allocated_slots} allocated, got {used_slots}")
        if self._held is not None:
            since, allocated, used = self._held
            if time < since:
                raise ValueError(f"time: expected {since} or later, got {time}")
            self._allocated_seconds += allocated * (time - since)
            self._used_seconds += used * (time - since)
        self._held = (time, allocated_slots, used_slots)

    def step(self, start: float, seconds: float, tokens: list[tuple[Hashable, int]], padding: int = 0) -> None:
        """A step ran: tokens lists (request id, tokens computed), padding is what was computed for nobody."""
        self.steps.append(Step(start, seconds, tokens, padding))

    @property
    def seconds(self) -> float:
        """Z - A: from the first arrival to the last token; nan where no token came."""
        last = max((record.times[-1] for record in self.requests.values() if record.times), default=math.nan)
        return last - min((record.arrival for record in self.requests.values()), default=math.nan)

    @property
    def output_tokens(self) -> int:
        """N, the tokens put out."""
        return sum(len(record.times) for record in self.requests.values())

    @property
    def throughput(self) -> float:
        """N / (Z - A), tokens a second; nan for a run without length."""
        return _ratio(self.output_tokens, self.seconds)

    @checked(ttft_seconds=number(at_least=0), tpot_seconds=number(at_least=0))
    def goodput(self, ttft_seconds: float, tpot_seconds: float) -> float:
        """Requests a second that end with "length" or "stop" and keep both bounds; a single token keeps any TPOT.

        Raises ValueError for a bound below 0. Source: Zhong et al. 2024 (DistServe).
        """
        good = sum(
            record.finish_reason in ("length", "stop")
            and record.ttft <= ttft_seconds
            and (len(record.times) == 1 or record.tpot <= tpot_seconds)
            for record in self.requests.values()
        )
        return _ratio(good, self.seconds)

    @property
    def kv_waste(self) -> float:
        """∫ (allocated - used) dt / ∫ allocated dt, 0 to 1; nan where nothing was allocated."""
        return _ratio(self._allocated_seconds - self._used_seconds, self._allocated_seconds)

    @property
    def padding_fraction(self) -> float:
        """Tokens computed for nobody / all tokens computed, 0 to 1; nan where nothing was computed."""
        padding = sum(step.padding for step in self.steps)
        return _ratio(padding, padding + sum(step.num_tokens for step in self.steps))

    def summary(self) -> dict[str, float]:
        """The run in plain numbers, the unit in each name; nan for what is undefined, such as the TPOT of single tokens."""
        records = list(self.requests.values())
        samples = {
            "ttft": ([r.ttft for r in records], "seconds"),
            "itl": ([gap for r in records for gap in r.itl], "seconds"),
            "tpot": ([r.tpot for r in records], "seconds"),
            "end_to_end": ([r.end_to_end for r in records], "seconds"),
            "normalised_latency": ([r.normalised_latency for r in records], "seconds_per_token"),
        }
        latencies: dict[str, float] = {}
        for name, (values, unit) in samples.items():
            known = sorted(value for value in values if not math.isnan(value))
            latencies[f"{name}_mean_{unit}"] = _ratio(math.fsum(known), len(known))
            for q in PERCENTILES:
                latencies[f"{name}_p{q}_{unit}"] = _percentile_of_sorted(known, q) if known else math.nan
        ended = sum(r.finish_reason in ("length", "stop") for r in records)
        return {
            "requests": len(records),
            "requests_completed": ended,
            "steps": len(self.steps),
            "preemptions": sum(r.preemptions for r in records),
            "output_tokens": self.output_tokens,
            "seconds": self.seconds,
            "throughput_tokens_per_second": self.throughput,
            "throughput_requests_per_second": _ratio(ended, self.seconds),
            **latencies,
            "kv_waste_fraction": self.kv_waste,
            "padding_fraction": self.padding_fraction,
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
