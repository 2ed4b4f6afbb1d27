"""Prefixes shared while they are computed (invariant 13): in one step, over steps in flight, and when they fail."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.kv.block_hash import HashChain
from pawl_server.kv.block_pool import BlockPool
from pawl_server.kv.draft import BlockDraft
from pawl_server.scheduler import committer
from pawl_server.scheduler.endings import EndReason
from pawl_server.scheduler.groups import Fork
from pawl_server.scheduler.invariants import InvariantError, check_invariants
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import StepPlan
from tests.fakes.scheduler_bench import Bench, limits, make_limits, random_request

PROMPT = list(range(25))


def run_burst(depth: int = 1, **changes: int) -> tuple[Bench, int]:
    """Six requests with one prompt arrive at once; gives the bench and the prompt tokens that were computed."""
    bench = Bench(limits(num_blocks=64, max_running=8, max_batch_tokens=64, max_prefill_chunk=16, **changes), depth)
    for _ in range(6):
        bench.submit(bench.request(PROMPT, 3))
    bench.run()
    for handle in range(6):
        bench.check_output(handle)
        assert len(bench.output[handle]) == 3
    return bench, sum(sum(plan.num_tokens) for plan in bench.log if isinstance(plan, StepPlan)) - 6 * 2


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_burst_on_one_prefix_computes_it_about_once(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, shared = run_burst(depth)
    assert sorted(ended.cached_prompt_tokens for ended in bench.ended.values()) == [0, 16, 24, 24, 24, 24]
    monkeypatch.setattr(BlockDraft, "announce", _announce_nothing)
    _, apart = run_burst(depth)
    assert shared < apart / 2


def _announce_nothing(self: BlockDraft, chain: HashChain, begin: int, blocks: Sequence[int], producer: int = 0) -> None:
    del self, chain, begin, blocks, producer


def run_with_failures(seed: int) -> None:
    """Rows fail at random, at any depth, among preemptions and aborts: all others give what they give alone."""
    draw = random.Random(seed)
    bench = Bench(make_limits(draw), depth=draw.randint(1, 3))
    bench.worker.fault = lambda plan: [row for row in plan.rows if draw.random() < 0.05]
    for _ in range(draw.randint(1, 20)):
        bench.submit(random_request(bench, draw))
        for _ in range(draw.randint(0, 3)):
            bench.step()
            check_invariants(bench.state)
        if bench.requests and draw.random() < 0.2:
            ended = bench.state.abort(draw.choice(list(bench.requests)), "cancelled", bench.now)
            if ended is not None:
                bench.finish(ended)
    bench.run()
    assert set(bench.ended) == set(bench.requests)
    for handle in bench.requests:
        bench.check_output(handle)
    assert bench.state.counts().used_blocks == 0


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_rows_that_fail_take_nobody_with_them(seed: int) -> None:
    run_with_failures(seed)


@pytest.mark.parametrize(
    ("where", "name"),
    [(committer, "_retract"), (BlockPool, "retract"), (SchedulerState, "start_again")],
)
def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch, where: object, name: str) -> None:
    """Failures that are not told to those who share what failed."""
    monkeypatch.setattr(where, name, lambda *_: [])
    with pytest.raises((AssertionError, InvariantError)):
        run_many_with_failures()


def test_forks_that_are_not_told_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that began with a prompt whose row failed go on as if it were right."""
    monkeypatch.setattr(committer, "_fork", _fork_and_forget)
    with pytest.raises(AssertionError):
        run_many_with_failures()


_FORK = committer._fork


def _fork_and_forget(state: SchedulerState, fork: Fork) -> SequenceState:
    _FORK(state, fork)
    return fork.leader


def run_many_with_failures() -> None:
    for seed in range(300):
        run_with_failures(seed)


def test_readers_of_a_prefix_that_fails_start_again() -> None:
    bench = Bench(limits(num_blocks=32, max_running=4, max_batch_tokens=64, max_prefill_chunk=32))
    for _ in range(3):
        bench.submit(bench.request(PROMPT, 2))
    bench.worker.fault = lambda plan: [plan.new[0].row] if plan.step == 1 else []
    bench.step()
    assert bench.ended[0].reason is EndReason.FAILED
    assert [bench.output[handle] for handle in (1, 2)] == [[], []]
    assert not bench.state.running
    bench.run()
    for handle in (1, 2):
        bench.check_output(handle)
        assert bench.ended[handle].reason is EndReason.MAX_TOKENS
        assert bench.ended[handle].preemption_count == 0


def test_what_a_victim_did_not_live_to_compute_is_not_shared() -> None:
    """Its row fails when it is gone, and nobody would be told that a block is wrong."""
    bench = Bench(limits(num_blocks=6, output_quantile=0.5, preempt_below=1), depth=2)
    bench.worker.fault = lambda plan: [0] if plan.step == 1 else []
    bench.submit(bench.request(PROMPT[:20], 2))
    bench.step()
    bench.submit(bench.request(PROMPT[:20], 2, priority=1))
    bench.run()
    assert bench.ended[0].preemption_count == 1, "nobody gave way: nothing is tested"
    for handle in (0, 1):
        assert bench.ended[handle].reason is EndReason.MAX_TOKENS
        bench.check_output(handle)


def test_who_runs_in_the_row_of_a_victim_that_fails_starts_again() -> None:
    """It shares what the victim had announced, by way of a third that holds it."""
    small = limits(num_blocks=8, output_quantile=0.5, preempt_below=2)
    bench = Bench(small, depth=3)
    bench.worker.fault = lambda plan: [0] if plan.step == 1 else []
    for priority in range(3):
        bench.submit(bench.request(PROMPT[:20], 2, priority=priority))
        bench.step()
    first, _, last = (plan for plan in bench.log if isinstance(plan, StepPlan))
    assert last.freed_rows == [first.new[0].row] == [last.new[0].row], "nobody runs in the victim's row"
    assert last.new[0].block_ids[:2] == first.new[0].block_ids, "it shares nothing of the victim"
    bench.run()
    for handle in range(3):
        assert bench.ended[handle].reason is EndReason.MAX_TOKENS
        bench.check_output(handle)


def test_what_a_failing_row_computed_is_not_cached() -> None:
    bench = Bench(limits(num_blocks=32, max_batch_tokens=64, max_prefill_chunk=8))
    bench.submit(bench.request(PROMPT, 2))
    bench.worker.fault = lambda plan: plan.rows if plan.step == 2 else []
    bench.run()
    assert bench.ended[0].reason is EndReason.FAILED
    bench.submit(bench.request(PROMPT, 2))
    bench.run()
    assert bench.ended[1].cached_prompt_tokens == 8
    bench.check_output(1)
