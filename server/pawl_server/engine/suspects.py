"""After a crashed step: who may have caused it, and how to find out without hurting the others.

Owns the strikes and the probation; reads the scheduler's tables and writes none. A crashed step leaves no
trace in the state, so whoever caused it crashes again at its next step. On probation the sequences come back one
at a time, so that a step holds at most one that has not proven itself; when that step crashes too, it was that one.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Iterable

from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.state import SchedulerState

__all__ = ["CRASH_WINDOW_S", "MAX_CRASHES", "Suspects", "probation_limits"]

MAX_CRASHES = 16
CRASH_WINDOW_S = 60.0
_STRIKES_ALONE = 2  # the second crash convicts the only suspect of a step
_STRIKES_TOGETHER = 3  # of several suspects nobody knows who it was; they get one chance more


class Suspects:
    """Strikes of live sequences: crashed steps since the last good one."""

    def __init__(self) -> None:
        self._strikes: dict[Hashable, int] = {}
        self._proven: set[Hashable] = set()
        self._crash_times: deque[float] = deque(maxlen=MAX_CRASHES)

    @property
    def on_probation(self) -> bool:
        """Whether sequences must come back one at a time."""
        return bool(self._strikes)

    def crashed(self, members: Iterable[Hashable]) -> list[Hashable]:
        """A step with these sequences crashed; returns those that must fail."""
        listed = list(members)
        suspects = [member for member in listed if member not in self._proven] or listed
        enough = _STRIKES_ALONE if len(suspects) == 1 else _STRIKES_TOGETHER
        for suspect in suspects:
            self._strikes[suspect] = self._strikes.get(suspect, 0) + 1
        return [suspect for suspect in suspects if self._strikes[suspect] >= enough]

    def proved(self, handles: Iterable[Hashable]) -> None:
        """These had a good step that brought them up to date. Call it on probation alone."""
        for handle in handles:
            self._proven.add(handle)
            self._strikes.pop(handle, None)
        self._settle()

    def gone(self, handles: Iterable[Hashable]) -> None:
        """These ended, whatever the reason."""
        for handle in handles:
            self._proven.discard(handle)
            self._strikes.pop(handle, None)
        self._settle()

    def crash_storm(self, now: float) -> bool:
        """Count a crash; True when the last MAX_CRASHES came within CRASH_WINDOW_S: the worker is broken."""
        self._crash_times.append(now)
        return len(self._crash_times) == MAX_CRASHES and now - self._crash_times[0] < CRASH_WINDOW_S

    def _settle(self) -> None:
        if not self._strikes:
            self._proven.clear()


def probation_limits(state: SchedulerState, limits: SchedulerLimits) -> SchedulerLimits:
    """Limits under which a step holds the sequences that run already and at most one that starts.

    The budget is exactly what they take: one token for each that decodes, and a chunk of the one in mid-prompt
    or, when there is none, of the head of the queue.
    """
    wants = [sequence.want for sequence in state.running.values()]
    behind = next((want for want in wants if want > 1), 0)
    head = state.queue.head()
    chunk = behind or (0 if head is None else head.num_tokens)
    budget = sum(want == 1 for want in wants) + min(chunk, limits.max_prefill_chunk)
    return dataclasses.replace(
        limits,
        max_batch_tokens=max(1, min(budget, limits.max_batch_tokens)),
        max_running=1,  # the rows bound it, not this; it must not exceed the budget
        max_partial_prefills=1,
        max_drafts=0,
    )
