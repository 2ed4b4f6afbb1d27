from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

import msgspec
import pytest

from pawl_server.engine.engine_worker import PendingStep
from pawl_server.engine.executor import InProcessExecutor
from pawl_server.engine.result_check import BadResultError
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan, StepResult
from pawl_workers.row_masks import MaskSource
from tests.fakes.engine_worker import POISON, FakeEngineWorker


def _plan(first: int) -> StepPlan:
    new = NewSequence(0, [first], 1, 0, [1], SamplingSpec())
    return StepPlan(1, 1, [], [new], [], [0], [1])


async def test_the_worker_lives_on_one_thread_and_the_loop_goes_on() -> None:
    executor = InProcessExecutor()
    worker = await executor.load(FakeEngineWorker)
    assert isinstance(worker, FakeEngineWorker)
    worker.gate = threading.Event()
    step = executor.run(_plan(5))
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


class DeviceStep:
    """A step that a device has been given; it is there when `arrived` is set."""

    def __init__(self, worker: DeviceWorker, result: StepResult) -> None:
        self.arrived = threading.Event()
        self.future: Future[StepResult] = Future()
        self._worker, self._result = worker, result

    def wait(self) -> None:
        assert self.arrived.wait(30)

    def set_wrong(self, step: int) -> None:
        """Answer as another step."""
        self._result = msgspec.structs.replace(self._result, step=step)

    def result(self) -> StepResult:
        self.wait()
        if not self.future.done():
            self._worker.settled.append((self._result.step, threading.current_thread().name))
            if self._result.epoch == 9:
                self.future.set_exception(RuntimeError("planted loss"))
            else:
                self.future.set_result(self._result)
        return self.future.result()


class DeviceWorker(FakeEngineWorker):
    """Launches at once; a plan with copies needs the step before it first."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[DeviceStep] = []
        self.launched: SimpleQueue[int] = SimpleQueue()
        self.settled: list[tuple[int, str]] = []

    def launch(
        self, plan: StepPlan, masks: MaskSource | None = None, began: Callable[[], object] | None = None
    ) -> DeviceStep:
        if plan.copies:
            self.steps[-1].result()
        self.steps.append(DeviceStep(self, StepResult(plan.step, plan.epoch, [], [], [], [], [], 0.0, 0.0, 0.0)))
        self.launched.put(plan.step)
        return self.steps[-1]


def _empty(step: int, epoch: int = 1, copies: Sequence[tuple[int, int]] = ()) -> StepPlan:
    return StepPlan(step, epoch, [], [], [], [], [], copies=[*copies])


async def test_a_plan_is_launched_while_the_step_before_it_runs() -> None:
    executor = InProcessExecutor()
    worker = await executor.load(DeviceWorker)
    assert isinstance(worker, DeviceWorker)
    first, second = (executor.run(_empty(step)) for step in (1, 2))
    assert [await asyncio.to_thread(worker.launched.get, timeout=30) for _ in range(2)] == [1, 2]
    assert not first.done()
    worker.steps[0].arrived.set()
    assert (await first).step == 1
    assert not second.done()
    worker.steps[1].arrived.set()
    assert (await second).step == 2
    assert worker.settled == [(1, "pawl-worker"), (2, "pawl-worker")]
    await executor.close()


async def test_a_launch_that_needs_the_step_before_it_hands_that_over() -> None:
    """The result of step 1 comes out as soon as it is settled, and not when step 2 ends."""
    executor = InProcessExecutor()
    worker = await executor.load(DeviceWorker)
    assert isinstance(worker, DeviceWorker)
    first = executor.run(_empty(1))
    await asyncio.to_thread(worker.launched.get, timeout=30)
    second = executor.run(_empty(2, copies=[(1, 2)]))
    worker.steps[0].arrived.set()
    assert (await first).step == 1
    await asyncio.to_thread(worker.launched.get, timeout=30)
    assert not second.done()
    worker.steps[1].arrived.set()
    assert (await second).step == 2
    await executor.close()


async def test_what_a_device_loses_comes_out_and_the_thread_lives_on() -> None:
    executor = InProcessExecutor()
    worker = await executor.load(DeviceWorker)
    assert isinstance(worker, DeviceWorker)
    lost = executor.run(_empty(1, epoch=9))
    await asyncio.to_thread(worker.launched.get, timeout=30)
    worker.steps[0].arrived.set()
    with pytest.raises(RuntimeError, match="planted loss"):
        await lost
    await executor.reset(2)
    assert worker.reset_epochs == [2]
    await executor.close()


class TellingWorker(FakeEngineWorker):
    """Tells when it begins a step."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()

    def execute(self, plan: StepPlan, masks: MaskSource | None = None) -> StepResult:
        self.begun.set()
        return super().execute(plan, masks)


async def test_a_step_begins_before_the_loop_does_anything_else() -> None:
    executor, worker = InProcessExecutor(), TellingWorker()
    await executor.load(lambda: worker)
    step = executor.run(_plan(5))
    assert worker.begun.wait(30)  # the loop is held up here
    assert not step.done()
    assert (await step).rows == [0]
    await executor.close()


class PreparingWorker(DeviceWorker):
    """Takes its time to prepare a step; each then begins when `begins` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[int] = []
        self.begins = threading.Event()

    def launch(
        self, plan: StepPlan, masks: MaskSource | None = None, began: Callable[[], object] | None = None
    ) -> DeviceStep:
        assert self.begins.wait(30)
        self.prepared.append(plan.step)
        if began is not None:
            began()
        return super().launch(plan, masks)


async def test_a_worker_without_a_step_is_let_past_until_its_kernels_run() -> None:
    executor, worker = InProcessExecutor(head_start_s=1000), PreparingWorker()  # longer than a test may take
    await executor.load(lambda: worker)
    worker.begins.set()
    first = executor.run(_empty(1))
    assert worker.prepared == [1]
    assert not first.done()
    worker.begins.clear()
    second = executor.run(_empty(2))  # which begins when the loop goes on: it is not waited for
    assert worker.prepared == [1]
    worker.begins.set()
    assert [await asyncio.to_thread(worker.launched.get, timeout=30) for _ in range(2)] == [1, 2]
    for step in worker.steps:
        step.arrived.set()
    assert [(await first).step, (await second).step] == [1, 2]
    third = executor.run(_empty(3))
    assert worker.prepared == [1, 2, 3]
    worker.steps[2].arrived.set()
    assert (await third).step == 3
    await executor.close()


async def test_a_worker_that_does_not_begin_holds_nobody_up_for_long() -> None:
    executor, worker = InProcessExecutor(head_start_s=0.001), PreparingWorker()
    await executor.load(lambda: worker)
    step = executor.run(_empty(1))
    assert worker.prepared == []
    worker.begins.set()
    await asyncio.to_thread(worker.launched.get, timeout=30)
    worker.steps[0].arrived.set()
    assert (await step).step == 1
    await executor.close()


class RefusingWorker(FakeEngineWorker):
    """Takes no step."""

    def launch(
        self, plan: StepPlan, masks: MaskSource | None = None, began: Callable[[], object] | None = None
    ) -> PendingStep:
        raise RuntimeError("planted refusal")


async def test_a_worker_that_fails_before_it_begins_holds_nobody_up() -> None:
    executor = InProcessExecutor(head_start_s=1000)  # longer than a test may take
    await executor.load(RefusingWorker)
    with pytest.raises(RuntimeError, match="planted refusal"):
        await executor.run(_plan(5))
    await executor.close()


async def test_a_step_that_nobody_waits_for_any_more_hurts_nobody() -> None:
    executor, worker = InProcessExecutor(), FakeEngineWorker()
    await executor.load(lambda: worker)
    worker.gate = threading.Event()
    step = executor.run(_plan(5))
    step.cancel()
    worker.gate.set()
    await executor.reset(1)
    assert (await executor.run(_plan(5))).rows == [0]
    await executor.close()


async def test_an_answer_that_does_not_fit_is_raised_where_the_step_is_awaited() -> None:
    executor, worker = InProcessExecutor(), DeviceWorker()
    await executor.load(lambda: worker)
    step = executor.run(_empty(1))
    await asyncio.to_thread(worker.launched.get, timeout=30)
    worker.steps[0].set_wrong(2)
    worker.steps[0].arrived.set()
    with pytest.raises(BadResultError, match="result of step 2"):
        await step
    await executor.close()


def test_a_worker_that_outlives_its_loop_ends_with_its_executor() -> None:
    before = threading.active_count()
    worker = FakeEngineWorker(gate=threading.Event())
    executor = InProcessExecutor()

    async def leave() -> None:
        await executor.load(lambda: worker)
        executor.run(_plan(5)).cancel()
        await executor.close()

    asyncio.run(leave())
    assert worker.gate is not None
    worker.gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("pawl-"):
            thread.join(30)
    assert threading.active_count() <= before
