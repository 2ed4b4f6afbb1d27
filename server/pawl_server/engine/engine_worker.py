"""The worker as the engine sees it: what it says of itself, and the few calls that are made to it.

Protocols alone, so that whoever reads the facts of a worker needs neither torch nor the thread that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from pawl_workers.plan import StepPlan, StepResult
from pawl_workers.row_masks import MaskSource

__all__ = ["EngineWorker", "PendingStep", "SelfTestReport", "WorkerFacts"]


class WorkerFacts(Protocol):
    """What a loaded worker says of itself. `_bytes` in bytes, `_s` in seconds."""

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
