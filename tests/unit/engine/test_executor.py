from __future__ import annotations

import asyncio
import threading

import msgspec
import pytest

from pawl_server.engine.executor import BadResultError, InProcessExecutor, check_result
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan, StepResult, TokenLogprobs
from tests.fakes.engine_worker import POISON, FakeEngineWorker

PLAN = StepPlan(3, 1, [], [], [], rows=[4, 5], num_tokens=[1, 1])
GOOD = StepResult(3, 1, [4, 5], [7, 8], [], [], [], 0.0, 0.0, 0.0)
LOGPROBS = TokenLogprobs(7, -1.0, 1, [], [])


def _plan(first: int) -> StepPlan:
    new = NewSequence(0, [first], 1, 0, [1], SamplingSpec())
    return StepPlan(1, 1, [], [new], [], [0], [1])


def test_a_result_that_fits_passes() -> None:
    check_result(PLAN, GOOD, vocab_size=10)
    check_result(PLAN, msgspec.structs.replace(GOOD, rows=[5], token_ids=[0]), vocab_size=10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": 2},
        {"epoch": 2},
        {"rows": [4, 6]},
        {"rows": [4, 4]},
        {"token_ids": [7]},
        {"token_ids": [7, 10]},
        {"token_ids": [-1, 7]},
        {"logprobs": [LOGPROBS]},
    ],
)
def test_a_result_that_does_not_fit_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadResultError):
        check_result(PLAN, msgspec.structs.replace(GOOD, **wrong), vocab_size=10)


async def test_the_worker_lives_on_one_thread_and_the_loop_goes_on() -> None:
    executor = InProcessExecutor()
    worker = await executor.load(FakeEngineWorker)
    assert isinstance(worker, FakeEngineWorker)
    worker.gate = threading.Event()
    step = asyncio.create_task(executor.run(_plan(5)))
    await asyncio.sleep(0)
    assert not step.done()
    worker.gate.set()
    assert (await step).rows == [0]
    names = {await executor.call(lambda: threading.current_thread().name) for _ in range(3)}
    assert len(names) == 1
    assert threading.current_thread().name not in names
    await executor.close()


async def test_what_a_worker_raises_comes_out_and_reset_makes_it_usable() -> None:
    executor = InProcessExecutor()
    await executor.load(FakeEngineWorker)
    with pytest.raises(RuntimeError, match="planted crash"):
        await executor.run(_plan(POISON))
    await executor.reset(1)
    assert (await executor.run(_plan(5))).epoch == 1
    await executor.close()
