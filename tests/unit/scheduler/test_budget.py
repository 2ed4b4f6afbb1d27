"""The step budget: it learns what a step costs, holds a target with it, and never takes a decode's turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.budget import StepBudget, StepLoad, StepTimeModel
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.plan import Plan
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import SamplingSpec, StepResult


def _cost(load: StepLoad) -> float:
    return 4e-3 + 1.5e-4 * load.num_tokens + 2e-8 * load.num_pairs + 2e-7 * load.num_read


def _steps(seed: int, count: int) -> list[StepLoad]:
    """Steps of decodes, and in every other one a chunk of a prompt."""
    draw = random.Random(seed)
    loads = []
    for _ in range(count):
        decodes, context = draw.randint(1, 60), draw.randint(10, 4000)
        chunk, before = draw.choice([0, draw.randint(16, 500)]), draw.randint(0, 4000)
        read = decodes * context + (before + chunk if chunk else 0)
        loads.append(StepLoad(decodes + chunk, decodes * context + _pairs(before, chunk), read))
    return loads


def _pairs(context: int, num_tokens: int) -> int:
    return num_tokens * context + num_tokens * (num_tokens + 1) // 2


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.floats(0.5, 20.0), st.floats(0.0, 0.1))
def test_the_fit_finds_the_machine_it_measures(seed: int, slowness: float, noise: float) -> None:
    draw = random.Random(seed)
    model = StepTimeModel()
    for load in _steps(seed, 300):
        model.observe(load, slowness * _cost(load) * (1 + noise * draw.uniform(-1, 1)))
    for load in _steps(seed + 1, 20):
        assert model.predict(load) == pytest.approx(slowness * _cost(load), rel=0.05 + noise)


def test_a_machine_that_becomes_slower_is_learnt_again_and_one_bad_step_is_not() -> None:
    model, seen = StepTimeModel(memory_steps=50), StepLoad(100, 10_000, 10_000)
    for load in _steps(1, 200):
        model.observe(load, _cost(load))
    model.observe(seen, 30.0)
    assert model.predict(seen) == pytest.approx(_cost(seen), rel=0.2)
    for load in _steps(2, 600):
        model.observe(load, 3 * _cost(load))
    assert model.predict(seen) == pytest.approx(3 * _cost(seen), rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e-5])
def test_steps_that_take_hardly_any_time_leave_a_fit_that_goes_on(seconds: float) -> None:
    """Only decodes, whose pairs are the KV that they read, and no clock can tell them; then a real machine."""
    model = StepTimeModel(memory_steps=50)
    for number in range(2_000):
        read = 4 * (100 + number % 50)
        model.observe(StepLoad(4, read, read), seconds)
    for load in _steps(3, 2_000):
        model.observe(load, _cost(load))
    other = StepLoad(256, 100_000, 40_000)
    assert model.predict(other) == pytest.approx(_cost(other), rel=0.1)


def test_a_long_stretch_of_equal_steps_does_not_ruin_the_fit() -> None:
    model = StepTimeModel(memory_steps=50)
    for load in _steps(1, 100):
        model.observe(load, _cost(load))
    decode, other = StepLoad(64, 64 * 500, 64 * 500), StepLoad(256, 100_000, 40_000)
    for number in range(20_000):
        model.observe(decode, _cost(decode) * (1 + 0.01 * (-1) ** number))
    assert model.predict(other) == pytest.approx(_cost(other), rel=0.5)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(0, 4000), st.floats(0.005, 0.3))
def test_what_the_budget_allows_stays_within_the_target_or_is_the_floor(
    seed: int, num_decodes: int, context: int, target: float
) -> None:
    budget = StepBudget(target)
    for load in _steps(seed, 200):
        budget.observe(load, _cost(load))
    decodes = StepLoad(num_decodes, num_decodes * 300, num_decodes * 300)
    allowed = budget.chunk(decodes, num_decodes, context, most=2048)
    assert budget.floor <= allowed <= 2048

    def seconds(chunk: int) -> float:
        read = decodes.num_read + context + chunk
        return _cost(StepLoad(num_decodes + chunk, decodes.num_pairs + _pairs(context, chunk), read))

    if allowed > budget.floor:
        assert seconds(allowed) <= 1.02 * target
    if allowed < 2048:
        assert seconds(allowed + max(2, allowed // 20)) >= 0.98 * target


def test_without_a_target_without_decodes_and_without_measurements_nothing_is_held_back() -> None:
    decodes, none = StepLoad(5, 100, 100), StepLoad(0, 0, 0)
    assert StepBudget(0.0).chunk(decodes, 5, 0, most=512) == 512
    fresh = StepBudget(0.01)
    assert fresh.chunk(decodes, 5, 0, most=512) == 512
    for load in _steps(1, 50):
        fresh.observe(load, _cost(load))
    assert fresh.chunk(none, 0, 0, most=512) == 512
    assert fresh.chunk(decodes, 5, 0, most=512) < 512
    assert fresh.chunk(decodes, 5, 0, most=3) == 3
    crowded = StepLoad(5 + fresh.floor, 100, 100)  # other prompts have had the least that a step may take
    assert fresh.chunk(crowded, 5, 400_000, most=512) == 0


def _beside_decodes(
    cost: Callable[[StepLoad], float],
    target_s: float,
    num_context: int,
    prompts: Sequence[Sequence[int]],
    num_output: int = 1,
) -> tuple[list[float], list[int]]:
    """Four decode after so many tokens each; then these prompts arrive at once.

    Returns:
        Seconds of each step from then on, and how many prompt tokens it took, until each prompt has its first token.
    """
    limits = SchedulerLimits(
        num_blocks=8000, block_size=16, max_running=32, max_batch_tokens=512, max_context=60_000,
        max_prefill_chunk=512, max_partial_prefills=32, output_quantile=0.0,
    )  # fmt: skip
    state, budget = SchedulerState(limits, CacheRoot("m", "f", 16)), StepBudget(target_s)

    def submit(handle: int, prompt: Sequence[int], most: int) -> None:
        request = SequenceRequest(
            handle=handle, request_id="", prompt_ids=prompt, sampling=SamplingSpec(), max_output_tokens=most,
            cache_key=b"",
        )  # fmt: skip
        assert state.submit(request, 0.0) is None

    def step() -> Plan:
        plan = plan_step(state, limits, 0.0, budget)
        assert plan is not None
        launch(state, plan)
        rows = plan.wire().rows
        known = [row for row in rows if state.slots.expected[row] > state.slots.length[row]]
        commit(state, plan, StepResult(plan.step, 1, known, [7] * len(known), [], [], [], 0, 0, 0), 0.0)
        budget.observe(plan.load, cost(plan.load))
        return plan

    for handle in range(4):
        submit(handle, [handle] * (num_context + 8 * handle), 3000)
    while not all(handle in state.live and state.live[handle].num_output > 5 for handle in range(4)):
        step()
    for number, prompt in enumerate(prompts):
        submit(4 + number, prompt, num_output)
    seconds, num_prompt = [], []
    while any(sequence.num_output < 1 for sequence in state.live.values()):
        plan = step()
        assert plan.num_decodes >= 4, "a decode had to wait"
        seconds.append(cost(plan.load))
        num_prompt.append(plan.num_tokens - plan.num_decodes)
        assert len(seconds) < 2500, "the prompts are starved"
    return seconds, num_prompt


def test_a_long_prompt_beside_decodes_keeps_the_gap_and_still_gets_done() -> None:
    """On a machine that takes 4 ms and 0.15 ms a token, chunks shrink to what 30 ms allow; all 512 took 81 ms."""
    seconds, _ = _beside_decodes(_cost, 0.03, 100, [[9] * 2000])
    assert max(seconds[5:]) < 0.0315
    assert max(seconds[5:]) > 0.025, "the target was not used"


def test_the_gap_is_held_when_contexts_are_long() -> None:
    """Where KV is read at 1 us a token, 4 x 10,000 tokens take 40 ms of the 100; pairs are nearly free.

    What decodes teach about their pairs must not be taken for the price of a prompt's, of which there are 512 times
    as many for the same KV. The first prompt, once it decodes, takes 20 ms of each step from the second.
    """

    def cost(load: StepLoad) -> float:
        return 4e-3 + 2e-5 * load.num_tokens + 2e-9 * load.num_pairs + 1e-6 * load.num_read

    seconds, num_prompt = _beside_decodes(cost, 0.1, 10_000, [[9] * 20_000, [10] * 10_000], num_output=3000)
    assert max(seconds[5:]) < 1.03 * 0.1
    rate = sum(num_prompt) / len(num_prompt)
    assert rate > 250, "prompts were held back without need"


def _cost_of_reading(load: StepLoad) -> float:
    return 4e-3 + 2e-5 * load.num_tokens + 2e-9 * load.num_pairs + 1e-6 * load.num_read


def _behind_a_cached_prefix() -> float:
    """Seconds of the longest step while twenty short questions behind 8,000 cached tokens come beside decodes."""
    shared = [8] * 8000
    seconds, _ = _beside_decodes(_cost_of_reading, 0.05, 100, [shared, *([*shared, *[n] * 20] for n in range(10, 30))])
    return max(seconds[5:])


def test_the_gap_is_held_by_many_who_share_a_long_cached_prefix() -> None:
    """Each has few tokens to compute and much KV to read: all at once would take three times the target."""
    assert _cost_of_reading(StepLoad(4 + 20 * 20, 0, 400 + 20 * 8000)) > 3 * 0.05
    assert 0.8 * 0.05 < _behind_a_cached_prefix() < 1.03 * 0.05


def _read_nothing_before(plan: Plan, context: int, num_tokens: int) -> None:
    plan.budget -= num_tokens
    plan.num_pairs += num_tokens * context + num_tokens * (num_tokens + 1) // 2
    plan.num_read += num_tokens


_CHUNK = StepBudget.chunk


def _foresee_no_reading(budget: StepBudget, load: StepLoad, num_decodes: int, context: int, most: int) -> int:
    del context
    return _CHUNK(budget, load, num_decodes, 0, most)


@pytest.mark.parametrize(
    ("owner", "name", "bug"), [(Plan, "take", _read_nothing_before), (StepBudget, "chunk", _foresee_no_reading)]
)
def test_a_budget_that_does_not_count_what_is_read_misses_the_target(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, bug: Callable[..., object]
) -> None:
    """Steps become longer, or half as long as they may be."""
    monkeypatch.setattr(owner, name, bug)
    assert not 0.7 * 0.05 < _behind_a_cached_prefix() < 1.1 * 0.05
