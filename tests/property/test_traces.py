"""Thousands of generated traces of the whole scheduler, each held to all four oracles (invariants 37 to 40)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from pawl_server.sim.replay import replay
from tests.fakes.scheduler_traces import FEATURES, MIXED, Trace, play

NUM_BATCHES, BATCH = 8, 250  # 2,000 traces
FIRST = int(os.environ.get("PAWL_TEST_TRACES_FROM", "0"))  # `make fuzz` plays others each time


def play_twice(seed: int) -> Trace:
    """A trace that its journal decides again."""
    trace = play(seed)
    again = replay(trace.journal)
    assert again.again == trace.journal, f"trace {seed}"
    assert again.decisions == trace.bench.state.decisions.records(), f"trace {seed}"
    return trace


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_traces_of_everything_at_once(batch: int) -> None:
    """Shadow KV, plans' differences and the naive cache model are compared within `play`; here, what is decided again.

    Every batch must reach every feature, and hold traces that mix all of the chief ones: else the oracles would have
    come to see less than they did.
    """
    num_traces: Counter[str] = Counter()
    num_mixed = num_compared = num_found = 0
    for seed in range(FIRST + batch * BATCH, FIRST + (batch + 1) * BATCH):
        trace = play_twice(seed)
        num_traces.update(feature for feature, count in trace.reached.items() if count)
        num_mixed += all(trace.reached[feature] for feature in MIXED)
        num_compared += trace.pool.num_compared
        num_found += trace.pool.num_found
    missing = {feature: num_traces[feature] for feature in FEATURES if not num_traces[feature]}
    assert FIRST or not missing, "the traces no longer reach these"  # others may lack the rarest
    assert min(num_traces[feature] for feature in MIXED) >= 80
    assert num_mixed >= 20
    assert num_found > 10 * BATCH
    assert num_compared - num_found > 10 * BATCH


@pytest.mark.parametrize("seed", [101647, 104453, 113195])
def test_a_plan_tried_twice_is_told_alike(seed: int) -> None:
    """Its first attempt has drafts; in the second nobody is asked for any, but in a replay."""
    play_twice(seed)


def test_the_same_trace_is_decided_alike_whatever_the_hash_seed() -> None:
    """No decision rests on the order of a set or on `hash`: two other processes decide the same to the byte."""
    code = (
        "import hashlib; from tests.fakes.scheduler_traces import play;"
        "print(hashlib.sha256(b''.join(play(seed).journal for seed in range(12))).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            timeout=120,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1
