"""The journal of a scheduler: whatever happened, a replay decides the same and writes the same bytes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.scheduler.journal import Journal, Launched, Settled, read_events
from pawl_server.scheduler.planner import plan_step
from pawl_server.sim import replay as replaying
from pawl_server.sim.replay import ReplayError, replay
from tests.fakes.scheduler_bench import Bench, limits, make_limits, random_request


def recorded(seed: int) -> tuple[bytes, list[bytes]]:
    """The journal and the latest decisions of a random trace: arrivals, aborts, lost workers, failing rows, flushes."""
    draw = random.Random(seed)
    bench = Bench(make_limits(draw), depth=draw.randint(1, 3))
    journal = bench.state.journal = Journal(bench.limits)
    if draw.random() < 0.3:
        failing = draw.randint(2, 12)
        bench.worker.fault = lambda plan: plan.rows[:1] if plan.step == failing else []
    parts = []
    for _ in range(draw.randint(1, 20)):
        bench.submit(random_request(bench, draw))
        for _ in range(draw.randint(0, 4)):
            bench.step()
        kind = draw.random()
        if kind < 0.2:
            ended = bench.state.abort(draw.choice([0, *bench.requests]), "cancelled", bench.now)
            if ended is not None:
                bench.finish(ended)
        elif kind < 0.25:
            bench.lose_worker()
        elif kind < 0.3:
            bench.state.flush_prefix_cache()
        parts.append(journal.drain())
    bench.run()
    return b"".join([*parts, journal.drain()]), bench.state.decisions.records()


@settings(max_examples=120)
@given(st.integers(0, 2**32))
def test_a_replay_decides_the_same_and_writes_the_same_bytes(seed: int) -> None:
    data, decisions = recorded(seed)
    replayed = replay(data)
    assert replayed.again == data
    assert replayed.decisions == decisions


def test_a_decision_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Had the one who replays planned otherwise, it would be seen."""
    journals = [recorded(seed)[0] for seed in range(20)]
    monkeypatch.setattr(
        replaying,
        "plan_step",
        lambda state, limits, now, budget: plan_step(state, limits, now - 2.0 * (state.step == 4), budget),
    )
    assert any(replay(data).again != data for data in journals)


def test_a_journal_holds_no_token_and_no_name() -> None:
    bench = Bench(limits(num_blocks=32))
    journal = bench.state.journal = Journal(bench.limits)
    request = bench.request([30_001, 30_002, 30_003, 30_004] * 3, 4)
    bench.submit(request)
    bench.run()
    data = journal.drain()
    assert not any(token.to_bytes(2, "big") in data for token in (30_001, 30_002, 30_003, 30_004))
    assert request.request_id.encode() not in data
    kinds = [type(event) for event in read_events(data)]
    assert kinds.count(Launched) == kinds.count(Settled) > 4


def test_what_is_no_journal_is_refused() -> None:
    data, _ = recorded(3)
    with pytest.raises(ValueError, match="cut off"):
        replay(data[:-1])
    with pytest.raises(ValueError, match="not a journal"):
        replay(b"\x02\x00\x00\x00ab")
    with pytest.raises(ReplayError, match="does not begin"):
        replay(b"")
