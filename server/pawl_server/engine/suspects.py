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

    def have_proven(self, handles: Iterable[Hashable]) -> bool:
        """Whether all of these had a good step since the last time that nobody was suspected."""
        return self._proven.issuperset(handles)

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


def probation_limits(limits: SchedulerLimits, *, may_start: bool) -> SchedulerLimits:
    """Limits under which a step holds the sequences that run already and at most one that starts.

    Args:
        limits: otherwise.
        may_start: whether everybody who runs has proven himself.
    """
    return dataclasses.replace(limits, max_starts=1 if may_start else 0, max_partial_prefills=1, max_drafts=0)
