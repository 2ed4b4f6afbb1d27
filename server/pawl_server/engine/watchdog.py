"""Notices a step that does not come back: the one detector that sees a hung rank.

Owns the clock of the running step and the decision to die; rebuilding is the fleet's matter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["HUNG_EXIT_CODE", "Watchdog"]

log = logging.getLogger(__name__)

HUNG_EXIT_CODE = 70
_EWMA_WEIGHT = 0.05
_EWMA_FACTOR = 20.0


def _exit() -> None:
    os._exit(HUNG_EXIT_CODE)  # the hung thread holds locks: an orderly exit would wait for it


class Watchdog:
    """Kills the process when a step takes longer than max(`step_timeout_s`, 20 x its usual time).

    Counts ticks of its own thread, so a machine that slept does not look like a step that hangs.

    Args:
        step_timeout_s: least time that a step is given, seconds.
        kill: what to do then; ends the process unless a test says otherwise.
    """

    def __init__(self, step_timeout_s: float, kill: Callable[[], None] = _exit) -> None:
        self._timeout_s = step_timeout_s
        self._kill = kill
        self._tick_s = min(0.5, step_timeout_s / 8)
        self._running: tuple[int, float] | None = None  # step and its limit; replaced whole, never changed
        self._usual_s = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pawl-watchdog", daemon=True)
        self._thread.start()

    @property
    def limit_s(self) -> float:
        """What the next step is given, seconds."""
        return max(self._timeout_s, _EWMA_FACTOR * self._usual_s)

    @contextlib.contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Watch over the body: one step, or one reset."""
        started = time.monotonic()
        self._running = (step, self.limit_s)
        try:
            yield
        finally:
            self._running = None
            self._usual_s += _EWMA_WEIGHT * (time.monotonic() - started - self._usual_s)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, elapsed_s = None, 0.0
        while not self._closed.wait(self._tick_s):
            running = self._running
            elapsed_s = elapsed_s + self._tick_s if running is not None and running is seen else 0.0
            seen = running
            if running is not None and elapsed_s > running[1]:
                log.critical(
                    "step %d did not come back in %.1f s (limit %.1f s): the worker hangs, this replica ends",
                    running[0], elapsed_s, running[1],
                )  # fmt: skip
                self._kill()
                return
