"""Several samples of one prompt: computed once, admitted together, and free of each other from then on."""

from __future__ import annotations

import pytest

from pawl_server.scheduler.endings import EndReason
from pawl_server.scheduler.invariants import check_invariants
from pawl_workers.plan import StepPlan
from tests.fakes.scheduler_bench import Bench, limits

PROMPT = list(range(11))  # two blocks of 4, and 3 tokens


def wide(**changes: int | float | bool) -> Bench:
    return Bench(limits(**{"num_blocks": 32, "max_running": 6, "max_batch_tokens": 32, **changes}))


def plans(bench: Bench) -> list[StepPlan]:
    return [plan for plan in bench.log if isinstance(plan, StepPlan)]


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("num_prompt", [1, 4, 5, 11, 12])
def test_the_prompt_is_computed_once(num_prompt: int, bypass: bool) -> None:
    """But for its last token, which each sample computes for itself, with or without a prefix cache."""
    bench = wide()
    bench.submit(bench.request(PROMPT[:num_prompt] + [9] * (num_prompt - 11), 3, bypass=bypass, num_samples=4))
    bench.run()
    computed = sum(sum(plan.num_tokens) for plan in plans(bench))
    assert computed == num_prompt + 3 + 4 * 2
    copies = [copy for plan in plans(bench) for copy in plan.copies]
    assert len(copies) == (3 if (num_prompt - 1) % 4 else 0)
    outputs = {tuple(bench.output[handle]) for handle in range(4)}
    assert len(outputs) > 1  # seeds differ
    for handle in range(4):
        bench.check_output(handle)
        assert bench.ended[handle].output_tokens == 3


def test_the_samples_start_in_the_step_after_the_last_token_of_the_prompt() -> None:
    bench = wide(max_prefill_chunk=4)
    bench.submit(bench.request(PROMPT, 4, num_samples=3))
    for _ in range(5):
        bench.step()
    assert [plan.num_tokens for plan in plans(bench)] == [[4], [4], [3], [1, 1, 1], [1, 1, 1]]
    assert [len(plan.new) for plan in plans(bench)] == [1, 0, 2, 0, 0]
    assert [len(bench.output[handle]) for handle in range(3)] == [3, 2, 2]


def test_all_start_or_none() -> None:
    """Three rows are free and four are needed: nobody of the group starts before a fourth is."""
    bench = wide(max_running=4, max_bypass=1)
    bench.submit(bench.request([1, 2], 6))
    bench.step()
    bench.submit(bench.request(PROMPT, 2, num_samples=4))
    bench.submit(bench.request([3], 1))
    bench.submit(bench.request([4], 1))
    views = bench.state.describe(bench.now)
    assert "its 4 samples start together and 3 of 4 slots are free" in views[1].wait_reason
    assert views[2].wait_reason == views[1].wait_reason
    assert [view.phase for view in views[:3]] == ["decode", "waiting", "waiting"]
    bench.step()
    bench.step()
    assert set(bench.ended) == {5}, "one may overtake it, and no more"
    assert [len(bench.output[handle]) for handle in (1, 2, 3, 4)] == [0, 0, 0, 0]
    counts = bench.state.counts()
    assert (counts.waiting, sum(counts.waiting_by_reason.values())) == (5, 5)
    bench.run()
    assert set(bench.ended) == set(bench.requests)
    for handle in bench.requests:
        bench.check_output(handle)


def test_blocks_are_kept_for_those_that_are_parked() -> None:
    """While the prompt is computed, what its samples need to start with is given to nobody else."""
    bench = wide(num_blocks=10, max_prefill_chunk=4, output_quantile=0.0)
    bench.submit(bench.request(PROMPT, 2, num_samples=5))
    bench.step()
    assert bench.state.pool.num_used == 1 + 4
    assert bench.state.counts().waiting_by_reason == {"prompt": 4}
    assert "computed once" in bench.state.describe(bench.now)[3].wait_reason
    bench.submit(bench.request([5] * 14, 2))
    bench.run()
    assert bench.ended[5].preemption_count == 0
    for handle in range(6):
        bench.check_output(handle)


@pytest.mark.parametrize(
    ("changes", "num_prompt", "samples", "text"),
    [
        ({"max_running": 3}, 2, 4, "4 samples start together, at most 3 sequences run at once: ask for fewer"),
        ({"num_blocks": 4}, 11, 3, "3 samples, at most 2 fit beside a prompt of 11 tokens: ask for fewer"),
    ],
)
def test_a_group_that_can_never_start_is_refused(
    changes: dict[str, int], num_prompt: int, samples: int, text: str
) -> None:
    bench = wide(**changes)
    refusal = bench.state.submit(bench.request(PROMPT[:num_prompt], 1, num_samples=samples), 0.0)
    assert refusal is not None
    assert (refusal.reason, refusal.field, refusal.message) == ("NEVER_FITS", "sampling.sample_count", text)
    assert not bench.state.live
    assert bench.submit(bench.request(PROMPT[:num_prompt], 1, num_samples=samples - 1))
    bench.run()
    assert all(ended.reason is EndReason.MAX_TOKENS for ended in bench.ended.values())


def test_a_queue_without_room_for_all_takes_none() -> None:
    bench = wide(max_waiting=4)
    assert bench.submit(bench.request([1], 1, num_samples=3))
    assert not bench.submit(bench.request([2], 1, num_samples=2))
    assert bench.submit(bench.request([2], 1))
    assert len(bench.state.live) == 4


def test_a_tenant_pays_for_the_prompt_once() -> None:
    """And for every output token."""
    bench = wide()
    bench.submit(bench.request(PROMPT, 2, num_samples=3))
    sequence = bench.state.live[0]
    for _ in range(3):
        bench.step()
    prices = bench.state.accounts.prices
    assert len(bench.ended) == 3 - len(bench.state.live)
    served = sum(len(output) for output in bench.output.values())
    assert bench.state.accounts.service(sequence.tenant) == prices.prompt * len(PROMPT) + prices.output * served


def test_one_that_ends_frees_its_blocks_while_others_go_on() -> None:
    """The one that computed the prompt ends with its first token, before the others have any."""
    bench = wide(max_prefill_chunk=16)
    bench.submit(bench.request(PROMPT, 8, bypass=True, num_samples=3))
    first = bench.state.live[0]
    bench.step()
    assert bench.state.live.keys() == {0, 1, 2}
    held = bench.state.pool.num_used
    ended = bench.state.abort(first.request.handle, "stop_string", bench.now)
    assert ended is not None
    bench.finish(ended)
    assert held - bench.state.pool.num_used == 1, "its block beyond the shared ones"
    check_invariants(bench.state)
    bench.run()
    assert [len(bench.output[handle]) for handle in (1, 2)] == [8, 8]
    for handle in range(3):
        bench.check_output(handle)
    assert bench.state.pool.num_used == 0


def test_another_computes_the_prompt_when_the_first_is_aborted() -> None:
    bench = wide(max_prefill_chunk=4)
    bench.submit(bench.request(PROMPT, 2, num_samples=3))
    bench.step()
    for handle in (0, 2):
        ended = bench.state.abort(handle, "cancelled", bench.now)
        assert ended is not None
        bench.finish(ended)
        check_invariants(bench.state)
    assert bench.state.siblings(1) == [1]
    bench.run()
    bench.check_output(1)
    assert bench.ended[1].output_tokens == 2


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_aborting_all_frees_every_block(steps: int) -> None:
    bench = wide(max_prefill_chunk=4)
    bench.submit(bench.request(PROMPT, 9, num_samples=5))
    for _ in range(steps):
        bench.step()
    assert bench.state.siblings(3) == [0, 1, 2, 3, 4]
    for handle in bench.state.siblings(3):
        ended = bench.state.abort(handle, "cancelled", bench.now)
        assert ended is not None
        bench.finish(ended)
    check_invariants(bench.state)
    assert (bench.state.pool.num_used, len(bench.state.live)) == (0, 0)
    bench.run()
    assert len(bench.state.free_rows) + len(bench.state.rows_to_free) == 6


def test_a_preempted_sample_is_computed_again_alone() -> None:
    """Too few blocks for the outputs of all: whoever gives way comes back by himself."""
    bench = wide(num_blocks=8, output_quantile=0.0, max_preemptions=8)
    bench.submit(bench.request([1, 2, 3, 4, 5], 14, num_samples=4))
    bench.run()
    counts = [bench.ended[handle].preemption_count for handle in range(4)]
    assert counts[0] == 0
    assert sum(counts) > 0
    for handle in range(4):
        bench.check_output(handle)
        assert bench.ended[handle].output_tokens == 14


def test_the_prompt_is_scored_once() -> None:
    bench = wide(max_prefill_chunk=4)
    bench.submit(bench.request(PROMPT, 2, prompt_logprobs=1, num_samples=3))
    bench.run()
    assert bench.scored == {0: len(PROMPT)}


def test_times_begin_with_the_prompt_for_every_sample() -> None:
    bench = wide(max_prefill_chunk=4)
    bench.submit(bench.request(PROMPT, 3, num_samples=2))
    bench.run()
    first, second = bench.ended[0], bench.ended[1]
    assert (first.cached_prompt_tokens, second.cached_prompt_tokens) == (0, 0)
    assert second.prefill_s == first.prefill_s + 1.0, "its first token comes one step later"
    assert first.decode_s == second.decode_s
