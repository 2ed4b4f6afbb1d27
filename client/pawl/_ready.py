"""Waiting until a server is ready, by `grpc.health.v1`.

Owns the rules of the wait; the clients do the asking and the sleeping.
"""

from __future__ import annotations

import math

from google.protobuf import wrappers_pb2

from pawl import _methods
from pawl._core import Call
from pawl._options import Settings
from pawl._retry import Clock, Retry
from pawl.errors import DeadlineExceeded, Overloaded, PawlError, Unavailable

__all__ = ["ReadyWait", "health_call"]

_FIRST_DELAY_S = 0.05
_MAX_DELAY_S = 1.0
_ATTEMPT_S = 5.0


def health_call(settings: Settings, service: str, timeout: float) -> Call[wrappers_pb2.Int32Value, bool]:
    """Ask once whether a service serves; empty is the server as a whole."""

    def convert(answer: wrappers_pb2.Int32Value) -> bool:
        return answer.value == _methods.HEALTH_SERVING

    request = wrappers_pb2.StringValue(value=service)
    return Call(_methods.HEALTH_CHECK, request, convert, min(timeout, settings.timeout), Retry(retries=0))


class ReadyWait:
    """One wait: how long the next question may take, and how long to wait after it."""

    def __init__(self, target: str, timeout: float, clock: Clock) -> None:
        self._target = target
        self._timeout = timeout
        self._clock = clock
        self._deadline = clock.now() + timeout
        self._delay = _FIRST_DELAY_S
        self._last = "it answered that it does not serve yet"

    def attempt_timeout(self) -> float:
        """Seconds for the next question."""
        return max(0.001, min(_ATTEMPT_S, self._deadline - self._clock.now()))

    def note(self, error: PawlError) -> None:
        """A question failed.

        Raises:
            PawlError: waiting cannot help.
        """
        if not isinstance(error, Unavailable | DeadlineExceeded | Overloaded):
            raise error
        self._last = error.message

    def next_delay(self) -> float:
        """Seconds to wait before the next question.

        Raises:
            Unavailable: the time is over.
        """
        left = self._deadline - self._clock.now()
        if left <= 0:
            raise Unavailable(
                f"{self._target} was not ready within {self._timeout:.3g} s: {self._last}", reason="NOT_READY"
            )
        delay = min(self._delay, left) if math.isfinite(left) else self._delay
        self._delay = min(_MAX_DELAY_S, self._delay * 2)
        return delay
