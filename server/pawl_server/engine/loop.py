"""The ratchet: one tick plans a step, has it computed, commits it and hands the tokens on.

Owns the order of these and what happens when a step crashes. Knows no model, no socket and no policy: the
scheduler decides, the executor computes, the outboxes are emptied by others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import psutil

from pawl_server.engine.executor import Executor
from pawl_server.engine.grammar.grammars import Grammars
from pawl_server.engine.intake import Intake
from pawl_server.engine.journal_file import JournalFile
from pawl_server.engine.link.delivery import Delivery
from pawl_server.engine.link.frames import SequenceKey, to_cache_events
from pawl_server.engine.link.outbox import Outbox
from pawl_server.engine.link.protocol import HEARTBEAT_PERIOD_S
from pawl_server.engine.meter import Meter
from pawl_server.engine.recovery import InFlight, Recovery
from pawl_server.engine.step_record import step_record, worker_seconds
from pawl_server.engine.suspects import Suspects, probation_limits
from pawl_server.engine.watchdog import Watchdog
from pawl_server.internal.v1 import engine_pb2
from pawl_server.kv.block_pool import PoolError
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.budget import StepBudget
from pawl_server.scheduler.committer import Committed, commit, launch
from pawl_server.scheduler.invariants import InvariantError, check_invariants
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import Counts, SchedulerState, SequenceView
from pawl_workers.plan import StepResult

__all__ = ["EngineLoop"]

log = logging.getLogger(__name__)

_STALLED_AFTER_S = 10.0  # work but no step for so long: not progressing
_NOTHING_FITS_S = 0.05  # pause when sequences wait and none of them can be planned


class EngineLoop:
    """The step loop of one replica.

    Args:
        state: the scheduler's state; nobody else writes it.
        limits: what a step may hold.
        executor: computes steps.
        watchdog: watches over each of them.
        meter: is told of each of them.
        budget: how many prompt tokens a step takes beside decodes; None = as many as `limits` allow.
        grammars: what compiles constraints and keeps them; None = no request may have one.
        clock: monotonic seconds.
        depth: steps that may be in flight at once.
        check_every: check the scheduler's invariants every n steps; 0 = never.
        journal: takes what the state's journal keeps.
    """

    def __init__(
        self,
        state: SchedulerState,
        limits: SchedulerLimits,
        executor: Executor,
        watchdog: Watchdog,
        meter: Meter,
        *,
        budget: StepBudget | None = None,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
        depth: int = 1,
        check_every: int = 0,
        journal: JournalFile | None = None,
    ) -> None:
        self.state = state
        self.limits = limits
        self.executor = executor
        self.watchdog = watchdog
        self.meter = meter
        self.budget = budget
        self.grammars = grammars
        self.clock = clock
        self.num_steps = 0  # committed, over all epochs
        self._check_every = check_every
        self._journal = journal
        self._depth = depth
        self._in_flight: deque[InFlight] = deque()
        self._delivery = Delivery()
        self._suspects = Suspects()
        self._wake = asyncio.Event()
        self._recovery = Recovery(state, executor, watchdog, meter, self._delivery, self._suspects, grammars, clock)
        self._intake = Intake(state, limits, self._delivery, self._suspects, grammars, self._wake.set)
        self.stopped = asyncio.Event()  # set unless `run` is running
        self.stopped.set()
        self._stopping = False
        self._idle = False
        self._settled_at = clock()  # end of the last tick: what follows is idle time
        self._progress_at = clock()
        self._process = psutil.Process()

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
            self.meter.flush()
            if self._journal is not None:
                self._journal.close()
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
        plan = plan_step(self.state, self._step_limits(), planned_at, self.budget)
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
        self._delivery.emit(committed, self.num_steps + 1)
        self._settle(step, result, committed, answered_at)

    def _depth_now(self) -> int:
        """Steps that may be in flight. On probation one: whoever crashes it must be known."""
        return 1 if self._suspects.on_probation else self._depth

    def attach(self, outbox: Outbox) -> None:
        """A connection opened; its tokens go into `outbox`."""
        self._delivery.attach(outbox)
        outbox.set_load(self._load(self.state.counts()))

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
            return self.limits
        running = (sequence.request.handle for sequence in self.state.running.values())
        return probation_limits(self.limits, may_start=self._suspects.have_proven(running))

    async def _wait_for_work(self) -> None:
        """Sleep until something arrives. On becoming idle the front ends are told at once."""
        if self.state.has_work():
            timeout_s: float | None = _NOTHING_FITS_S
        else:
            timeout_s = None
            if not self._idle:
                self._idle = True
                self._publish()
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
        await self._recovery.recover(self._in_flight, error)
        settled_at = self.clock()
        self.meter.idle(settled_at - self._settled_at)  # nothing came of it
        self._settled_at = settled_at

    def _settle(self, step: InFlight, result: StepResult, committed: Committed, answered_at: float) -> None:
        """Keep the books of a committed step."""
        plan = step.plan
        self.num_steps += 1
        self._idle = False
        self._progress_at = answered_at
        if self._suspects.on_probation:
            self._suspects.proved(committed.handles)
            self._suspects.gone(ended.handle for ended in committed.ended)
        if self._check_every and self.num_steps % self._check_every == 0:
            try:
                check_invariants(self.state)
            except (InvariantError, PoolError):
                log.exception("after step %d the scheduler contradicts itself", self.num_steps)
        now = self.clock()
        worker_s = worker_seconds(result)
        # What the step added to the time that passed: its planning does not, where an older step ran meanwhile.
        elapsed_s = now - max(step.planned_at, self._settled_at)
        if self.state.journal is not None:
            self.state.journal.measured(worker_s, elapsed_s)
        if self.budget is not None:
            self.budget.observe(plan.load, worker_s)
        if self.state.speculation is not None and plan.kind == "decode":
            self.state.speculation.observe(plan.load, elapsed_s)
        self.meter.step(step_record(step, result, committed, self._settled_at, elapsed_s))
        self._settled_at = now

    async def _report(self) -> None:
        """Once a second: load to the front ends, totals to Prometheus."""
        while True:
            self._publish()
            await asyncio.sleep(HEARTBEAT_PERIOD_S)

    def _publish(self) -> None:
        if self._idle:
            now = self.clock()
            self.meter.idle(now - self._settled_at)
            self._settled_at = now
        if self._journal is not None:
            self._journal.write()
        counts = self.state.counts()
        held = self._intake.num_held
        self.meter.gauges(
            running=counts.running,
            waiting=counts.waiting_by_reason | ({"grammar": held} if held else {}),
            free=counts.free_blocks,
            cached=counts.cached_blocks,
            used=counts.used_blocks,
        )
        self.meter.flush()
        if events := self.state.pool.events.drain():
            self._delivery.cache_events(to_cache_events(events))
        self._delivery.load(self._load(counts))

    def _load(self, counts: Counts) -> engine_pb2.EngineLoad:
        """The state of the engine, for front ends."""
        return engine_pb2.EngineLoad(
            step=self.num_steps,
            running=counts.running,
            waiting=counts.waiting + self._intake.num_new + self._intake.num_held,
            waiting_tokens=counts.waiting_tokens,
            free_blocks=counts.free_blocks,
            cached_blocks=counts.cached_blocks,
            num_blocks=self.limits.num_blocks,
            output_tokens=self.meter.output_tokens,
            memory_bytes=self._process.memory_info().rss,
            progressing=self._idle or self.clock() - self._progress_at < _STALLED_AFTER_S,
        )
