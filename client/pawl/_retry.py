"""When a failed call is tried again, and how long to wait before.

Owns the decision; the transports do the waiting. Time and chance come from a `Clock`, so tests need neither.
Source of the backoff: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015 ("equal jitter").
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pawl.errors import FieldViolation, InvalidRequest, PawlError

__all__ = ["Attempts", "Clock", "Retry"]


@dataclass(frozen=True, slots=True)
class Clock:
    """Where time and chance come from.

    Attributes:
        now: seconds of a clock that never goes back.
        random: uniform in [0, 1).
        sleep: waits, for the sync client.
        sleep_async: waits, for the async client.
    """

    now: Callable[[], float] = time.monotonic
    random: Callable[[], float] = random.random
    sleep: Callable[[float], None] = time.sleep
    sleep_async: Callable[[float], Awaitable[None]] = asyncio.sleep


@dataclass(frozen=True, slots=True)
class Retry:
    """How a call that met `Unavailable` or `Overloaded` is tried again. No other error is.

    Attributes:
        retries: most further attempts after the first; 0 turns trying again off.
        first_delay: longest wait before the second attempt, doubled for each further one.
        max_delay: longest wait that doubling leads to.
        budget: most seconds that the waits of one call may add up to; a server that asks for more is not
            waited for, and its error is raised at once.
    """

    retries: int = 2
    first_delay: float = 0.5
    max_delay: float = 8.0
    budget: float = 60.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not value >= 0:
                what = f"is {value}; give 0 or more"
                raise InvalidRequest(f"{name} {what}", violations=[FieldViolation(name, what)])

    @classmethod
    def of(cls, value: int | Retry | None) -> Retry:
        """From what a caller gives: a number of retries, the whole, or nothing for the defaults."""
        if value is None:
            return cls()
        return value if isinstance(value, Retry) else cls(retries=value)

    def delay(self, retry: int, retry_after: float | None, chance: float) -> float:
        """Seconds to wait before a retry.

        Args:
            retry: number of the retry, from 0.
            retry_after: what the server asked for; never less is waited.
            chance: in [0, 1); half of the backoff is drawn by it, so that callers spread out.
        """
        backoff = min(self.max_delay, self.first_delay * 2.0**retry)
        return max(retry_after or 0.0, backoff * (0.5 + 0.5 * chance))


class Attempts:
    """The attempts of one call: how long the next may take, and whether there is a next.

    Args:
        retry: the rules.
        timeout: seconds for the whole call, waits included; infinite for none.
        clock: where time comes from.
    """

    def __init__(self, retry: Retry, timeout: float, clock: Clock) -> None:
        self._retry = retry
        self._clock = clock
        self._deadline = clock.now() + timeout
        self._waited = 0.0
        self.num_failed = 0

    def remaining(self) -> float | None:
        """Seconds left, as a gRPC deadline: None for no limit."""
        left = self._deadline - self._clock.now()
        return None if math.isinf(left) else max(0.0, left)

    def next_delay(self, error: PawlError) -> float | None:
        """Seconds to wait before the next attempt; None if this error is final."""
        retry = self.num_failed
        self.num_failed += 1
        if not error.retryable or retry >= self._retry.retries:
            return None
        delay = self._retry.delay(retry, error.retry_after, self._clock.random())
        left = self.remaining()
        if self._waited + delay > self._retry.budget or (left is not None and delay >= left):
            return None
        self._waited += delay
        return delay
