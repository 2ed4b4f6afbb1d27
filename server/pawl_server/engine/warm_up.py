"""Full-sized steps before the first request: allocators, kernels and thread pools reach their final state.

Runs through the scheduler itself, so the plans are those of real work; leaves worker and state as it found them.
"""

from __future__ import annotations

from collections.abc import Callable

from pawl_server.engine.executor import Executor
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import SamplingSpec

__all__ = ["measure_prefill", "warm_up"]

_NUM_MEASURED = 3


async def warm_up(executor: Executor, limits: SchedulerLimits, on_step: Callable[[int, int], None]) -> tuple[int, int]:
    """Compute one prefill of the largest step and decodes of the largest batch.

    Args:
        executor: the worker, fresh.
        limits: sizes of the replica.
        on_step: told the number of steps done and the number of tokens of the step.

    Returns:
        The most tokens and the most sequences of a step.

    Raises:
        Exception: whatever the worker raised; it cannot serve.
    """
    await executor.reset(1)
    state = SchedulerState(limits, CacheRoot("warm-up", "none", limits.block_size))
    prompts = _prompts(limits)
    for number, num_tokens in enumerate(prompts):
        state.submit(_request(number, num_tokens, num_output=1), 0.0)
    num_running = _num_decodes(limits)
    submitted = False
    largest, widest, steps = 0, 0, 0
    while True:
        if not state.has_work():
            if submitted:
                break
            for number in range(num_running):
                state.submit(_request(len(prompts) + number, 1, num_output=2), 0.0)
            submitted = True
        plan = plan_step(state, limits, now=0.0)
        if plan is None:
            break
        launch(state, plan)
        commit(state, plan, await executor.run(plan.wire()), now=0.0)
        steps += 1
        largest = max(largest, plan.num_tokens)
        widest = max(widest, plan.num_sequences)
        on_step(steps, plan.num_tokens)
    await executor.reset(1)
    return largest, widest


async def measure_prefill(executor: Executor, limits: SchedulerLimits) -> float:
    """Measure what a token of a prompt takes in the largest step of prompts: seconds, the best of a few.

    Raises:
        Exception: whatever the worker raised; it cannot serve.
    """
    best = float("inf")
    for _ in range(_NUM_MEASURED):
        await executor.reset(1)
        state = SchedulerState(limits, CacheRoot("warm-up", "none", limits.block_size))
        for number, num_tokens in enumerate(_prompts(limits)):
            state.submit(_request(number, num_tokens, num_output=1), 0.0)
        plan = plan_step(state, limits, now=0.0)
        if plan is None:
            break
        result = await executor.run(plan.wire())
        best = min(best, (result.prepare_s + result.forward_s + result.sample_s) / plan.num_tokens)
    await executor.reset(1)
    return best


def _prompts(limits: SchedulerLimits) -> list[int]:
    """Lengths of prompts that fill one step, as far as chunk, context, rows and blocks allow."""
    longest = max(1, min(limits.max_prefill_chunk, limits.max_context - 1, limits.num_blocks * limits.block_size))
    count = max(1, min(limits.max_running, limits.max_batch_tokens // longest, _blocks_allow(limits, longest)))
    return [longest] * count


def _num_decodes(limits: SchedulerLimits) -> int:
    return max(1, min(limits.max_running, _blocks_allow(limits, 2)))


def _blocks_allow(limits: SchedulerLimits, num_tokens: int) -> int:
    spare = limits.num_blocks - limits.watermark_blocks
    return spare // -(-(num_tokens + 1) // limits.block_size)


def _request(number: int, num_tokens: int, num_output: int) -> SequenceRequest:
    return SequenceRequest(
        handle=number,
        request_id="warm-up",
        prompt_ids=[0] * num_tokens,
        sampling=SamplingSpec(temperature=1.0, top_p=0.9, top_k=8, seed=number),
        max_output_tokens=num_output,
        cache_key=b"",
        bypass_prefix_cache=True,
    )
