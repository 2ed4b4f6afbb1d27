"""A worker whose steps are computed when they are launched and heard of when they are settled, crashes included."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from pawl_workers.plan import StepPlan, StepResult
from pawl_workers.row_masks import MaskSource
from tests.fakes.engine_worker import FakeEngineWorker

__all__ = ["LateStep", "LateWorker"]

_MOMENT_S = 0.01


@dataclass(slots=True)
class LateStep:
    """A launched step and what will be heard of it."""

    worker: LateWorker
    outcome: StepResult | Exception
    future: Future[StepResult] = field(default_factory=Future)

    followed: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """It takes until the next step is launched, or a moment if there is none."""
        self.followed.wait(_MOMENT_S)

    def result(self) -> StepResult:
        """Settle this step and those before it."""
        while not self.future.done():
            self.worker.settle_oldest()
        return self.future.result()


@dataclass(slots=True)
class LateWorker(FakeEngineWorker):
    """Those launched after a step that crashes crash with it."""

    in_flight: deque[LateStep] = field(default_factory=deque)

    def launch(
        self, plan: StepPlan, masks: MaskSource | None = None, began: Callable[[], object] | None = None
    ) -> LateStep:
        """Compute the step, or crash, and say nothing of it."""
        while self.in_flight and masks is not None:
            self.settle_oldest()
        outcome: StepResult | Exception
        try:
            crashed = next((step.outcome for step in self.in_flight if isinstance(step.outcome, Exception)), None)
            outcome = crashed or self.execute(plan, masks)
        except Exception as error:
            outcome = error
        for step in self.in_flight:
            step.followed.set()
        self.in_flight.append(LateStep(self, outcome))
        return self.in_flight[-1]

    def settle_oldest(self) -> None:
        """Let the oldest step be heard of."""
        step = self.in_flight.popleft()
        if isinstance(step.outcome, Exception):
            step.future.set_exception(step.outcome)
        else:
            step.future.set_result(step.outcome)

    def reset(self, epoch: int) -> None:
        """Forget everything."""
        self.in_flight.clear()
        FakeEngineWorker.reset(self, epoch)
