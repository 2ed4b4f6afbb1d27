"""What will happen in a simulation, and when: one heap of events on a clock of whole nanoseconds."""

from __future__ import annotations

import heapq
from enum import IntEnum

__all__ = ["Agenda", "EventKind", "nanoseconds"]


class EventKind(IntEnum):
    """Events at the same time happen in this order, those of a kind in the order in which they were put down."""

    ARRIVAL = 0
    ABORT = 1
    STEP_DONE = 2
    FAULT = 3
    TIMER = 4


class Agenda:
    """The events to come. True while there are some."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, EventKind, int, int]] = []  # time, kind, tie break, argument
        self._num_put = 0

    def __bool__(self) -> bool:
        return bool(self._heap)

    @property
    def next_ns(self) -> int:
        """When the next event happens. There must be one."""
        return self._heap[0][0]

    def put(self, at_ns: int, kind: EventKind, argument: int) -> None:
        """Put down that something happens; what `argument` counts depends on the kind."""
        self._num_put += 1
        heapq.heappush(self._heap, (at_ns, kind, self._num_put, argument))

    def take(self) -> tuple[int, EventKind, int]:
        """The next event: when, what, and its argument. There must be one."""
        at_ns, kind, _, argument = heapq.heappop(self._heap)
        return at_ns, kind, argument


def nanoseconds(seconds: float) -> int:
    """Seconds on the clock of the simulation."""
    return round(seconds * 1e9)
