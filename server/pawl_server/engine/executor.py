"""Where a step is computed: the protocol, and the executor whose worker runs in this process.

Owns the worker's thread and the check of what comes back; knows nothing of requests or of the scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from pawl_workers.plan import StepPlan, StepResult
from pawl_workers.row_masks import MaskSource

__all__ = [
    "BadResultError",
    "EngineWorker",
    "Executor",
    "InProcessExecutor",
    "PendingStep",
    "SelfTestReport",
    "WorkerFacts",
    "check_result",
]

_HEAD_START_S = 0.001  # preparing a decode step takes a tenth of this; what takes longer need not be waited for

Value = TypeVar("Value")
Given = TypeVar("Given")


class BadResultError(RuntimeError):
    """A worker answered with what its plan cannot have given."""


class WorkerFacts(Protocol):
    """What a loaded worker says of itself. Sizes in bytes; `load_s` in seconds."""

    @property
    def architectures(self) -> Sequence[str]: ...  # noqa: D102 (the names say it)
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def max_context(self) -> int: ...  # noqa: D102
    @property
    def eos_token_ids(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def data_type(self) -> str: ...  # noqa: D102
    @property
    def weight_type(self) -> str: ...  # noqa: D102
    @property
    def kv_type(self) -> str: ...  # noqa: D102
    @property
    def revision(self) -> str: ...  # noqa: D102
    @property
    def block_size(self) -> int: ...  # noqa: D102
    @property
    def num_blocks(self) -> int: ...  # noqa: D102
    @property
    def num_host_blocks(self) -> int: ...  # noqa: D102
    @property
    def restore_fixed_s(self) -> float: ...  # noqa: D102
    @property
    def restore_block_s(self) -> float: ...  # noqa: D102
    @property
    def weight_bytes(self) -> int: ...  # noqa: D102
    @property
    def kv_bytes(self) -> int: ...  # noqa: D102
    @property
    def activation_bytes(self) -> int: ...  # noqa: D102
    @property
    def num_parameters(self) -> int: ...  # noqa: D102
    @property
    def kernels(self) -> str: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def num_threads(self) -> int: ...  # noqa: D102
    @property
    def max_in_flight(self) -> int: ...  # noqa: D102


class SelfTestReport(Protocol):
    """What a passed self-test found."""

    @property
    def num_tokens(self) -> int:
        """Tokens compared."""

    @property
    def max_difference(self) -> float:
        """Largest difference of a log-probability from the reference path."""


class PendingStep(Protocol):
    """A launched step."""

    @property
    def future(self) -> Future[StepResult]:
        """Done once the step is settled, be it by `result` or by a launch that had to wait for it."""

    def wait(self) -> None:
        """Wait until `result` will not; may be called from any thread."""

    def result(self) -> StepResult:
        """Settle this step and those before it; may raise anything."""


class EngineWorker(Protocol):
    """The worker as the engine sees it. Every method blocks and is called from one thread."""

    @property
    def facts(self) -> WorkerFacts:
        """Sizes and names of what was loaded."""

    def launch(
        self, plan: StepPlan, masks: MaskSource | None = None, began: Callable[[], object] | None = None
    ) -> PendingStep:
        """Begin one step, or compute it; may raise anything, after which `reset` must make the worker usable again.

        `masks` is asked when the tokens are to be chosen, and may make it wait. `began` is called once the step is
        prepared and its forward pass begins, on this thread.
        """

    def reset(self, epoch: int) -> None:
        """Forget every sequence; the next plan is step 1 of this epoch."""

    def self_test(self) -> SelfTestReport:
        """Generate a few tokens and compare with the reference path; raises when they differ."""


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


def _check_accepted(plan: StepPlan, result: StepResult) -> list[int]:
    """Check that a row gives its drafts before its last token; the rows, each once if its tokens stand together."""
    drafts, rows = dict(plan.drafts), []
    for row, tokens in itertools.groupby(zip(result.rows, result.token_ids, strict=True), key=lambda pair: pair[0]):
        accepted = [token_id for _, token_id in tokens][:-1]
        if accepted != drafts.get(row, [])[: len(accepted)]:
            raise BadResultError(f"step {plan.step}: row {row} gives tokens that it has no drafts for")
        rows.append(row)
    return rows


def check_result(plan: StepPlan, result: StepResult, vocab_size: int) -> None:
    """Check that a result can be committed, before anything of it is.

    Raises:
        BadResultError: naming what does not fit.
    """
    if (result.step, result.epoch) != (plan.step, plan.epoch):
        raise BadResultError(
            f"result of step {result.step} epoch {result.epoch}, in flight is {plan.step} epoch {plan.epoch}"
        )
    if len(result.token_ids) != len(result.rows):
        raise BadResultError(f"step {plan.step}: {len(result.token_ids)} tokens for {len(result.rows)} sampled rows")
    rows = _check_accepted(plan, result) if plan.drafts else result.rows
    if len(set(rows)) != len(rows) or not set(rows) <= set(plan.rows):
        raise BadResultError(f"step {plan.step}: the result names rows that the plan does not")
    if result.logprobs and len(result.logprobs) != len(result.rows):
        raise BadResultError(f"step {plan.step}: {len(result.logprobs)} log-probabilities for {len(result.rows)} rows")
    if result.token_ids and not (min(result.token_ids) >= 0 and max(result.token_ids) < vocab_size):
        raise BadResultError(f"step {plan.step}: a token id is outside the vocabulary of {vocab_size}")
