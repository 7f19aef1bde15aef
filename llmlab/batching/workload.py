"""What is asked of a server: when requests arrive, and how long their prompts and outputs are.

Nothing here is a recording. Two services of Azure are described by figures fitted to their published traces, which
``read_trace`` reads from wherever its user keeps them. Every draw comes from a seed, and from it alone.
"""

from __future__ import annotations

import csv
import json
import math
import random
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from llmlab.arguments import checked, integer, number, one_of
from llmlab.batching.request import Request

AZURE_FILE = Path(__file__).parent.parent / "data" / "workloads" / "azure-2023.json"
COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


class Lengths(NamedTuple):
    """How many tokens a prompt has, and how many are generated from it."""

    prompt: int
    output: int


class TraceRow(NamedTuple):
    """One request of a trace: seconds since the first one came, and its lengths in tokens."""

    arrival: float
    prompt: int
    output: int


@checked(rate=number(above=0), num_requests=integer(), seed=integer())
def poisson_arrivals(rate: float, num_requests: int, seed: int) -> list[float]:
    """Arrivals that know nothing of each other: gaps with the density rate · e^(-rate·x), mean 1/rate.

    rate: requests a second. Returns ``num_requests`` times in seconds, rising. Raises ValueError for a rate not above 0.
    """
    draw = random.Random(seed)
    return list(accumulate(draw.expovariate(rate) for _ in range(num_requests)))


@checked(rate=number(above=0), cv=number(above=0), num_requests=integer(), seed=integer())
def gamma_arrivals(rate: float, cv: float, num_requests: int, seed: int) -> list[float]:
    """Arrivals in bursts (cv > 1) or evenly (cv < 1): gamma gaps of shape 1/cv² and scale cv²/rate, mean 1/rate.

    cv: the gaps' coefficient of variation, standard deviation / mean; 1 is Poisson. rate: requests a second. Returns
    ``num_requests`` times in seconds, not falling. Raises ValueError for a rate or cv not above 0.
    """
    draw = random.Random(seed)
    return list(accumulate(draw.gammavariate(1 / cv**2, cv**2 / rate) for _ in range(num_requests)))


@checked(
    median=number(above=0), sigma=number(at_least=0), num_requests=integer(), seed=integer(),
    at_least=integer(at_least=1), at_most=integer(at_least=1),
)  # fmt: skip
def lognormal_lengths(
    median: float, sigma: float, num_requests: int, seed: int, at_least: int = 1, at_most: int = 2**20
) -> list[int]:
    """Lengths e^X in tokens, X normal with mean ln(median) and standard deviation sigma; rounded, then clipped.

    Clipping moves what lies outside to the bounds: the mean, e^(sigma²/2) times the median without it, moves too. Raises
    ValueError for a median not above 0, a negative sigma, or bounds the wrong way round.
    """
    if at_most < at_least:
        raise ValueError(f"at_most: expected at least at_least {at_least}, got {at_most}")
    draw, middle = random.Random(seed), math.log(median)
    return [
        min(max(round(math.exp(min(draw.gauss(middle, sigma), 700))), at_least), at_most) for _ in range(num_requests)
    ]


def read_trace(path: str | Path) -> list[TraceRow]:
    """Read a trace in the format of Azure's: TIMESTAMP,ContextTokens,GeneratedTokens, the oldest first.

    Raises ValueError for another header, and for a row that cannot be read, asks for less than one token, or goes back
    in time; the error names its line. Format: github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023.
    """
    rows: list[TraceRow] = []
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if header != COLUMNS:
            raise ValueError(f"{path}, line 1: expected {','.join(COLUMNS)}, got {','.join(header)!r}")
        first: datetime | None = None
        for cells in lines:
            try:
                stamp, prompt, output = cells
                time, row = datetime.fromisoformat(stamp), Lengths(int(prompt), int(output))
                first = first or time
                arrival = (time - first).total_seconds()
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {lines.line_num}: {error}, in {','.join(cells)!r}") from None
            if min(row) < 1:
                raise ValueError(
                    f"{path}, line {lines.line_num}: expected at least one token of each, got {tuple(row)}"
                )
            if rows and arrival < rows[-1].arrival:
                raise ValueError(f"{path}, line {lines.line_num}: {stamp} is before the line above")
            rows.append(TraceRow(arrival, *row))
    return rows


@dataclass(frozen=True)
class FittedLengths:
    """A distribution of lengths by its quantiles; ``mean`` is that of the lengths it was fitted to."""

    percents: tuple[float, ...]  # 0 first, 100 last
    quantiles: tuple[float, ...]  # tokens
    mean: float

    def at(self, percent: float) -> float:
        """The inverse of the distribution function: the length that ``percent`` percent of requests do not exceed."""
        right = min(bisect_right(self.percents, percent), len(self.percents) - 1)
        x0, x1 = self.percents[right - 1], self.percents[right]
        y0, y1 = self.quantiles[right - 1], self.quantiles[right]
        return y0 + (y1 - y0) * (percent - x0) / (x1 - x0)


class AzureLengths:
    """Prompt and output lengths of one of the two services whose traces Azure published in 2023.

    service: "conversation" or "code"; ValueError for any other. prompt, output: their distributions. rate: requests a
    second, on average. gap_cv: the coefficient of variation of the gaps between arrivals. rank_correlation: Spearman's, of
    prompt and output lengths; it is so near 0 that ``sample`` draws the two apart.

    Fitted by ``benchmarks/fit_traces.py``. Source of the traces: Patel et al., "Splitwise: Efficient Generative LLM
    Inference Using Phase Splitting", ISCA 2024; Azure/AzurePublicDataset, CC-BY 4.0.
    """

    def __init__(self, service: str) -> None:
        services: dict[str, Any] = json.loads(AZURE_FILE.read_text(encoding="utf-8"))["services"]
        one_of(services)("service", service)
        fitted = services[service]
        percents = tuple(fitted["percents"])
        self.service = service
        self.prompt = FittedLengths(percents, tuple(fitted["prompt_quantiles"]), fitted["prompt_mean"])
        self.output = FittedLengths(percents, tuple(fitted["output_quantiles"]), fitted["output_mean"])
        self.rate: float = fitted["requests_per_second"]
        self.gap_cv: float = fitted["gap_cv"]
        self.rank_correlation: float = fitted["rank_correlation"]

    def sample(self, num_requests: int, seed: int) -> list[Lengths]:
        """Draw (prompt, output) pairs by inverse distribution: length = F⁻¹(U), U uniform on 0 to 1, in whole tokens."""
        integer()("num_requests", num_requests)
        draw = random.Random(seed)
        return [
            Lengths(round(self.prompt.at(100 * draw.random())), round(self.output.at(100 * draw.random())))
            for _ in range(num_requests)
        ]


def make_requests(arrivals: Iterable[float], lengths: Iterable[tuple[int, int]]) -> list[Request]:
    """Requests 0, 1, … that come at ``arrivals`` with these (prompt, output) lengths in tokens.

    The prompt of request i is the token id i, over and over: no two have a prefix in common. Raises ValueError where the
    two differ in number, or a length is below 1.
    """
    return [
        Request(number, [number] * prompt, output, arrival)
        for number, (arrival, (prompt, output)) in enumerate(zip(arrivals, lengths, strict=True))
    ]
