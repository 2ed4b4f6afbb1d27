"""What happens when a step crashes: its steps are taken back, the worker forgets, and whoever did it is looked for."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass

from pawl.errors import ServerError
from pawl_server.engine.executor import Executor
from pawl_server.engine.grammar.grammars import Grammars
from pawl_server.engine.link.delivery import Delivery
from pawl_server.engine.meter import Meter
from pawl_server.engine.suspects import CRASH_WINDOW_S, MAX_CRASHES, Suspects
from pawl_server.engine.watchdog import Watchdog
from pawl_server.scheduler.committer import void
from pawl_server.scheduler.plan import Plan
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import StepResult

__all__ = ["InFlight", "Recovery"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InFlight:
    """A launched step, oldest first in the loop's queue. Times of the loop's clock."""

    plan: Plan
    answer: asyncio.Future[StepResult]
    planned_at: float
    launched_at: float


class Recovery:
    """Brings scheduler and worker back to where steps can be planned. The arguments are the loop's parts."""

    def __init__(
        self,
        state: SchedulerState,
        executor: Executor,
        watchdog: Watchdog,
        meter: Meter,
        delivery: Delivery,
        suspects: Suspects,
        grammars: Grammars | None,
    ) -> None:
        self._state, self._executor, self._watchdog, self._meter = state, executor, watchdog, meter
        self._delivery, self._suspects, self._grammars = delivery, suspects, grammars

    async def recover(self, in_flight: deque[InFlight], error: Exception, now: float) -> None:
        """The oldest step crashed at `now`: void all in flight, queue their sequences again and find out who it was.

        Raises:
            ServerError: the worker crashes again and again, or cannot be reset.
        """
        state, suspects = self._state, self._suspects
        plan = in_flight[0].plan
        if self._grammars is not None:
            self._grammars.masks.void()
        members = [sequence.request for sequence in state.ledger[0].members(state.slots)]
        log.error("step %d crashed with %d sequences", plan.step, len(members), exc_info=error)
        await self._void(in_flight)
        cause = f"{type(error).__name__}: {error}"
        if suspects.crash_storm(now):
            raise ServerError(
                f"{MAX_CRASHES} steps crashed within {CRASH_WINDOW_S:g} s, the last with {cause}",
                reason="WORKER_FAILED",
            ) from error
        self._meter.worker_lost(len(state.running))
        try:
            with self._watchdog.watch(plan.step):
                await self._executor.reset(state.epoch + 1)
        except Exception as again:
            raise ServerError(f"the worker cannot be reset after {cause}: {again}", reason="WORKER_FAILED") from again
        state.reset_worker(state.epoch + 1, now)
        convicted = suspects.crashed(request.handle for request in members)
        for handle in convicted:
            for sample in reversed(state.siblings(handle)):  # of one prompt: the next would crash it again
                if ended := state.abort(sample, "worker_failed", now):
                    log.error("request %s crashed the worker in two steps and fails", ended.request_id)
                    self._delivery.failed(ended, f"the worker crashes on this request: {cause}")
                    suspects.gone([sample])
        suspects.gone(convicted)

    async def _void(self, in_flight: deque[InFlight]) -> None:
        """Take every step in flight back, the newest first; what still runs cannot count."""
        with self._watchdog.watch(in_flight[-1].plan.step):
            await asyncio.gather(*(step.answer for step in in_flight), return_exceptions=True)
        while in_flight:
            void(self._state, in_flight.pop().plan)
