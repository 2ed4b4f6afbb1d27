"""The journal of a scheduler: whatever happened, a replay decides the same and writes the same bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.scheduler import journal
from pawl_server.scheduler.journal import Journal, Launched, Settled, read_events
from pawl_server.scheduler.planner import plan_step
from pawl_server.sim import replay as replaying
from pawl_server.sim.replay import ReplayError, replay
from tests.fakes.scheduler_bench import Bench, limits
from tests.fakes.scheduler_traces import play


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_a_replay_decides_the_same_and_writes_the_same_bytes(seed: int) -> None:
    """Grammars, samples, drafts, tenants, classes, hints, a host tier; `test_traces` replays 2,000 more."""
    trace = play(seed)
    replayed = replay(trace.journal)
    assert replayed.again == trace.journal
    assert replayed.decisions == trace.bench.state.decisions.records()


def test_a_decision_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Had the one who replays planned otherwise, it would be seen."""
    journals = [play(seed).journal for seed in range(20)]
    monkeypatch.setattr(
        replaying,
        "plan_step",
        lambda state, limits, now, budget: plan_step(state, limits, now - 2.0 * (state.step == 4), budget),
    )
    assert any(replay(data).again != data for data in journals)


def test_a_journal_holds_no_token_and_no_name() -> None:
    bench = Bench(limits(num_blocks=32))
    bench.state.journal = Journal(bench.limits)
    request = bench.request([30_001, 30_002, 30_003, 30_004] * 3, 4)
    bench.submit(request)
    bench.run()
    data = bench.state.journal.drain()
    assert not any(token.to_bytes(2, "big") in data for token in (30_001, 30_002, 30_003, 30_004))
    assert request.request_id.encode() not in data
    kinds = [type(event) for event in read_events(data)]
    assert kinds.count(Launched) == kinds.count(Settled) > 4


def test_what_is_no_journal_is_refused() -> None:
    data = play(3).journal
    with pytest.raises(ValueError, match="cut off"):
        replay(data[:-1])
    with pytest.raises(ValueError, match="not a journal"):
        replay(b"\x02\x00\x00\x00ab")
    with pytest.raises(ReplayError, match="does not begin"):
        replay(b"")


def test_a_journal_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = play(3).journal
    monkeypatch.setattr(journal, "VERSION", journal.VERSION + 1)
    with pytest.raises(ReplayError, match="has version"):
        replay(data)
