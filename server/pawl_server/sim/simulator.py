"""Discrete events around the production scheduler, on a virtual clock of whole nanoseconds.

An agenda holds arrivals, aborts, ends of steps, faults and timers. While a step is in flight what happens waits for
its end, as in the engine's loop. Steps that decide the same as the one before are skipped to the next event.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.sim.agenda import Agenda, EventKind, nanoseconds
from pawl_server.sim.cost import CostModel, StepShape
from pawl_server.sim.decisions import DecisionLog
from pawl_server.sim.executor import FakeExecutor
from pawl_server.sim.policies import Policy
from pawl_server.sim.record import Record
from pawl_server.sim.scheduler import SimulatedScheduler, Step
from pawl_server.sim.streams import IntArray
from pawl_server.sim.trace import Trace
from pawl_workers.plan import StepResult

__all__ = ["Run", "SimulationStuckError", "Simulator", "simulate"]

_NOTHING_FITS_NS = 50_000_000  # the engine's pause when sequences wait and none can be planned
_OUTPUT_WEIGHT = 2.0  # of an output token in a tenant's service, a prompt token is 1 (VTC, OSDI 2024)


class SimulationStuckError(RuntimeError):
    """Requests wait, nothing will ever happen again, and no step can be planned: the scheduler starves them."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    step: Step
    result: StepResult
    shape: StepShape
    started_ns: int
    number: int
    used_blocks: int
    blocked: bool


@dataclass(frozen=True, slots=True)
class Run:
    """A finished simulation."""

    trace: Trace
    policy: Policy
    limits: SchedulerLimits
    record: Record
    digest: str
    log: bytes
    end_ns: int


class Simulator:
    """One replica under one policy over one trace.

    Args:
        trace: what happens.
        limits: sizes of the replica.
        cost: how long steps take.
        policy: how it schedules.
        skip: skip over decode steps that are alike; changes nothing but the time this takes.
        keep: keep the decision log and every token, for comparisons.
    """

    def __init__(
        self,
        trace: Trace,
        limits: SchedulerLimits,
        cost: CostModel,
        policy: Policy,
        *,
        skip: bool = True,
        keep: bool = False,
    ) -> None:
        self._trace, self._cost, self._policy, self._skip = trace, cost, policy, skip
        self._requests = trace.requests
        self._scheduler = SimulatedScheduler(limits, policy)
        self._executor = FakeExecutor(trace.requests, limits.max_running)
        self.record = Record(trace.requests, limits.num_blocks, keep_tokens=keep)
        self._log = DecisionLog(keep=keep)
        self._agenda = Agenda()
        self._now_ns = 0
        self._inbox: list[tuple[EventKind, int, int]] = []
        self._in_flight: _InFlight | None = None
        self._num_launched = 0
        self._down_until_ns = 0
        self._timer_set = False
        self._idle_timers = 0
        self._followers: dict[int, list[int]] = defaultdict(list)
        self._samples: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(trace.requests):
            if request.sample_of >= 0:
                self._samples[request.sample_of].append(index)
            elif request.follows >= 0:
                self._followers[request.follows].append(index)
            else:
                self._agenda.put(nanoseconds(request.arrival_s), EventKind.ARRIVAL, index)
        for number, fault in enumerate(trace.faults):
            self._agenda.put(nanoseconds(fault.at_s), EventKind.FAULT, number)

    def run(self) -> Run:
        """Run to the end of the trace.

        Raises:
            SimulationStuckError: something waits that nothing will ever start.
        """
        while self._agenda:
            now_ns, kind, argument = self._agenda.take()
            self._now_ns = max(self._now_ns, now_ns)
            if kind <= EventKind.ABORT:
                self._inbox.append((kind, argument, now_ns))
                if self._in_flight is None:
                    self._tick()
            elif kind == EventKind.STEP_DONE:
                if self._in_flight is not None and argument == self._in_flight.number:
                    self._settle(self._in_flight)
                    self._tick()
            elif kind == EventKind.FAULT:
                self._lose_worker(argument)
            else:
                self._timer_set = False
                if self._in_flight is None:
                    self._tick()
        if self._scheduler.num_running or self._scheduler.num_waiting:
            raise SimulationStuckError(f"{self._scheduler.num_waiting} requests wait and nothing will happen")
        return Run(
            self._trace, self._policy, self._scheduler.limits, self.record, self._log.digest(), self._log.kept,
            self._now_ns,
        )  # fmt: skip

    def _tick(self) -> None:
        """The engine's tick up to its await: drain, plan, launch."""
        if self._now_ns < self._down_until_ns:
            self._set_timer(self._down_until_ns)
            return
        self._drain()
        started = time.perf_counter()
        step = self._scheduler.plan(self._now_ns / 1e9)
        self.record.scheduler_s += time.perf_counter() - started
        if step is None:
            self._wait()
            return
        self._idle_timers = 0
        self._log.step(step.wire, self._now_ns)
        result, shape = self._executor.execute(step.wire)
        self._num_launched += 1
        scheduler = self._scheduler
        blocked = not step.wire.new and scheduler.num_waiting > 0 and scheduler.has_free_row
        self._in_flight = _InFlight(
            step, result, shape, self._now_ns, self._num_launched, scheduler.used_blocks, blocked
        )  # fmt: skip
        self._agenda.put(self._now_ns + self._cost.nanoseconds(shape), EventKind.STEP_DONE, self._num_launched)

    def _wait(self) -> None:
        """Nothing can be planned: look again after a while if somebody waits."""
        if not self._scheduler.num_waiting:
            return
        self._idle_timers += 1
        if not self._agenda and self._idle_timers > 1_000:
            raise SimulationStuckError(
                f"{self._scheduler.num_waiting} requests wait, nothing runs and nothing can be planned"
            )
        self._set_timer(self._now_ns + _NOTHING_FITS_NS)

    def _set_timer(self, at_ns: int) -> None:
        if not self._timer_set:
            self._timer_set = True
            self._agenda.put(at_ns, EventKind.TIMER, 0)

    def _drain(self) -> None:
        inbox, self._inbox = self._inbox, []
        now_s = self._now_ns / 1e9
        for kind, index, at_ns in inbox:
            if kind == EventKind.ABORT:
                self._abort(index, now_s)
            else:
                self._arrive(index, at_ns, now_s)

    def _arrive(self, index: int, at_ns: int, now_s: float) -> None:
        samples = self._samples.get(index, [])
        refusal = self._scheduler.submit(index, self._requests[index], now_s, samples)
        for sample in (index, *samples):
            self.record.arrived_ns[sample] = at_ns
            if refusal is not None:
                self.record.refused(sample, refusal.reason, self._now_ns)
                self._log.event("refused", sample, refusal.reason, self._now_ns)
                self._release_followers(sample)
                continue
            self.record.service.waits(sample)
            abort_after_s = self._requests[sample].abort_after_s
            if abort_after_s is not None:
                self._agenda.put(at_ns + nanoseconds(abort_after_s), EventKind.ABORT, sample)

    def _abort(self, index: int, now_s: float) -> None:
        ended = self._scheduler.abort(index, now_s)
        if ended is not None:
            self.record.ended(index, ended, self._now_ns)
            self._log.event("ended", index, ended.reason.value, self._now_ns)
            self.record.service.starts(index)
            self._release_followers(index)

    def _release_followers(self, index: int) -> None:
        for follower in self._followers.pop(index, ()):
            at_ns = self._now_ns + nanoseconds(self._requests[follower].arrival_s)
            self._agenda.put(at_ns, EventKind.ARRIVAL, follower)

    def _settle(self, flight: _InFlight) -> None:
        """A step is done: commit it, keep the books, and skip those that follow and are alike."""
        self._in_flight = None
        step, shape, now_ns = flight.step, flight.shape, self._now_ns
        sampled = self._executor.requests_of(np.asarray(flight.result.rows, np.int64))
        started = time.perf_counter()
        committed = self._scheduler.commit(step, flight.result, now_ns / 1e9, (now_ns - flight.started_ns) / 1e9)
        self.record.scheduler_s += time.perf_counter() - started
        emitted = np.asarray(committed.handles, np.int64)
        self.record.emitted(emitted, committed.token_ids, now_ns)
        self.record.num_recomputed += committed.num_recomputed
        self.record.step(shape, now_ns - flight.started_ns, flight.used_blocks, blocked=flight.blocked)
        for new in step.wire.new:
            self.record.service.starts(new.sampling.seed)
        if self.record.service.shared:
            self._serve(step, sampled)
        for ended in committed.ended:
            index = int(str(ended.handle))
            self.record.ended(index, ended, now_ns)
            self._log.event("ended", index, ended.reason.value, now_ns)
            self._release_followers(index)
        if self._skip and not committed.ended and len(sampled) == len(step.wire.rows) and not self._inbox:
            self._skip_ahead(flight)

    def _serve(self, step: Step, sampled: IntArray) -> None:
        rows = np.asarray(step.wire.rows, np.int64)
        self.record.service.serve(
            np.concatenate([self._executor.requests_of(rows), sampled]),
            np.concatenate([np.asarray(step.wire.num_tokens, np.int64), np.full(len(sampled), _OUTPUT_WEIGHT - 1)]),
        )

    def _skip_ahead(self, flight: _InFlight) -> None:
        """Apply the steps that are alike and end before the next event."""
        times = self._scheduler.steps_alike(flight.step)
        if times < 1:
            return
        rows = np.asarray(flight.step.wire.rows, np.int64)
        times = min(times, self._executor.steps_before_an_end(rows))
        if times < 1:
            return
        ends_ns = self._now_ns + np.cumsum(self._cost.repeated_nanoseconds(flight.shape, times))
        if self._agenda:
            times = int(np.searchsorted(ends_ns, self._agenda.next_ns, side="left"))
            if times < 1:
                return
            ends_ns = ends_ns[:times]
        end_ns = int(ends_ns[-1])
        tokens = self._executor.repeat(rows, times)
        self._scheduler.repeat(flight.step, tokens, ends_ns, self._now_ns)
        self._log.repeat(times)
        indices = self._executor.requests_of(rows)
        self.record.emitted_alike(indices, tokens, ends_ns)
        self.record.num_skipped += times
        self.record.step(flight.shape, end_ns - self._now_ns, flight.used_blocks, blocked=flight.blocked, times=times)
        if self.record.service.shared:
            self.record.service.serve(indices, np.full(len(rows), times * _OUTPUT_WEIGHT))
        self._now_ns = end_ns

    def _lose_worker(self, number: int) -> None:
        """The worker died: what was in flight is void, and everything starts again when a new one is there."""
        flight, self._in_flight = self._in_flight, None
        epoch = self._scheduler.lose_worker(flight.step if flight else None, self._now_ns / 1e9)
        self._executor.reset(epoch)
        self._log.event("worker lost", -1, "", self._now_ns)
        back_ns = self._now_ns + nanoseconds(self._trace.faults[number].down_s)
        self._down_until_ns = max(self._down_until_ns, back_ns)
        self._tick()


def simulate(
    trace: Trace, limits: SchedulerLimits, cost: CostModel, policy: Policy, *, skip: bool = True, keep: bool = False
) -> Run:
    """Run a trace. Same arguments, same run, to the byte of its log.

    Raises:
        SimulationStuckError: a request starves.
    """
    return Simulator(trace, limits, cost, policy, skip=skip, keep=keep).run()
