"""The step budget: it learns what a step costs, holds a target with it, and never takes a decode's turn."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.budget import StepBudget, StepTimeModel
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import SamplingSpec
from tests.fakes.shadow_worker import ShadowWorker


def _cost(num_tokens: int, num_pairs: int) -> float:
    return 4e-3 + 1.5e-4 * num_tokens + 2e-8 * num_pairs


def _steps(seed: int, count: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    return [(n, n * draw.randint(10, 4000)) for n in (draw.randint(1, 500) for _ in range(count))]


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.floats(0.5, 20.0), st.floats(0.0, 0.1))
def test_the_fit_finds_the_machine_it_measures(seed: int, slowness: float, noise: float) -> None:
    draw = random.Random(seed)
    model = StepTimeModel()
    for tokens, pairs in _steps(seed, 300):
        model.observe(tokens, pairs, slowness * _cost(tokens, pairs) * (1 + noise * draw.uniform(-1, 1)))
    for tokens, pairs in _steps(seed + 1, 20):
        assert model.predict(tokens, pairs) == pytest.approx(slowness * _cost(tokens, pairs), rel=0.05 + noise)


def test_a_machine_that_becomes_slower_is_learnt_again_and_one_bad_step_is_not() -> None:
    model = StepTimeModel(memory_steps=50)
    for tokens, pairs in _steps(1, 200):
        model.observe(tokens, pairs, _cost(tokens, pairs))
    model.observe(100, 10_000, 30.0)
    assert model.predict(100, 10_000) == pytest.approx(_cost(100, 10_000), rel=0.2)
    for tokens, pairs in _steps(2, 600):
        model.observe(tokens, pairs, 3 * _cost(tokens, pairs))
    assert model.predict(100, 10_000) == pytest.approx(3 * _cost(100, 10_000), rel=0.1)


def test_a_long_stretch_of_equal_steps_does_not_ruin_the_fit() -> None:
    model = StepTimeModel(memory_steps=50)
    for tokens, pairs in _steps(1, 100):
        model.observe(tokens, pairs, _cost(tokens, pairs))
    for number in range(20_000):
        model.observe(64, 64 * 500, _cost(64, 64 * 500) * (1 + 0.01 * (-1) ** number))
    assert model.predict(256, 100_000) == pytest.approx(_cost(256, 100_000), rel=0.5)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(0, 4000), st.floats(0.005, 0.3))
def test_what_the_budget_allows_stays_within_the_target_or_is_the_floor(
    seed: int, num_decodes: int, context: int, target: float
) -> None:
    budget = StepBudget(target)
    for tokens, pairs in _steps(seed, 200):
        budget.observe(tokens, pairs, _cost(tokens, pairs))
    pairs = num_decodes * 300
    allowed = budget.prompt_tokens(num_decodes, pairs, context, most=2048)
    assert budget.floor <= allowed <= 2048
    if allowed > budget.floor:
        total = pairs + allowed * context + allowed * allowed // 2
        assert _cost(num_decodes + allowed, total) <= 1.02 * target
    if allowed < 2048:
        more = allowed + max(2, allowed // 20)
        total = pairs + more * context + more * more // 2
        assert _cost(num_decodes + more, total) >= 0.98 * target


def test_without_a_target_without_decodes_and_without_measurements_nothing_is_held_back() -> None:
    assert StepBudget(0.0).prompt_tokens(5, 100, 0, most=512) == 512
    fresh = StepBudget(0.01)
    assert fresh.prompt_tokens(5, 100, 0, most=512) == 512
    for tokens, pairs in _steps(1, 50):
        fresh.observe(tokens, pairs, _cost(tokens, pairs))
    assert fresh.prompt_tokens(0, 0, 0, most=512) == 512
    assert fresh.prompt_tokens(5, 100, 0, most=512) < 512
    assert fresh.prompt_tokens(5, 100, 0, most=3) == 3


def test_a_long_prompt_beside_decodes_keeps_the_gap_and_still_gets_done() -> None:
    """On a machine that takes 4 ms and 0.15 ms a token, chunks shrink to what 30 ms allow; all 512 took 81 ms."""
    limits = SchedulerLimits(
        num_blocks=400, block_size=16, max_running=8, max_batch_tokens=512, max_context=6000, max_prefill_chunk=512
    )
    state, worker = SchedulerState(limits, CacheRoot("m", "f", 16)), ShadowWorker(16)
    budget = StepBudget(0.03)
    draw = random.Random(3)

    def submit(handle: int, num_prompt: int, num_output: int) -> None:
        prompt = [draw.randrange(32) for _ in range(num_prompt)]
        request = SequenceRequest(
            handle=handle, request_id="", prompt_ids=prompt, sampling=SamplingSpec(), max_output_tokens=num_output,
            cache_key=b"",
        )  # fmt: skip
        assert state.submit(request, 0.0) is None

    for handle in range(4):
        submit(handle, 8 + 40 * handle, 300)
    gaps = []
    for number in range(250):
        if number == 60:
            submit(9, 2000, 1)
        plan = plan_step(state, limits, 0.0, budget)
        assert plan is not None
        assert plan.num_decodes == 4 or number < 20, "a decode had to wait"
        seconds = _cost(plan.num_tokens, plan.num_pairs)
        gaps.append(seconds)
        wire = plan.wire()
        launch(state, plan)
        commit(state, plan, worker.execute(wire), 0.0)
        budget.observe(plan.num_tokens, plan.num_pairs, seconds)
    assert 9 not in state.live, "the long prompt was starved"
    assert max(gaps[60:]) < 0.0315
    assert max(gaps[60:]) > 0.025, "the target was not used"
