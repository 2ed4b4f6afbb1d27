"""Schedules, lengths, percentiles and reports."""

import json
import math
import statistics
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pawl_loadtest.measure import Record, percentile, summarize
from pawl_loadtest.report import as_json, as_table
from pawl_server.sim.arrivals import Arrivals, parse_arrivals
from pawl_server.sim.lengths import WORKLOADS, Lognormal


@pytest.mark.parametrize("variation", [0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_variation_asked_for(variation: float) -> None:
    times = list(islice(Arrivals(20.0, variation, seed=3).due_times(), 20_000))
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(variation, rel=0.1)
    assert times == sorted(times)


def test_same_seed_same_schedule_and_shares_differ() -> None:
    whole = Arrivals(8.0, seed=1)
    assert list(islice(whole.due_times(), 50)) == list(islice(whole.due_times(), 50))
    shares = [whole.split(2, index) for index in (0, 1)]
    assert sum(share.rate for share in shares) == whole.rate
    assert list(islice(shares[0].due_times(), 5)) != list(islice(shares[1].due_times(), 5))


def test_names_of_arrivals() -> None:
    assert parse_arrivals("gamma:2.5", 4, 0) == Arrivals(4, 2.5, 0)
    assert parse_arrivals("azure-code", 4, 0).variation == 13.0
    with pytest.raises(ValueError, match="gamma:VARIATION"):
        parse_arrivals("sometimes", 4, 0)
    with pytest.raises(ValueError, match="above 0"):
        Arrivals(0.0)


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_lengths_have_the_median_and_the_90th_percentile_of_the_trace(name: str) -> None:
    workload = WORKLOADS[name]
    drawn = list(islice(workload.lengths(5), 20_000))
    prompts = [float(pair.prompt) for pair in drawn]
    assert percentile(prompts, 50) == pytest.approx(workload.prompt.median, rel=0.05)
    assert percentile(prompts, 90) == pytest.approx(workload.prompt.p90, rel=0.05)
    outputs = [float(pair.output) for pair in drawn]
    assert percentile(outputs, 50) == pytest.approx(workload.output.median, rel=0.1)


def test_scaled_lengths_fit_the_context() -> None:
    small = WORKLOADS["azure-conversation"].scaled(0.1, 512)
    assert all(pair.prompt + pair.output <= 512 for pair in islice(small.lengths(1), 2_000))


@given(st.floats(1, 1e4), st.floats(1, 10), st.integers(0, 100))
def test_a_length_is_within_its_bounds(median: float, ratio: float, seed: int) -> None:
    import random

    lengths = Lognormal(median, median * ratio, 2, 5_000)
    assert 2 <= lengths.draw(random.Random(seed)) <= 5_000


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.integers(0, 100))
def test_percentile_equals_the_naive_definition(values: list[float], share: int) -> None:
    ordered = sorted(values)
    assert ordered[0] <= percentile(values, share) <= ordered[-1]
    if len(values) > 1:
        inclusive = statistics.quantiles(values, n=100, method="inclusive")
        if 0 < share < 100:
            assert percentile(values, share) == pytest.approx(inclusive[share - 1], rel=1e-9, abs=1e-6)


def test_times_run_from_the_due_time() -> None:
    record = Record(due=10.0, sent=10.5, prompt_tokens=4)
    record.delta(11.0, 1)
    record.delta(11.0, 0)  # text without a token is no delta to the reader's clock
    record.delta(11.25, 2)
    record.ended = 12.0
    failed = Record(due=10.0, sent=10.0, error="Overloaded")
    summary = summarize([record, failed], 2.0)
    assert summary.time_to_first_token_s["p50"] == pytest.approx(1.0)
    assert summary.gap_s["p99"] == pytest.approx(0.25)
    assert summary.end_to_end_s["p50"] == pytest.approx(2.0)
    assert summary.dispatch_lateness_s["p99"] == pytest.approx(0.5, rel=0.02)
    assert (summary.num_requests, summary.num_errors, summary.output_tokens_per_s) == (2, 1, 1.5)
    assert "1 x Overloaded" in as_table(summary)
    assert json.loads(as_json(summary, model="m"))["model"] == "m"


def test_nothing_measured_is_shown_as_nothing() -> None:
    summary = summarize([], 1.0)
    assert math.isnan(summary.gap_s["p50"])
    assert " -" in as_table(summary)
    assert json.loads(as_json(summary))["gap_s"]["p50"] is None
