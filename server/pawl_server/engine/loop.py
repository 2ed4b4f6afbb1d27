"""The ratchet: one tick plans a step, has it computed, commits it and hands the tokens on.

Owns the order of these. Knows no model, no socket and no policy: the scheduler decides, the executor computes, the
books are kept and the outboxes emptied by others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence

from pawl_server.engine.books import Books
from pawl_server.engine.executor import Executor
from pawl_server.engine.grammar.grammars import Grammars
from pawl_server.engine.intake import Intake
from pawl_server.engine.link.delivery import Delivery
from pawl_server.engine.link.frames import SequenceKey
from pawl_server.engine.link.outbox import Outbox
from pawl_server.engine.link.protocol import HEARTBEAT_PERIOD_S
from pawl_server.engine.recovery import InFlight, Recovery
from pawl_server.engine.suspects import Suspects, probation_limits
from pawl_server.engine.watchdog import Watchdog
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState, SequenceView

__all__ = ["EngineLoop"]

_NOTHING_FITS_S = 0.05  # pause when sequences wait and none of them can be planned


class EngineLoop:
    """The step loop of one replica.

    Args:
        state: the scheduler's state; nobody else writes it.
        executor: computes steps.
        watchdog: watches over each of them.
        books: of the same state; each step is entered in them, and their clock is the loop's.
        grammars: what compiles constraints and keeps them; None = no request may have one.
        depth: steps that may be in flight at once.
    """

    def __init__(
        self,
        state: SchedulerState,
        executor: Executor,
        watchdog: Watchdog,
        books: Books,
        *,
        grammars: Grammars | None = None,
        depth: int = 1,
    ) -> None:
        self.state = state
        self.executor = executor
        self.watchdog = watchdog
        self.books = books
        self.grammars = grammars
        self.meter = books.meter
        self.clock = books.clock
        self._depth = depth
        self._in_flight: deque[InFlight] = deque()
        self._delivery = Delivery()
        self._suspects = Suspects()
        self._wake = asyncio.Event()
        self._recovery = Recovery(state, executor, watchdog, books.meter, self._delivery, self._suspects, grammars)
        self._intake = Intake(state, self._delivery, self._suspects, grammars, self._wake.set)
        self.stopped = asyncio.Event()  # set unless `run` is running
        self.stopped.set()
        self._stopping = False

    @property
    def num_steps(self) -> int:
        """Steps committed, over all epochs."""
        return self.books.num_steps

    async def run(self) -> None:
        """Turn until `stop`.

        Raises:
            ServerError: the worker is beyond repair; the replica must be rebuilt.
        """
        reporter = asyncio.create_task(self._report(), name="engine report")
        self.stopped.clear()
        try:
            while not self._stopping:
                await self.tick()
            while self._in_flight:
                await self._click()
        finally:
            reporter.cancel()
            self.books.close()
            self.stopped.set()

    def stop(self) -> None:
        """Stop after the steps that run."""
        self._stopping = True
        self._wake.set()

    async def tick(self) -> None:
        """One click of the ratchet; waits for work when there is none.

        With a depth of 2 the next step is planned and launched before the one that runs is awaited.
        """
        self._intake.drain(self.clock())
        launched = len(self._in_flight) < self._depth_now() and self._launch()
        if len(self._in_flight) >= self._depth_now() or (self._in_flight and not launched):
            await self._click()
        elif not launched:
            await self._wait_for_work()

    def _launch(self) -> bool:
        """Plan a step and hand it to the executor; False when there is nothing to compute."""
        planned_at = self.clock()
        plan = plan_step(self.state, self._step_limits(), planned_at, self.books.budget)
        if plan is None:
            return False
        launch(self.state, plan)
        drafts = {} if plan.proposals is None else plan.proposals.drafts
        masks = None if self.grammars is None else self.grammars.masks.launched(self.state, drafts)
        answer = self.executor.run(plan.wire(), masks)
        self._in_flight.append(InFlight(plan, answer, planned_at, self.clock()))
        return True

    async def _click(self) -> None:
        """Wait for the oldest step and settle it: the pawl falls."""
        step = self._in_flight[0]
        try:
            with self.watchdog.watch(step.plan.step):
                result = await step.answer
        except Exception as error:
            await self._recover(error)
            return
        self._in_flight.popleft()
        answered_at = self.clock()
        if self.grammars is not None:
            result = self.grammars.masks.explain(result)
        committed = commit(self.state, step.plan, result, now=answered_at)
        if self.grammars is not None:
            self.grammars.masks.committed(self.state)
        self._delivery.emit(committed, self.books.num_steps + 1)
        if self._suspects.on_probation:
            self._suspects.proved(committed.handles)
            self._suspects.gone(ended.handle for ended in committed.ended)
        self.books.settle(step, result, committed, answered_at)

    def _depth_now(self) -> int:
        """Steps that may be in flight. On probation one: whoever crashes it must be known."""
        return 1 if self._suspects.on_probation else self._depth

    def attach(self, outbox: Outbox) -> None:
        """A connection opened; its tokens go into `outbox`."""
        self._delivery.attach(outbox)
        outbox.set_load(self.books.load(self._intake))

    def detach(self, outbox: Outbox) -> None:
        """A connection is gone: its sequences end at the next tick."""
        self.abort(list(self._delivery.detach(outbox)), "disconnected")

    def submit(self, request: SequenceRequest) -> None:
        """Take a sequence at the next tick. Its handle is a SequenceKey."""
        self._intake.submit(request)

    def abort(self, keys: Sequence[SequenceKey], reason: str) -> None:
        """End sequences at the next tick, all at once; without effect on those that ended already."""
        self._intake.abort(keys, reason)

    def describe(self) -> Sequence[SequenceView]:
        """The live sequences, oldest first."""
        now = self.clock()
        return [*self.state.describe(now), *self._intake.describe(now)]

    def flush_prefix_cache(self) -> int:
        """Empty the prefix cache of the blocks nobody uses; returns how many that were."""
        return self.state.flush_prefix_cache()

    def _step_limits(self) -> SchedulerLimits:
        if not self._suspects.on_probation:
            return self.state.limits
        running = (sequence.request.handle for sequence in self.state.running.values())
        return probation_limits(self.state.limits, may_start=self._suspects.have_proven(running))

    async def _wait_for_work(self) -> None:
        """Sleep until something arrives. On becoming idle the front ends are told at once."""
        if self.state.has_work():
            timeout_s: float | None = _NOTHING_FITS_S
        else:
            timeout_s = None
            if not self.books.idle:
                self.books.idle = True
                self.books.publish(self._intake, self._delivery)
        if not self._intake.pending and not self._stopping:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()

    async def _recover(self, error: Exception) -> None:
        """The oldest step crashed.

        Raises:
            ServerError: the worker is beyond repair.
        """
        await self._recovery.recover(self._in_flight, error, self.clock())
        self.books.nothing_came()

    async def _report(self) -> None:
        """Once a second: load to the front ends, totals to Prometheus."""
        while True:
            self.books.publish(self._intake, self._delivery)
            await asyncio.sleep(HEARTBEAT_PERIOD_S)
