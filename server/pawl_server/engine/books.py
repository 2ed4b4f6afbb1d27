"""What is kept of the steps: how many, where the time went, and what front ends and Prometheus are told of it.

Read by nobody on the way of a token. Decides nothing: the loop turns whether the books are read or not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import psutil

from pawl_server.engine.intake import Intake
from pawl_server.engine.journal_file import JournalFile
from pawl_server.engine.link.delivery import Delivery
from pawl_server.engine.link.frames import to_cache_events
from pawl_server.engine.meter import Meter
from pawl_server.engine.recovery import InFlight
from pawl_server.engine.step_record import step_record, worker_seconds
from pawl_server.internal.v1 import engine_pb2
from pawl_server.kv.block_pool import PoolError
from pawl_server.scheduler.budget import StepBudget
from pawl_server.scheduler.committer import Committed
from pawl_server.scheduler.invariants import InvariantError, check_invariants
from pawl_server.scheduler.state import Counts, SchedulerState
from pawl_workers.plan import StepResult

__all__ = ["Books"]

log = logging.getLogger(__name__)

_STALLED_AFTER_S = 10.0  # work but no step for so long: not progressing


class Books:
    """The books of one replica's steps.

    Args:
        state: the scheduler's; only read, but for what its journal and its drafter observe.
        meter: is told of each step.
        budget: is told how long steps take; None = a step has as many prompt tokens as its limits allow.
        journal: takes what the state's journal keeps.
        check_every: check the scheduler's invariants every n steps; 0 = never.
        clock: monotonic seconds.

    Attributes:
        meter, budget, clock: as given.
        num_steps: committed, over all epochs.
        idle: whether there was nothing to compute since the last step.
    """

    def __init__(
        self,
        state: SchedulerState,
        meter: Meter,
        *,
        budget: StepBudget | None = None,
        journal: JournalFile | None = None,
        check_every: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.meter = meter
        self.budget = budget
        self.clock = clock
        self.num_steps = 0
        self.idle = False
        self._state = state
        self._journal = journal
        self._check_every = check_every
        self._settled_at = clock()  # end of the last tick: what follows is idle time
        self._progress_at = clock()
        self._process = psutil.Process()

    def settle(self, step: InFlight, result: StepResult, committed: Committed, answered_at: float) -> None:
        """Enter a committed step."""
        state, plan = self._state, step.plan
        self.num_steps += 1
        self.idle = False
        self._progress_at = answered_at
        if self._check_every and self.num_steps % self._check_every == 0:
            try:
                check_invariants(state)
            except (InvariantError, PoolError):
                log.exception("after step %d the scheduler contradicts itself", self.num_steps)
        now = self.clock()
        worker_s = worker_seconds(result)
        # What the step added to the time that passed: its planning does not, where an older step ran meanwhile.
        elapsed_s = now - max(step.planned_at, self._settled_at)
        if state.journal is not None:
            state.journal.measured(worker_s, elapsed_s)
        if self.budget is not None:
            self.budget.observe(plan.load, worker_s)
        if state.speculation is not None and plan.kind == "decode":
            state.speculation.observe(plan.load, elapsed_s)
        self.meter.step(step_record(step, result, committed, self._settled_at, elapsed_s))
        self._settled_at = now

    def nothing_came(self) -> None:
        """The time since the last step was for nothing: no work, or a step that crashed."""
        now = self.clock()
        self.meter.idle(now - self._settled_at)
        self._settled_at = now

    def publish(self, intake: Intake, delivery: Delivery) -> None:
        """Tell front ends the load, Prometheus the totals, and write the journal."""
        if self.idle:
            self.nothing_came()
        if self._journal is not None:
            self._journal.write()
        counts = self._state.counts()
        held = intake.num_held
        self.meter.gauges(
            running=counts.running,
            waiting=counts.waiting_by_reason | ({"grammar": held} if held else {}),
            free=counts.free_blocks,
            cached=counts.cached_blocks,
            used=counts.used_blocks,
        )
        self.meter.flush()
        if events := self._state.pool.events.drain():
            delivery.cache_events(to_cache_events(events))
        delivery.load(self._load(counts, intake))

    def load(self, intake: Intake) -> engine_pb2.EngineLoad:
        """The state of the engine, for front ends."""
        return self._load(self._state.counts(), intake)

    def close(self) -> None:
        """Bring the books up to date and close the journal."""
        self.meter.flush()
        if self._journal is not None:
            self._journal.close()

    def _load(self, counts: Counts, intake: Intake) -> engine_pb2.EngineLoad:
        return engine_pb2.EngineLoad(
            step=self.num_steps,
            running=counts.running,
            waiting=counts.waiting + intake.num_new + intake.num_held,
            waiting_tokens=counts.waiting_tokens,
            free_blocks=counts.free_blocks,
            cached_blocks=counts.cached_blocks,
            num_blocks=self._state.limits.num_blocks,
            output_tokens=self.meter.output_tokens,
            memory_bytes=self._process.memory_info().rss,
            progressing=self.idle or self.clock() - self._progress_at < _STALLED_AFTER_S,
        )
