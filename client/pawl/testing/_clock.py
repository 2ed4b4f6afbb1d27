"""A clock that moves only when something sleeps on it.

Owns made-up time; no test that uses it waits.
"""

from __future__ import annotations

from pawl._retry import Clock

__all__ = ["ManualClock"]


class ManualClock:
    """Time for tests of timeouts and retries: give `Client(clock=ManualClock().clock)`.

    Attributes:
        time: seconds that it shows.
        slept: every wait, in order.
        chance: what the clock's `random` answers.
    """

    def __init__(self, *, chance: float = 0.5) -> None:
        self.time = 0.0
        self.slept: list[float] = []
        self.chance = chance

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds

    async def _sleep_async(self, seconds: float) -> None:
        self._sleep(seconds)

    @property
    def clock(self) -> Clock:
        """The clock to hand to a client."""
        return Clock(
            now=lambda: self.time,
            random=lambda: self.chance,
            sleep=self._sleep,
            sleep_async=self._sleep_async,
        )
