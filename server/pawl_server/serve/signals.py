"""SIGINT and SIGTERM: the first asks for an orderly end, a second one for an end at once."""

from __future__ import annotations

import asyncio
import signal
from types import TracebackType
from typing import Self

__all__ = ["StopSignals"]


class StopSignals:
    """Catches the signals while its context lasts.

    Attributes:
        stop: set by the first signal.
        at_once: set by the second.
    """

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.at_once = asyncio.Event()

    def __enter__(self) -> Self:
        """Install the handlers."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._caught)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the default handlers back."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    def _caught(self) -> None:
        if self.stop.is_set():
            self.at_once.set()
        self.stop.set()
