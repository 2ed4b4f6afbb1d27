"""The scheduler's rules one by one, on small replicas over a shadow KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pawl_server.scheduler.committer import StaleResultError, commit, launch
from pawl_server.scheduler.decisions import decode
from pawl_server.scheduler.endings import EndReason
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from tests.fakes.scheduler_bench import Bench, limits
from tests.fakes.shadow_worker import isolated_output


@pytest.mark.parametrize(
    ("prompt", "max_output", "field"),
    [(0, 1, "prompt"), (33, 1, "prompt"), (32, 2, "stop.max_output_tokens"), (10, 55, "stop.max_output_tokens")],
)
def test_what_can_never_fit_is_refused_with_the_numbers(prompt: int, max_output: int, field: str) -> None:
    bench = Bench(limits())
    refusal = bench.state.submit(bench.request([1] * prompt, max_output), 0.0)
    assert refusal is not None
    assert (refusal.code, refusal.field) == ("invalid_request", field)
    assert refusal.metadata["kv_pool_tokens"] == "32"
    assert not bench.state.has_work()


def test_the_largest_request_that_fits_runs() -> None:
    bench = Bench(limits())
    for prompt, output in ((32, 1), (1, 32), (31, -1)):
        assert bench.submit(bench.request([1] * prompt, output))
        bench.run()
    assert bench.ended[0].output_tokens == 1
    assert bench.ended[1].output_tokens == 32
    assert bench.ended[2].reason is EndReason.CONTEXT_LENGTH


def test_a_full_queue_is_refused_and_a_handle_is_unique() -> None:
    bench = Bench(limits(max_waiting=1))
    request = bench.request([1], 1)
    assert bench.submit(request)
    twice = bench.state.submit(request, 0.0)
    assert twice is not None
    assert twice.code == "already_exists"
    full = bench.state.submit(bench.request([1], 1), 0.0)
    assert full is not None
    assert full.code == "overloaded"


def test_decodes_go_on_while_a_long_prompt_is_computed() -> None:
    bench = Bench(limits(num_blocks=32, max_batch_tokens=9))
    bench.submit(bench.request([1, 2], 40))
    bench.step()
    bench.submit(bench.request(list(range(31)), 1))
    for _ in range(4):
        before = len(bench.output[0])
        bench.step()
        assert len(bench.output[0]) == before + 1


def test_prefixes_are_shared_within_a_tenant_alone() -> None:
    bench = Bench(limits(num_blocks=32))
    prompt = list(range(13))
    for tenant in (0, 0, 1):
        bench.submit(bench.request(prompt, 2, tenant))
        bench.run()
    assert [bench.ended[n].cached_prompt_tokens for n in range(3)] == [0, 12, 0]


def test_a_whole_cached_prompt_leaves_one_token_to_compute() -> None:
    bench = Bench(limits(num_blocks=32))
    for _ in range(2):
        bench.submit(bench.request(list(range(12)), 1))
        bench.run()
    assert bench.ended[1].cached_prompt_tokens == 8


def test_preemption_takes_the_lowest_class_and_loses_no_token() -> None:
    bench = Bench(limits(num_blocks=6, prefix_cache=False, output_quantile=0.0))
    bench.submit(bench.request([1] * 4, 14, priority=1))
    bench.submit(bench.request([2] * 4, 14))
    bench.submit(bench.request([3] * 4, 14))
    bench.run()
    counts = [bench.ended[n].preemption_count for n in range(3)]
    assert counts[0] == 0
    assert sum(counts) >= 1
    for handle in range(3):
        bench.check_output(handle)
        assert len(bench.output[handle]) == 14
    assert bench.ended[2].stalled_s > 0


def _crowd(bench: Bench, priorities: Sequence[int], num_output: int = 12) -> None:
    """So many sequences of two blocks each, growing to four, that run."""
    for number, priority in enumerate(priorities):
        bench.submit(bench.request([number] * 5, num_output, priority=priority))
    while any(sequence.num_output < 2 for sequence in bench.state.live.values()):
        bench.step()


def test_a_much_higher_class_takes_the_blocks_of_the_lowest() -> None:
    """Of three that run those of class 0 give way, the newest first, and only as many as it takes."""
    bench = Bench(limits(num_blocks=12, max_running=8, preempt_below=5, prefix_cache=False))
    _crowd(bench, [0, 1, 0])
    assert bench.submit(bench.request([9] * 10, 4, priority=6))
    bench.step()
    running = {sequence.request.handle for sequence in bench.state.running.values()}
    assert running == {0, 1, 3}, "the newest of the lowest class gives way, at once"
    (record,) = [sequence.last_preemption for sequence in bench.state.live.values() if sequence.preemptions]
    assert record is not None
    assert record.reason == "priority"
    assert record.num_lost == record.num_computed > 0
    (view,) = [view for view in bench.state.describe(bench.now) if view.preemption_count]
    assert view.phase == "preempted"
    assert "priority: a request of a much higher class was short of" in view.preemption_reason
    assert view.lost_tokens == record.num_lost
    bench.run()
    for handle in range(4):
        bench.check_output(handle)


@pytest.mark.parametrize(("preempt_below", "priority"), [(0, 10), (5, 4)])
def test_a_class_that_is_not_high_enough_waits(preempt_below: int, priority: int) -> None:
    bench = Bench(limits(num_blocks=12, max_running=8, preempt_below=preempt_below, prefix_cache=False))
    _crowd(bench, [0, 0, 0])
    bench.submit(bench.request([9] * 10, 4, priority=priority))
    bench.run()
    assert sum(ended.preemption_count for ended in bench.ended.values()) == 0


def test_a_much_higher_class_takes_a_slot() -> None:
    bench = Bench(limits(num_blocks=40, max_running=2, preempt_below=5))
    _crowd(bench, [0, 0])
    bench.submit(bench.request([9], 4, priority=5))
    bench.step()
    assert {sequence.request.handle for sequence in bench.state.running.values()} == {0, 2}
    (view,) = [view for view in bench.state.describe(bench.now) if view.preemption_count]
    assert "had no slot" in view.preemption_reason


def test_nobody_is_preempted_in_vain() -> None:
    """All that class 0 holds would not be enough: the rest is held by a class that does not give way."""
    bench = Bench(limits(num_blocks=12, max_running=8, preempt_below=5, prefix_cache=False))
    _crowd(bench, [3, 3, 0])
    bench.submit(bench.request([9] * 20, 4, priority=6))
    for _ in range(4):
        bench.step()
    assert not any(sequence.preemptions for sequence in bench.state.live.values())
    bench.run()


def test_age_lets_nobody_take_blocks_and_protects_those_who_run() -> None:
    bench = Bench(limits(num_blocks=12, max_running=8, preempt_below=1, ageing_s=2.0, prefix_cache=False))
    _crowd(bench, [0, 0, 0], num_output=30)
    bench.submit(bench.request([9] * 10, 4))
    for _ in range(10):
        bench.step()
    (waiting,) = bench.state.queue.in_order()
    assert waiting.level > 1
    assert not any(sequence.preemptions for sequence in bench.state.live.values())


def test_a_stream_of_a_high_class_preempts_a_low_one_a_bounded_number_of_times() -> None:
    """And the last time that one may be preempted at all is not spent on them."""
    bench = Bench(limits(num_blocks=12, max_running=8, preempt_below=5, max_preemptions=3))
    bench.submit(bench.request([1] * 5, 40))
    bench.submit(bench.request([2] * 5, 40))
    for number in range(50):
        if number % 8 == 7:
            bench.submit(bench.request([9] * 24, 3, priority=9))
        bench.step()
    counts = [sequence.preemptions for sequence in bench.state.live.values()]
    assert max(counts) == 2
    assert not any(sequence.settled for sequence in bench.state.live.values())
    bench.run()
    assert set(bench.ended) == set(bench.requests)


@pytest.mark.parametrize(("num_output", "backfill", "num_overtaking"), [(1, False, 2), (1, True, 6), (20, True, 2)])
def test_a_head_that_does_not_fit_is_overtaken_a_bounded_number_of_times(
    num_output: int, backfill: bool, num_overtaking: int
) -> None:
    """And beyond that only by those who will have ended by the time at which it fits, in 24 steps."""
    bench = Bench(limits(num_blocks=8, max_bypass=2, max_running=8, backfill=backfill, output_quantile=0.0))
    bench.submit(bench.request([1] * 4, 24))
    bench.step()
    bench.submit(bench.request(list(range(28)), 2))
    for _ in range(6):
        bench.submit(bench.request([2, 3], num_output))
        bench.step()
    started = {sequence.request.handle for sequence in bench.state.running.values()} | set(bench.ended)
    assert len(started - {0}) == num_overtaking
    assert sum(len(decode(record).backfilled) for record in bench.state.decisions.records()) == num_overtaking - 2
    bench.run()
    assert set(bench.ended) == set(bench.requests)


def test_a_row_that_fails_fails_alone() -> None:
    bench = Bench(limits(num_blocks=32))
    bench.submit(bench.request([1, 2], 6))
    bench.submit(bench.request([3, 4], 6))
    bench.step()
    victim = bench.state.live[0].row
    bench.worker.fault = lambda plan: [victim] if plan.step == 3 else []
    bench.run()
    assert bench.ended[0].reason is EndReason.FAILED
    assert bench.ended[1].reason is EndReason.MAX_TOKENS
    bench.check_output(1)


def test_resumed_output_is_counted_and_not_sent_again() -> None:
    bench = Bench(limits(num_blocks=32))
    prompt = [1, 2, 3]
    whole = isolated_output(prompt, 0, 6)
    request = bench.request(prompt, 6)
    resumed = SequenceRequest(
        handle=0, request_id="r0", prompt_ids=prompt, resume_ids=whole[:4], sampling=request.sampling,
        max_output_tokens=6, cache_key=request.cache_key,
    )  # fmt: skip
    assert bench.state.submit(resumed, 0.0) is None
    bench.requests[0] = resumed
    bench.output[0] = whole[:4]
    bench.run()
    assert bench.output[0] == whole


def test_every_waiting_sequence_says_why() -> None:
    bench = Bench(limits(num_blocks=8, max_running=2, max_bypass=1))
    bench.submit(bench.request([1] * 20, 4))
    bench.step()
    bench.submit(bench.request([2] * 24, 4, priority=1))
    bench.submit(bench.request([3] * 24, 4))
    reasons = bench.state.counts().waiting_by_reason
    assert reasons == {"blocks": 1, "priority": 1}
    views = bench.state.describe(bench.now + 2.0)
    assert [view.phase for view in views] == ["prefill", "waiting", "waiting"]
    assert "needs up to 7 KV blocks, 6 for its 24 tokens" in views[1].wait_reason
    assert "position 2 of 2" in views[2].wait_reason
    assert views[0].wait_reason == ""
    assert views[1].age_s == 2.0
    for _ in range(2):
        bench.submit(bench.request([4], 3, priority=1))
        bench.step()
    assert bench.state.counts().waiting_by_reason["slots"] == bench.state.counts().waiting
    bench.run()
    assert bench.state.counts().waiting_by_reason == {}


def test_a_stale_result_is_refused() -> None:
    bench = Bench(limits())
    bench.submit(bench.request([1], 2))
    plan = plan_step(bench.state, bench.limits, 0.0)
    assert plan is not None
    launch(bench.state, plan)
    result = bench.worker.execute(plan.wire())
    bench.state.epoch += 1
    plan.epoch += 1
    with pytest.raises(StaleResultError):
        commit(bench.state, plan, result, 0.0)
