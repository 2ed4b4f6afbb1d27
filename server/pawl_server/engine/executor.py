"""Where a step is computed: the protocol, and the executor whose worker runs in this process.

Owns the worker's thread; knows nothing of requests or of the scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from pawl_server.engine.engine_worker import EngineWorker, PendingStep
from pawl_server.engine.result_check import check_result
from pawl_workers.plan import StepPlan, StepResult
from pawl_workers.row_masks import MaskSource

__all__ = ["Executor", "InProcessExecutor"]

_HEAD_START_S = 0.001  # preparing a decode step takes a tenth of this; what takes longer need not be waited for

Value = TypeVar("Value")
Given = TypeVar("Given")


class Executor(Protocol):
    """Computes steps, one after the other."""

    def run(self, plan: StepPlan, masks: MaskSource | None = None) -> asyncio.Future[StepResult]:
        """Begin a step, at once; `masks` gives what some rows may choose. The future raises what the worker raised."""

    async def reset(self, epoch: int) -> None:
        """Make the worker forget every sequence."""

    async def close(self) -> None:
        """Stop. A step that is still running is left to the end of the process."""


class InProcessExecutor:
    """A worker on a thread of its own. Torch releases the GIL, so the event loop lives on beside it.

    What the worker does lies in one queue: plans, and steps whose tokens have arrived. So a plan that comes while a
    device computes is launched at once, and nothing but a second thread, which touches no worker, waits for the device.

    Answers come as asyncio's own futures: those of `concurrent.futures`, chained to asyncio's, and a task for each step
    cost a small model's decode step several per cent.

    Args:
        head_start_s: most that `run` holds its caller up until the worker begins.
    """

    def __init__(self, head_start_s: float = _HEAD_START_S) -> None:
        self._head_start_s = head_start_s
        self._newest: asyncio.Future[StepResult] | None = None
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._waits: SimpleQueue[PendingStep | None] = SimpleQueue()
        self._worker: EngineWorker | None = None
        # Daemons: a step that hangs must not keep the process alive.
        threading.Thread(target=self._work, name="pawl-worker", daemon=True).start()
        threading.Thread(target=self._wait, name="pawl-arrivals", daemon=True).start()

    @property
    def worker(self) -> EngineWorker:
        """The loaded worker."""
        if self._worker is None:
            raise RuntimeError("no worker is loaded")
        return self._worker

    async def load(self, load_worker: Callable[[], EngineWorker]) -> EngineWorker:
        """Load the worker on the thread that will run it."""
        self._worker = await self.call(load_worker)
        return self._worker

    def call(self, function: Callable[[], Value]) -> asyncio.Future[Value]:
        """Call something on the worker's thread, after what it was given before."""
        answer: _Answer[Value] = _Answer()

        def job() -> None:
            try:
                value = function()
            except BaseException as error:  # raised where the call is awaited
                answer.fail(error)
            else:
                answer.give(value)

        self._jobs.put(job)
        return answer.future

    def run(self, plan: StepPlan, masks: MaskSource | None = None) -> asyncio.Future[StepResult]:
        """Begin a step. The one after it may be given before this one is done.

        A worker without a step in flight is let past: the caller goes on once the kernels run, which is without the
        interpreter's lock. Else it would hold the lock, for a message to a front end say, which the worker needs to
        prepare the step.

        Returns:
            A future. It raises BadResultError when the answer does not fit the plan, else whatever the worker raised.
        """
        answer: _Answer[StepResult] = _Answer()
        began = threading.Event()
        self._jobs.put(partial(self._launch, plan, masks, answer, began))
        if self._newest is None or self._newest.done():
            began.wait(self._head_start_s)
        self._newest = answer.future
        return answer.future

    async def reset(self, epoch: int) -> None:
        """Make the worker forget every sequence."""
        await self.call(lambda: self.worker.reset(epoch))

    async def close(self) -> None:
        """Let the threads go without waiting for them."""
        self._jobs.put(None)
        self._waits.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _wait(self) -> None:
        while (step := self._waits.get()) is not None:
            with contextlib.suppress(Exception):  # `result` raises it again
                step.wait()
            self._jobs.put(partial(_settle, step))

    def _launch(
        self, plan: StepPlan, masks: MaskSource | None, answer: _Answer[StepResult], began: threading.Event
    ) -> None:
        try:
            step = self.worker.launch(plan, masks, began.set)
        except BaseException as error:  # raised where the step is awaited
            answer.fail(error)
            return
        finally:
            began.set()
        step.future.add_done_callback(partial(self._hand_over, plan, answer))
        if not step.future.done():
            self._waits.put(step)

    def _hand_over(self, plan: StepPlan, answer: _Answer[StepResult], done: Future[StepResult]) -> None:
        try:
            result = done.result()
            check_result(plan, result, self.worker.facts.vocab_size)
        except Exception as error:  # raised where the step is awaited
            answer.fail(error)
        else:
            answer.give(result)


class _Answer(Generic[Value]):
    """A future of the running loop that another thread fills."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Value] = self._loop.create_future()

    def give(self, value: Value) -> None:
        self._settle(self.future.set_result, value)

    def fail(self, error: BaseException) -> None:
        self._settle(self.future.set_exception, error)

    def _settle(self, settle: Callable[[Given], None], given: Given) -> None:
        def unless_cancelled() -> None:
            if not self.future.done():
                settle(given)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(unless_cancelled)


def _settle(step: PendingStep) -> None:
    with contextlib.suppress(Exception):  # the step's future has it
        step.result()
