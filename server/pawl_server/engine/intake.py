"""From what front ends send to the scheduler: arrivals, aborts, and requests whose grammar had to be compiled first.

Owns their order between two ticks, and that nothing a request trips over here hurts another one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pawl.errors import PawlError
from pawl_server.engine.grammar.constraint import Constraint
from pawl_server.engine.grammar.gate import Released
from pawl_server.engine.grammar.grammars import Grammars
from pawl_server.engine.link.delivery import Delivery
from pawl_server.engine.link.frames import SequenceKey
from pawl_server.engine.suspects import Suspects
from pawl_server.scheduler.admission import Refusal, refuse
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState, SequenceView

__all__ = ["Intake"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Abort:
    keys: Sequence[SequenceKey]
    reason: str


class Intake:
    """What came since the last tick.

    Args:
        state: takes the requests; what its limits never let run is refused before its grammar is looked at.
        delivery: is told of ends and refusals.
        suspects: forget who is gone.
        grammars: compiles constraints; None = no request may have one.
        wake: called when there is something to drain.
    """

    def __init__(
        self,
        state: SchedulerState,
        delivery: Delivery,
        suspects: Suspects,
        grammars: Grammars | None,
        wake: Callable[[], None],
    ) -> None:
        self._state = state
        self._delivery, self._suspects = delivery, suspects
        self._gate = None if grammars is None else grammars.gate
        self._wake = wake
        self._inbox: list[SequenceRequest | _Abort | Released] = []

    @property
    def pending(self) -> bool:
        """Whether there is something to drain."""
        return bool(self._inbox)

    @property
    def num_new(self) -> int:
        """Requests to be drained."""
        return sum(not isinstance(event, _Abort) for event in self._inbox)

    @property
    def num_held(self) -> int:
        """Sequences whose grammar is being compiled."""
        return 0 if self._gate is None else len(self._gate)

    def describe(self, now: float) -> list[SequenceView]:
        """Requests whose grammar is being compiled."""
        return [] if self._gate is None else [held.describe(now) for held in self._gate.held()]

    def submit(self, request: SequenceRequest) -> None:
        """Take a request at the next tick."""
        self._put(request)

    def abort(self, keys: Sequence[SequenceKey], reason: str) -> None:
        """End sequences at the next tick, all at once."""
        self._put(_Abort(keys, reason))

    def _put(self, event: SequenceRequest | _Abort | Released) -> None:
        self._inbox.append(event)
        self._wake()

    def drain(self, now: float) -> None:
        """Hand on everything, in the order in which it came."""
        inbox, self._inbox = self._inbox, []
        for event in inbox:
            if isinstance(event, _Abort):
                self._end(event, now)
            elif isinstance(event, Released):
                self._release(event, now)
            else:
                self._take(event, now)

    def _end(self, event: _Abort, now: float) -> None:
        for key in reversed(event.keys):  # of a group, those that are parked go before the one they wait for
            ended = self._state.abort(key, event.reason, now)
            if ended is None and self._gate is not None:
                ended = self._gate.abort(key, event.reason)
            if ended is not None:
                self._suspects.gone([key])
                self._delivery.ended(ended)

    def _take(self, request: SequenceRequest, now: float) -> None:
        constraint = request.constraint
        refusal = self._hold(request, constraint, now) if isinstance(constraint, Constraint) else self._to(request, now)
        if refusal is not None:
            for handle in request.handles:
                self._delivery.refused(handle, refusal)

    def _hold(self, request: SequenceRequest, constraint: Constraint, now: float) -> Refusal | None:
        """Let a request wait for its grammar, unless it can never run or its grammar is there."""
        if self._gate is None:
            return Refusal("invalid_request", "NO_TOKENIZER", constraint.field, "this engine keeps no constraint", {})
        refusal = refuse(request, self._state.limits, self._state.num_waiting + len(self._gate))
        if refusal is not None:
            return refusal
        ready = self._gate.hold(request, constraint, now, self._put)
        return None if ready is None else self._to(ready, now)

    def _release(self, released: Released, now: float) -> None:
        """A request waited for its grammar: it goes on, but for samples that were aborted meanwhile."""
        held, outcome = released.held, released.outcome
        if isinstance(outcome, PawlError):
            field = outcome.violations[0].field if outcome.violations else ""
            refusal: Refusal | None = Refusal(outcome.code, outcome.reason, field, outcome.message, {})
        else:
            refusal = self._to(outcome, now)
        for handle in held.handles:
            if handle in held.aborted:
                self._state.abort(handle, held.aborted[handle], now)
            elif refusal is not None:
                self._delivery.refused(handle, refusal)

    def _to(self, request: SequenceRequest, now: float) -> Refusal | None:
        """Hand a request to the scheduler. One that trips over a defect there is refused and hurts nobody else."""
        try:
            return self._state.submit(request, now)
        except Exception:
            log.exception("request %s: the scheduler failed to take it", request.request_id)
            return Refusal("internal", "SCHEDULER_FAILED", "", "the engine failed to take the request", {})
