"""Arrivals and lengths against their distributions, traces against numpy's reading of the same file."""

import csv
import datetime
import importlib.util
import json
import math
import os
import random
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llmlab.batching.workload import (
    AZURE_FILE,
    AzureLengths,
    TraceRow,
    gamma_arrivals,
    lognormal_lengths,
    make_requests,
    poisson_arrivals,
    read_trace,
)
from llmlab.kv_cache import BlockManager

SERVICES = ("conversation", "code")


@pytest.fixture(scope="module")
def fit_traces():
    path = Path(__file__).parent.parent / "benchmarks" / "fit_traces.py"
    spec = importlib.util.spec_from_file_location("fit_traces", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Arrivals and lengths


def gaps_of(arrivals):
    return [after - before for before, after in pairwise([0.0, *arrivals])]


def largest_distance(values, distribution):
    """Kolmogorov and Smirnov's: between the share of values up to x, and the distribution function at x."""
    ordered = sorted(values)
    return max(
        max(abs(distribution(x) - i / len(ordered)), abs(distribution(x) - (i + 1) / len(ordered)))
        for i, x in enumerate(ordered)
    )


def test_poisson_gaps_are_exponential():
    """The distance stays under 1.63/√n, which a right sample exceeds once in a hundred."""
    gaps = gaps_of(poisson_arrivals(4.0, 20_000, seed=1))
    assert largest_distance(gaps, lambda x: 1 - math.exp(-4 * x)) < 1.63 / math.sqrt(20_000)


@pytest.mark.parametrize("cv", [0.2, 1.0, 3.0])
def test_gamma_gaps_have_the_rate_and_the_spread_asked_for(cv):
    gaps = gaps_of(gamma_arrivals(4.0, cv, 50_000, seed=2))
    assert statistics.fmean(gaps) == pytest.approx(1 / 4, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.05)
    # The third moment tells gamma from other distributions with two right ones: its skewness is 2·cv.
    mean, spread = statistics.fmean(gaps), statistics.pstdev(gaps)
    assert statistics.fmean(((gap - mean) / spread) ** 3 for gap in gaps) == pytest.approx(2 * cv, rel=0.15)


def test_gamma_gaps_of_cv_1_are_exponential():
    gaps = gaps_of(gamma_arrivals(4.0, 1.0, 20_000, seed=5))
    assert largest_distance(gaps, lambda x: 1 - math.exp(-4 * x)) < 1.63 / math.sqrt(20_000)


def test_lognormal_lengths_have_the_median_and_the_spread_asked_for():
    lengths = lognormal_lengths(300, 0.8, 20_000, seed=3)
    logs = [math.log(length) for length in lengths]
    assert statistics.median(lengths) == pytest.approx(300, rel=0.03)
    assert statistics.pstdev(logs) == pytest.approx(0.8, rel=0.02)
    assert statistics.fmean(lengths) == pytest.approx(300 * math.exp(0.32), rel=0.03)
    assert all(isinstance(length, int) for length in lengths)


def test_lognormal_lengths_are_clipped_and_not_drawn_again():
    free = lognormal_lengths(300, 2.0, 5_000, seed=3)
    clipped = lognormal_lengths(300, 2.0, 5_000, seed=3, at_least=100, at_most=900)
    assert clipped == [min(max(length, 100), 900) for length in free]
    assert {min(clipped), max(clipped)} == {100, 900}
    assert lognormal_lengths(300, 0.0, 3, seed=3) == [300, 300, 300]
    assert max(lognormal_lengths(1e99, 1e99, 9, seed=3)) == 2**20


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed: poisson_arrivals(1.0, 9, seed),
        lambda seed: gamma_arrivals(1.0, 2.0, 9, seed),
        lambda seed: lognormal_lengths(500, 1.0, 9, seed),
        lambda seed: AzureLengths("code").sample(9, seed),
    ],
)
def test_a_seed_decides_alone(draw):
    random.seed(0)
    first = draw(11)
    random.seed(1)
    assert draw(11) == first != draw(12)
    assert len(first) == 9


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: poisson_arrivals(0, 9, 1), "rate"),
        (lambda: poisson_arrivals(1, -1, 1), "num_requests"),
        (lambda: gamma_arrivals(1, 0, 9, 1), "cv"),
        (lambda: gamma_arrivals(float("inf"), 1, 9, 1), "rate"),
        (lambda: lognormal_lengths(0, 1, 9, 1), "median"),
        (lambda: lognormal_lengths(9, -1, 9, 1), "sigma"),
        (lambda: lognormal_lengths(9, 1, 9, 1, at_least=0), "at_least"),
        (lambda: lognormal_lengths(9, 1, 9, 1, at_least=5, at_most=4), "at_most: expected at least at_least 5, got 4"),
        (lambda: AzureLengths("conversations"), "service: .* did you mean 'conversation'"),
        (lambda: AzureLengths("code").sample(-1, 1), "num_requests"),
        (lambda: make_requests([0.0], [(0, 1)]), "token_ids"),
        (lambda: make_requests([0.0], [(1, 0)]), "max_new_tokens"),
        (lambda: make_requests([0.0, 1.0], [(1, 1)]), "zip"),
    ],
)
def test_wrong_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_made_requests_have_the_sizes_and_nothing_in_common():
    """A block manager with blocks of one token finds no prefix of one in another, from the first token on."""
    requests = make_requests([0.5, 2.0, 2.0], [(3, 4), (5, 1), (3, 2)])
    assert [(r.request_id, r.arrival, r.num_prompt, r.max_new_tokens) for r in requests] == [
        (0, 0.5, 3, 4), (1, 2.0, 5, 1), (2, 2.0, 3, 2),
    ]  # fmt: skip
    kv = BlockManager(30, 1)
    assert [kv.allocate(r.request_id, r.token_ids) for r in requests] == [0, 0, 0]


# Traces

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def test_a_trace_is_read_from_its_first_request_on(tmp_path):
    """Both of Azure's spellings of a time, a byte-order mark, and lines that end as on Windows."""
    file = tmp_path / "trace.csv"
    file.write_bytes(
        f"\ufeff{HEADER}\r\n2023-11-16 23:59:59.5000000,374,44\r\n2023-11-17 00:00:01.2500001,396,109\r\n".encode()
    )
    assert read_trace(file) == [TraceRow(0.0, 374, 44), TraceRow(1.75, 396, 109)]
    file.write_text(f"{HEADER}\n2024-05-10 00:00:00.009930+00:00,5,6\n2024-05-10 00:00:00.009930+00:00,7,8\n")
    assert read_trace(str(file)) == [TraceRow(0.0, 5, 6), TraceRow(0.0, 7, 8)]
    file.write_text(f"{HEADER}\n")
    assert read_trace(file) == []


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("2023-11-16 18:15:50,396", "line 3: not enough values"),
        ("2023-11-16 18:15:50,396,109,1", "line 3: too many values"),
        ("yesterday,396,109", "line 3: Invalid isoformat string: 'yesterday'"),
        ("2023-11-16 18:15:50,many,109", "line 3: invalid literal .* in '2023-11-16 18:15:50,many,109'"),
        ("2023-11-16 18:15:50,1.5,109", "line 3: invalid literal"),
        ("2023-11-16 18:15:50+00:00,396,109", "line 3: can't subtract"),
        ("2023-11-16 18:15:50,396,0", r"line 3: expected at least one token of each, got \(396, 0\)"),
        ("2023-11-16 18:15:50,-5,7", "line 3: expected at least one token"),
        ("2023-11-16 18:15:00,396,109", "line 3: 2023-11-16 18:15:00 is before the line above"),
        ("", "line 3: not enough values"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, row, says):
    file = tmp_path / "trace.csv"
    file.write_text(f"{HEADER}\n2023-11-16 18:15:46.6805900,374,44\n{row}\n2023-11-16 18:15:51,879,55\n")
    with pytest.raises(ValueError, match=says) as raised:
        read_trace(file)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("header", ["", "TIMESTAMP,Context,Generated", "2023-11-16 18:15:46.6805900,374,44"])
def test_another_header_is_refused(tmp_path, header):
    file = tmp_path / "trace.csv"
    file.write_text(f"{header}\n")
    with pytest.raises(ValueError, match="line 1: expected TIMESTAMP,ContextTokens,GeneratedTokens"):
        read_trace(file)


# The figures that are shipped


def write_synthetic_traces(folder, names):
    """Traces with ties, a tail and a correlation between prompt and output."""
    draw = random.Random(5)
    for name in names:
        time = datetime.datetime(2023, 11, 16, 18, 15)
        lines = [HEADER]
        for _ in range(500):
            time += datetime.timedelta(seconds=draw.expovariate(3.0))
            prompt = min(round(draw.lognormvariate(5, 1)) + 1, 900)
            lines.append(f"{time.isoformat(' ')},{prompt},{prompt // 7 + draw.randint(1, 30)}")
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


REAL = os.environ.get("LLMLAB_TRACES")


@pytest.fixture(params=["synthetic", *(["real"] if REAL else [])])
def traces(request, tmp_path, fit_traces):
    """A folder with two traces: written here, and Azure's own where LLMLAB_TRACES names it."""
    return Path(REAL) if request.param == "real" else write_synthetic_traces(tmp_path, fit_traces.FILES.values())


def ranks(values):
    """By definition: one more than how many are smaller, and half of how many others are equal."""
    values = np.asarray(values)
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1) / 2


def test_the_fit_is_numpys(traces, tmp_path, fit_traces):
    """Every figure, computed again from the rows; and a file that is the shipped one, where the traces are Azure's."""
    written = tmp_path / "deeper" / "fitted.json"
    fit_traces.write(traces, written)
    fitted = json.loads(written.read_text())
    for service, name in fit_traces.FILES.items():
        with (traces / name).open() as file:
            rows = list(csv.DictReader(file))
        times = np.array([row["TIMESTAMP"] for row in rows], dtype="datetime64[us]").astype(float) / 1e6
        figures = fitted["services"][service]
        assert figures["requests"] == len(rows)
        assert figures["seconds"] == pytest.approx(times[-1] - times[0], abs=0.001)
        assert figures["requests_per_second"] == pytest.approx((len(rows) - 1) / (times[-1] - times[0]), rel=1e-4)
        assert figures["gap_cv"] == pytest.approx(np.diff(times).std() / np.diff(times).mean(), rel=1e-3)
        for kind, column in (("prompt", "ContextTokens"), ("output", "GeneratedTokens")):
            lengths = np.array([int(row[column]) for row in rows])
            assert figures[f"{kind}_mean"] == pytest.approx(lengths.mean(), abs=0.001)
            assert figures[f"{kind}_quantiles"] == pytest.approx(np.percentile(lengths, figures["percents"]), abs=0.006)
        pairs = [ranks([int(row[column]) for row in rows]) for column in ("ContextTokens", "GeneratedTokens")]
        assert figures["rank_correlation"] == pytest.approx(np.corrcoef(*pairs)[0, 1], abs=1e-4)
    if traces == Path(REAL or ""):
        assert written.read_bytes() == AZURE_FILE.read_bytes()


@pytest.mark.parametrize("service", SERVICES)
def test_samples_have_the_quantiles_and_means_that_are_shipped(service):
    """The share of a sample at or below each quantile is its percentage, and means are those of the traces to 2 %."""
    azure = AzureLengths(service)
    pairs = azure.sample(40_000, seed=6)
    for fitted, lengths in ((azure.prompt, [p for p, _ in pairs]), (azure.output, [o for _, o in pairs])):
        ordered = np.sort(lengths)
        for percent, quantile in zip(fitted.percents, fitted.quantiles, strict=True):
            at_most = np.searchsorted(ordered, quantile + 0.5, "right") / len(ordered)
            below = np.searchsorted(ordered, quantile - 0.5, "left") / len(ordered)
            assert below - 0.008 <= percent / 100 <= at_most + 0.008
        assert np.mean(lengths) == pytest.approx(fitted.mean, rel=0.02)
        assert (min(lengths), max(lengths)) >= (1, fitted.quantiles[-2])
    assert abs(np.corrcoef(ranks([p for p, _ in pairs]), ranks([o for _, o in pairs]))[0, 1]) < 0.02


@pytest.mark.parametrize("service", SERVICES)
def test_the_shipped_figures_are_distributions_with_their_source(service):
    """Quantiles rise from 0 to 100 %, and a straight line between them nearly keeps each mean."""
    shipped = json.loads(AZURE_FILE.read_text(encoding="utf-8"))
    assert "Splitwise" in shipped["source"]["citation"]
    assert shipped["source"]["licence"] == "CC-BY 4.0"
    figures, azure = shipped["services"][service], AzureLengths(service)
    assert abs(figures["rank_correlation"]) < 0.1, "prompts and outputs are drawn apart"
    assert (azure.rate, azure.gap_cv) == (figures["requests_per_second"], figures["gap_cv"])
    for fitted in (azure.prompt, azure.output):
        assert (fitted.percents[0], fitted.percents[-1]) == (0, 100)
        assert all(before < after for before, after in pairwise(fitted.percents))
        assert all(before <= after for before, after in pairwise(fitted.quantiles))
        mean = np.trapezoid(fitted.quantiles, np.array(fitted.percents) / 100)
        assert mean == pytest.approx(fitted.mean, rel=0.011)
        assert [fitted.at(percent) for percent in fitted.percents] == pytest.approx(fitted.quantiles)
        middle = (fitted.quantiles[3] + fitted.quantiles[4]) / 2
        assert fitted.at((fitted.percents[3] + fitted.percents[4]) / 2) == pytest.approx(middle)


def test_published_figures_of_the_traces():
    """Patel et al. 2024, section 3: median prompts of 1020 (conversation) and 1500 (code), outputs of 129 and 13 tokens."""
    conversation, code = AzureLengths("conversation"), AzureLengths("code")
    assert (conversation.prompt.at(50), conversation.output.at(50)) == (1020, 129)
    assert code.prompt.at(50) == pytest.approx(1500, rel=0.03)
    assert code.output.at(50) == 13


def test_the_command_writes_where_the_package_reads(fit_traces, tmp_path, monkeypatch, capsys):
    folder = write_synthetic_traces(tmp_path, fit_traces.FILES.values())
    monkeypatch.setattr(fit_traces, "AZURE_FILE", tmp_path / "figures.json")
    monkeypatch.setattr("sys.argv", ["fit_traces.py", "--traces", str(folder)])
    fit_traces.main()
    assert f"wrote {tmp_path / 'figures.json'}" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "figures.json").read_text())["services"]) == set(SERVICES)
    assert "2023-11-16" not in (tmp_path / "figures.json").read_text()
