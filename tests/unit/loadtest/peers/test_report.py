"""Tables: ratios, limits, who differs and who was disturbed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pawl_loadtest.peers.bounds import Precision, bound
from pawl_loadtest.peers.report import as_tables, base_of
from pawl_loadtest.peers.rounds import Agreement, Outcome
from pawl_loadtest.peers.variants import VARIANTS, Variant
from tests.unit.loadtest.peers.pieces import AFTER, BEFORE, WORKLOAD, make_run, rates


def _half_precision() -> Outcome:
    return Outcome(Variant("half", "x", "x.py", "fp16", 2, 2), rates=rates(1.0, 1.0, 1.0))


def _row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(name))


def test_tables_show_ratios_limits_and_who_differs() -> None:
    half = rates(25.0, 20.0, 27.5)
    pawl = Outcome(VARIANTS[0], {}, Agreement(1.0, None, None, True), rates(50.0, 60.0, 55.0), rates(0.0, 0.02, 0.01))
    differs, beside = Agreement(0.5, 3, 0.2, False), rates(0.31, 0.0, 0.0)
    other = Outcome(Variant("other", "x", "x.py", "exact", 4, 4), {}, differs, half, beside)
    remote = Outcome(Variant("pawl over gRPC", "pawl", "x.py", "exact", 4), {}, Agreement(1.0, None, None, True), half)
    failed = Outcome(Variant("failed", "y", "y.py", "exact", 4), failure="ERROR: No matching distribution")
    run = make_run(pawl, other, remote, failed)
    text = as_tables(run)
    assert "load average at the start 0.90 (not idle!)" in text
    assert "55.0 (50.0-60.0)" in _row(text, "pawl ")
    assert "2.00 (2.00-3.00)" in _row(text, "other")
    assert "50 %, from 3 (0.2) DIFFERS" in _row(text, "other")
    assert "0.02" in _row(text, "pawl ")
    assert "0.31 DISTURBED" in _row(text, "other")
    assert "before: read: 30.0 GB/s of 2147 MB" in text
    assert "after:  read: 25.0 GB/s of 2147 MB" in text
    assert "50 % of it" in _row(text, "pawl over gRPC")
    assert _row(text, "failed") == "failed: did not run: ERROR: No matching distribution"
    least = bound(run.shape, run.workloads[0], Precision(2, 4), run.machine.limits("AVX2")).seconds
    assert run.limit_share(pawl, run.workloads[0], "AVX2") == pytest.approx(least / (128 / 55))
    assert "== fp16: fp16 KV: nobody ran" in text
    assert "other" in as_tables(make_run(pawl, other, _half_precision())).partition("== fp16")[2]
    assert "pawl's own multiply in AVX-512" in text
    short = text.partition("in short")[2]
    assert "other 25.0" in _row(short, "1 x 32/128, exact")
    assert "50 % of it" in _row(short, "1 x 32/128, exact")


def test_limits_count_the_bytes_in_which_pawl_keeps_a_weight_if_told() -> None:
    pawl = Outcome(VARIANTS[0], {}, Agreement(1.0, None, None, True), rates(50.0, 60.0, 55.0))
    other = Outcome(Variant("other", "x", "x.py", "exact", 4, 4), {}, pawl.agreement, rates(25.0, 20.0, 27.5))
    run, workload = make_run(pawl, other), WORKLOAD
    told = replace(run, kept_weight_bytes=1.5)
    assert told.least(pawl, workload, "AVX2") == bound(
        run.shape, workload, Precision(1.5, 4), run.machine.limits("AVX2")
    )
    assert told.limit_share(pawl, workload, "AVX2") < run.limit_share(pawl, workload, "AVX2")
    assert told.limit_share(other, workload, "AVX2") == run.limit_share(other, workload, "AVX2")
    assert "; of pawl 1.5" in as_tables(told)


def test_ratios_are_those_of_rounds_in_which_both_were_timed() -> None:
    agrees = Agreement(1.0, None, None, True)
    pawl = Outcome(VARIANTS[0], {}, agrees, {WORKLOAD.name: {0: 10.0, 1: 90.0, 2: 40.0}})
    other = Outcome(Variant("other", "x", "x.py", "exact", 4, 4), {}, agrees, {WORKLOAD.name: {2: 10.0, 0: 5.0}})
    never = Outcome(Variant("never", "x", "x.py", "exact", 4, 4), {}, agrees, {WORKLOAD.name: {3: 10.0}})
    text = as_tables(make_run(pawl, other, never))
    assert "3.00 (2.00-4.00)" in _row(text, "other")
    assert "no common round" in _row(text, "never")


def test_what_serving_keeps_is_the_median_of_all_pairs() -> None:
    agrees = Agreement(1.0, None, None, True)
    pawl = Outcome(VARIANTS[0], {}, agrees, rates(50.0, 60.0, 55.0))
    served = Outcome(VARIANTS[1], {}, agrees, rates(10.0, 10.0), pairs={WORKLOAD.name: {0: [0.9, 0.8], 1: [0.95]}})
    text = as_tables(make_run(pawl, served))
    assert "90 (80-95) % of it, 3 pairs" in _row(text, "pawl over gRPC")
    assert "90 (80-95) % of it, 3 pairs" in _row(text.partition("in short")[2], "1 x 32/128, exact")


def test_cpu_time_is_told_by_the_token() -> None:
    """The mean of the rounds, over the 128 tokens of a run."""
    cpu = [{"engine": 0.1, "client": 0.01}, {"engine": 0.156, "client": 0.0156}]
    served = Outcome(VARIANTS[1], {}, None, rates(10.0, 10.0), cpu={WORKLOAD.name: dict(enumerate(cpu))})
    text = as_tables(make_run(Outcome(VARIANTS[0], {}, None, rates(50.0)), served))
    told = "CPU time of pawl over gRPC, us a token: engine 1,000, client 100; 9.1 % is not the engine's"
    assert _row(text, told) == f"  {told}"


def test_a_share_of_the_limit_right_then_is_that_of_the_machine_in_each_round() -> None:
    agrees = Agreement(1.0, None, None, True)
    slow, fast = AFTER, BEFORE
    pawl = Outcome(VARIANTS[0], {}, agrees, rates(25.0, 50.0, 10.0), machines={WORKLOAD.name: {0: slow, 1: fast}})
    run = make_run(pawl)
    expected = [
        bound(run.shape, WORKLOAD, Precision(2, 4), machine.limits("AVX2")).seconds * rate / 128
        for machine, rate in ((slow, 25.0), (fast, 50.0))
    ]
    assert run.limit_shares_then(pawl, WORKLOAD, "AVX2") == pytest.approx(expected)
    shares = [100 * share for share in run.limit_shares_then(pawl, WORKLOAD, "AVX2")]
    short = _row(as_tables(run).partition("in short")[2], "1 x 32/128, exact")
    assert f"{sum(shares) / 2:.0f} ({min(shares):.0f}-{max(shares):.0f}) %" in short


def test_columns_are_as_wide_as_what_stands_in_them() -> None:
    """Each begins or ends at one place in all rows, whatever a row says."""
    some = rates(50.0, 60.0, 55.0)
    rows = [
        Outcome(VARIANTS[0], {}, Agreement(1.0, None, None, True), some),
        Outcome(Variant("a" * 50, "x", "x.py", "exact", 4, 4), {}, Agreement(0.123, 7, 0.00321, False), some),
        Outcome(Variant("b", "x", "x.py", "exact", 4, 4), {}, None, rates(12345.678, 9.0, 1.0)),
    ]
    lines = as_tables(make_run(*rows)).splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("1 x 32/128, output"))
    table = lines[start : start + 4]
    assert len({len(line) for line in table}) == 1
    for title in ("median (min-max)", "ratio", "of AVX2 limit", "same tokens"):
        end = table[0].index(title) + len(title)
        assert all(line[end - 1] != " " and line[end : end + 3] == "   " for line in table)


def test_a_table_without_its_own_pawl_takes_the_next_higher_precision() -> None:
    exact = Outcome(VARIANTS[0], rates={"x": {0: 1.0}})
    lower = Outcome(Variant("pawl fp16 KV", "pawl", "pawl_engine.py", "fp16", 2), failure="not available")
    assert base_of([exact, lower], "fp16") is exact
    lower.failure = None
    assert base_of([exact, lower], "fp16") is lower
    assert base_of([exact, lower], "exact") is exact
    assert base_of([lower], "exact") is None
