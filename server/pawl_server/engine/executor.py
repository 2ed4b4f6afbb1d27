"""Where a step is computed: the protocol, and the executor whose worker runs in this process.

Owns the worker's thread and the check of what comes back; knows nothing of requests or of the scheduler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from pawl_workers.plan import StepPlan, StepResult
from pawl_workers.row_masks import MaskSource

__all__ = [
    "BadResultError",
    "EngineWorker",
    "Executor",
    "InProcessExecutor",
    "SelfTestReport",
    "WorkerFacts",
    "check_result",
]

Value = TypeVar("Value")


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


class SelfTestReport(Protocol):
    """What a passed self-test found."""

    @property
    def num_tokens(self) -> int:
        """Tokens compared."""

    @property
    def max_difference(self) -> float:
        """Largest difference of a log-probability from the reference path."""


class EngineWorker(Protocol):
    """The worker as the engine sees it. Every method blocks and is called from one thread."""

    @property
    def facts(self) -> WorkerFacts:
        """Sizes and names of what was loaded."""

    def execute(self, plan: StepPlan, masks: MaskSource | None = None) -> StepResult:
        """Compute one step; may raise anything, after which `reset` must make it usable again.

        `masks` is asked when the tokens are to be chosen, and may make it wait.
        """

    def reset(self, epoch: int) -> None:
        """Forget every sequence; the next plan is step 1 of this epoch."""

    def self_test(self) -> SelfTestReport:
        """Generate a few tokens and compare with the reference path; raises when they differ."""


class Executor(Protocol):
    """Computes steps, one at a time."""

    async def run(self, plan: StepPlan, masks: MaskSource | None = None) -> StepResult:
        """Compute a step; `masks` gives what some rows may choose. Raises whatever the worker raised."""

    async def reset(self, epoch: int) -> None:
        """Make the worker forget every sequence."""

    async def close(self) -> None:
        """Stop. A step that is still running is left to the end of the process."""


class InProcessExecutor:
    """A worker on a thread of its own. Torch releases the GIL, so the event loop lives on beside it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pawl-worker")
        self._worker: EngineWorker | None = None

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

    async def call(self, function: Callable[[], Value]) -> Value:
        """Call something on the worker's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def run(self, plan: StepPlan, masks: MaskSource | None = None) -> StepResult:
        """Compute a step.

        Raises:
            BadResultError: the answer does not fit the plan.
            Exception: whatever the worker raised.
        """
        result = await asyncio.get_running_loop().run_in_executor(self._pool, self.worker.execute, plan, masks)
        check_result(plan, result, self.worker.facts.vocab_size)
        return result

    async def reset(self, epoch: int) -> None:
        """Make the worker forget every sequence."""
        await asyncio.get_running_loop().run_in_executor(self._pool, self.worker.reset, epoch)

    async def close(self) -> None:
        """Let the thread go without waiting for it."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def check_result(plan: StepPlan, result: StepResult, vocab_size: int) -> None:
    """Check that a result can be committed, before anything of it is.

    Raises:
        BadResultError: naming what does not fit.
    """
    if (result.step, result.epoch) != (plan.step, plan.epoch):
        raise BadResultError(
            f"result of step {result.step} epoch {result.epoch}, in flight is {plan.step} epoch {plan.epoch}"
        )
    rows = set(result.rows)
    if len(rows) != len(result.rows) or not rows <= set(plan.rows):
        raise BadResultError(f"step {plan.step}: the result names rows that the plan does not")
    if len(result.token_ids) != len(result.rows):
        raise BadResultError(f"step {plan.step}: {len(result.token_ids)} tokens for {len(result.rows)} sampled rows")
    if result.logprobs and len(result.logprobs) != len(result.rows):
        raise BadResultError(f"step {plan.step}: {len(result.logprobs)} log-probabilities for {len(result.rows)} rows")
    if result.token_ids and not (min(result.token_ids) >= 0 and max(result.token_ids) < vocab_size):
        raise BadResultError(f"step {plan.step}: a token id is outside the vocabulary of {vocab_size}")
