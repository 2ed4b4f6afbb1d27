from __future__ import annotations

import msgspec
import pytest

from pawl_server.engine.executor import InProcessExecutor
from pawl_server.engine.warm_up import measure_prefill, warm_up
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_workers.plan import StepPlan, StepResult
from tests.fakes.engine_worker import FakeEngineWorker


@pytest.mark.parametrize(
    ("num_blocks", "max_running", "max_batch_tokens", "max_context", "expected"),
    [
        (256, 8, 64, 512, (64, 8)),  # everything fits: a full step, a full batch
        (256, 8, 64, 6, (40, 8)),  # a short context: eight prompts of five
        (4, 8, 64, 512, (16, 4)),  # a tiny pool holds one prompt, or four sequences
        (1, 4, 8, 512, (4, 1)),
        (1, 1, 1, 2, (1, 1)),
    ],
)
async def test_the_largest_steps_run_and_leave_the_worker_fresh(
    num_blocks: int, max_running: int, max_batch_tokens: int, max_context: int, expected: tuple[int, int]
) -> None:
    limits = SchedulerLimits(
        num_blocks=num_blocks,
        block_size=4,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        max_context=max_context,
        max_prefill_chunk=32,
    )
    executor = InProcessExecutor()
    worker = FakeEngineWorker()
    await executor.load(lambda: worker)
    seen: list[tuple[int, int]] = []
    assert await warm_up(executor, limits, lambda done, tokens: seen.append((done, tokens))) == expected
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert worker.reset_epochs == [1, 1]
    await executor.close()


async def test_a_token_of_a_prompt_is_measured_in_the_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = SchedulerLimits(num_blocks=256, block_size=4, max_running=8, max_batch_tokens=64, max_context=512)
    executor, worker = InProcessExecutor(), FakeEngineWorker()
    await executor.load(lambda: worker)
    seconds = iter([9.0, 3.0, 5.0])

    def timed(plan: StepPlan) -> StepResult:
        result = execute(plan)
        assert sum(plan.num_tokens) == 64
        return msgspec.structs.replace(result, prepare_s=1.0, forward_s=next(seconds), sample_s=0.5)

    execute = worker.execute
    monkeypatch.setattr(FakeEngineWorker, "execute", lambda _, plan, _masks: timed(plan))
    assert await measure_prefill(executor, limits) == pytest.approx(4.5 / 64)
    assert worker.reset_epochs[-1] == 1
    await executor.close()
