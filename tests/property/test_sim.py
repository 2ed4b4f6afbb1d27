"""The simulator on random small traces: exact, deterministic, and true to what each request asked for."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.sim.policies import POLICIES, Policy
from pawl_server.sim.simulator import Run, simulate
from pawl_server.sim.streams import EOS_TOKEN_ID, output_stream, token_ids
from tests.fakes.sim_traces import random_cost, random_limits, random_trace


def simulated(seed: int, policy: Policy, *, skip: bool) -> Run:
    draw = random.Random(seed)
    limits, cost = random_limits(draw), random_cost(draw)
    return simulate(random_trace(draw, draw.randint(1, 25)), limits, cost, policy, skip=skip, keep=True)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_skipping_changes_nothing(policy: Policy, seed: int) -> None:
    """Same decisions, same tokens, same times, and every tally the same, with and without the shortcut."""
    short, long = simulated(seed, policy, skip=True), simulated(seed, policy, skip=False)
    assert short.log == long.log
    assert (short.digest, short.end_ns) == (long.digest, long.end_ns)
    one, other = short.record, long.record
    assert one.tokens == other.tokens
    assert one.reasons == other.reasons
    for column in ("arrived_ns", "first_token_ns", "last_token_ns", "ended_ns", "longest_gap_ns", "num_output",
                   "num_preempted", "cached_tokens"):  # fmt: skip
        assert np.array_equal(getattr(one, column), getattr(other, column)), column
    assert np.array_equal(one.service.served, other.service.served)
    for tally in ("num_steps", "num_computed", "num_recomputed", "busy_ns", "blocked_ns", "used_block_ns"):
        assert getattr(one, tally) == getattr(other, tally), tally
    assert other.num_skipped == 0
    for percent in (1, 50, 99):
        assert one.gaps.percentile_s(percent) == pytest.approx(other.gaps.percentile_s(percent), rel=0.01, nan_ok=True)


def test_the_shortcut_is_taken() -> None:
    """The property above would hold of a simulator that never skips."""
    runs = [simulated(seed, POLICIES["production"], skip=True) for seed in range(40)]
    skipped = sum(run.record.num_skipped for run in runs)
    assert skipped > 0.05 * sum(run.record.num_steps for run in runs)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_each_request_gets_its_own_text_once(policy: Policy, seed: int) -> None:
    """Nothing is lost, repeated or starved, whatever is preempted, cancelled or killed."""
    run = simulated(seed, policy, skip=True)
    record = run.record
    assert (record.ended_ns >= 0).all()
    assert set(record.reasons) == set(range(len(run.trace.requests)))
    for index, request in enumerate(run.trace.requests):
        given_tokens = (record.tokens or {}).get(index, [])
        expected = token_ids(output_stream(index), np.arange(len(given_tokens))).tolist()
        if record.reasons[index] == "eos":
            expected[-1] = EOS_TOKEN_ID
            assert len(given_tokens) == request.output_tokens
        elif record.reasons[index] == "max_tokens":
            assert len(given_tokens) == request.max_output_tokens
        assert given_tokens == expected


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.sampled_from(list(POLICIES)))
def test_same_trace_same_log_to_the_byte(seed: int, policy: str) -> None:
    first, second = (simulated(seed, POLICIES[policy], skip=True) for _ in range(2))
    assert first.log == second.log
    assert first.log
