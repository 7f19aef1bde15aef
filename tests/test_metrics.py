"""Metrics against hand arithmetic, numpy and the standard library's quantiles."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.batching import Metrics, Request
from llmlab.batching.metrics import percentile

FINITE = st.floats(-1e6, 1e6)


def ended(metrics, request_id, arrival, times, reason="length"):
    """One request with tokens at these times, told to ``metrics`` as an engine tells it."""
    request = Request(request_id, [1] * 4, max(1, len(times)), arrival)
    metrics.arrived(request)
    for time in times:
        metrics.token(request, time)
    request.finish_reason = reason
    metrics.ended(request)
    return metrics.requests[request_id]


def test_latencies_of_one_request():
    """It comes at 1 s; its tokens at 3, 4, 6 and 6.5 s."""
    record = ended(Metrics(), "r", 1.0, [3.0, 4.0, 6.0, 6.5])
    assert record.ttft == 2.0
    assert record.itl == [1.0, 2.0, 0.5]
    assert record.tpot == 3.5 / 3 == statistics.fmean(record.itl)
    assert record.end_to_end == 5.5
    assert record.normalised_latency == 5.5 / 4


def test_what_a_single_token_and_no_token_leave_undefined():
    one, none = ended(Metrics(), "one", 1.0, [3.0]), ended(Metrics(), "none", 1.0, [], "aborted")
    assert (one.ttft, one.itl, one.end_to_end, one.normalised_latency) == (2.0, [], 2.0, 2.0)
    assert math.isnan(one.tpot)
    assert all(math.isnan(x) for x in (none.ttft, none.tpot, none.end_to_end, none.normalised_latency))
    assert none.itl == []


def test_throughput_counts_from_the_first_arrival_to_the_last_token():
    metrics = Metrics()
    ended(metrics, "a", 2.0, [3.0, 4.0])
    ended(metrics, "b", 3.0, [5.0, 7.0, 12.0])
    assert (metrics.output_tokens, metrics.seconds, metrics.throughput) == (5, 10.0, 0.5)


def test_goodput_counts_requests_that_keep_both_bounds():
    """In 10 s: TTFT 1, 2, 1, 3, 1 and TPOT 1, 1, 2, undefined, 1; the last was cut off."""
    metrics = Metrics()
    ended(metrics, "a", 0.0, [1.0, 2.0])
    ended(metrics, "b", 0.0, [2.0, 3.0], "stop")
    ended(metrics, "c", 0.0, [1.0, 3.0])
    ended(metrics, "d", 0.0, [3.0])
    ended(metrics, "e", 8.0, [9.0, 10.0], "aborted")
    assert metrics.goodput(3.0, 2.0) == pytest.approx(0.4)
    assert metrics.goodput(2.0, 2.0) == pytest.approx(0.3)
    assert metrics.goodput(3.0, 1.0) == pytest.approx(0.3)
    assert metrics.goodput(1.0, 1.0) == pytest.approx(0.1)
    assert metrics.goodput(0.5, 9.0) == 0


def test_kv_waste_is_integrated_over_time():
    """10 slots with 4 used for 2 s, 20 with 20 for 1 s, nothing for 5 s, 8 with 2 for 1 s: (12 + 0 + 6) / (20 + 20 + 8)."""
    metrics = Metrics()
    for time, allocated, used in ((1, 10, 4), (3, 20, 20), (4, 0, 0), (9, 8, 2), (10, 0, 0)):
        metrics.held(time, allocated, used)
    assert metrics.kv_waste == pytest.approx(18 / 48)


def test_two_states_at_one_time_count_as_the_later():
    metrics = Metrics()
    for time, allocated, used in ((0, 10, 5), (1, 99, 0), (1, 10, 10), (2, 0, 0)):
        metrics.held(time, allocated, used)
    assert metrics.kv_waste == pytest.approx(5 / 20)


def test_padding_is_a_share_of_all_that_is_computed():
    metrics = Metrics()
    metrics.step(0.0, 1.0, [("a", 3), ("b", 5)], padding=2)
    metrics.step(1.0, 1.0, [("b", 1)], padding=1)
    assert metrics.padding_fraction == pytest.approx(3 / 12)
    assert [step.num_tokens for step in metrics.steps] == [8, 1]


@given(st.lists(FINITE, min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values, q):
    assert percentile(values, q) == pytest.approx(np.percentile(values, q), rel=1e-9, abs=1e-6)


@given(st.lists(FINITE, min_size=2))
def test_percentiles_are_the_inclusive_quantiles_of_the_standard_library(values):
    ours = [percentile(values, q) for q in range(1, 100)]
    assert ours == pytest.approx(statistics.quantiles(values, n=100, method="inclusive"), rel=1e-9, abs=1e-6)


def test_percentiles_by_hand():
    """Of 10, 20, 30, 40: rank 3·0.5 = 1.5 lies between 20 and 30, rank 3·0.9 = 2.7 between 30 and 40."""
    values = [40, 10, 30, 20]
    assert [percentile(values, q) for q in (0, 50, 90, 100)] == [10, 25, pytest.approx(37), 40]
    assert values == [40, 10, 30, 20]


def test_the_summary_names_its_units_and_is_computed_over_requests_and_gaps():
    metrics = Metrics()
    ended(metrics, "a", 0.0, [1.0, 2.0, 4.0])
    ended(metrics, "b", 0.0, [3.0, 4.0])
    ended(metrics, "c", 0.0, [], "refused: too large")
    metrics.held(0.0, 8, 4)
    metrics.held(4.0, 0, 0)
    metrics.step(0.0, 1.0, [("a", 4)], padding=4)
    summary = metrics.summary()
    expected = {
        "requests": 3, "requests_completed": 2, "steps": 1, "preemptions": 0, "output_tokens": 5, "seconds": 4.0,
        "throughput_tokens_per_second": 1.25, "throughput_requests_per_second": 0.5,
        "ttft_mean_seconds": 2.0, "ttft_p50_seconds": 2.0, "ttft_p90_seconds": 2.8, "ttft_p99_seconds": 2.98,
        "itl_mean_seconds": 4 / 3, "itl_p50_seconds": 1.0, "itl_p90_seconds": 1.8, "itl_p99_seconds": 1.98,
        "tpot_mean_seconds": 1.25, "tpot_p50_seconds": 1.25, "tpot_p90_seconds": 1.45, "tpot_p99_seconds": 1.495,
        "end_to_end_mean_seconds": 4.0, "end_to_end_p50_seconds": 4.0,
        "end_to_end_p90_seconds": 4.0, "end_to_end_p99_seconds": 4.0,
        "normalised_latency_mean_seconds_per_token": 5 / 3, "normalised_latency_p50_seconds_per_token": 5 / 3,
        "normalised_latency_p90_seconds_per_token": 4 / 3 + 0.9 * 2 / 3,
        "normalised_latency_p99_seconds_per_token": 4 / 3 + 0.99 * 2 / 3,
        "kv_waste_fraction": 0.5, "padding_fraction": 0.5,
    }  # fmt: skip
    assert summary == pytest.approx(expected)
    assert list(summary) == list(expected)


def test_a_run_of_nothing_has_a_summary_too():
    summary = Metrics().summary()
    assert (summary["requests"], summary["output_tokens"]) == (0, 0)
    assert math.isnan(summary["ttft_p50_seconds"])
    assert math.isnan(summary["throughput_tokens_per_second"])


def test_preemptions_and_cached_tokens_are_taken_from_the_request():
    metrics, request = Metrics(), Request("r", [1], 1)
    metrics.arrived(request)
    request.preemptions, request.cached_tokens = 3, 16
    metrics.ended(request)
    assert metrics.summary()["preemptions"] == 3
    assert metrics.requests["r"].cached_tokens == 16


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: percentile([], 50), ValueError, "values: expected at least one"),
        (lambda m: percentile([1.0], 101), ValueError, "q: expected a number of at most 100"),
        (lambda m: percentile([1.0], -1), ValueError, "q: expected a number of at least 0"),
        (lambda m: m.held(4.0, 1, 1), ValueError, r"time: expected 5\.0 or later, got 4\.0"),
        (lambda m: m.held(6.0, 1, 2), ValueError, "used_slots: expected 0 to the 1 allocated, got 2"),
        (lambda m: m.arrived(Request("r", [1], 1)), ValueError, "request_id: expected a new one, got 'r' again"),
        (lambda m: m.token(Request("x", [1], 1), 0.0), KeyError, "x"),
        (lambda m: m.goodput(-1, 1), ValueError, "ttft_seconds"),
        (lambda m: m.goodput(1, float("nan")), ValueError, "tpot_seconds"),
    ],
)
def test_wrong_arguments_are_named(call, error, says):
    metrics = Metrics()
    ended(metrics, "r", 0.0, [1.0])
    metrics.held(5.0, 1, 1)
    with pytest.raises(error, match=says):
        call(metrics)
