"""When a call is tried again: pure, no waiting."""

from __future__ import annotations

import math

import pytest

from pawl import Retry
from pawl._retry import Attempts
from pawl.errors import ERROR_CLASSES, InvalidRequest, Overloaded, PawlError, StreamBroken, Unavailable
from pawl.testing import ManualClock


def delays(retry: Retry, error: PawlError, *, timeout: float = math.inf, chance: float = 0.0) -> list[float]:
    """The waits until the error is final."""
    clock = ManualClock(chance=chance)
    attempts = Attempts(retry, timeout, clock.clock)
    while (delay := attempts.next_delay(error)) is not None:
        clock.clock.sleep(delay)
    return clock.slept


def test_backoff_doubles_up_to_its_limit() -> None:
    """0.5 s to 8 s, of which chance takes at most half."""
    retry = Retry(retries=7, budget=math.inf)
    assert delays(retry, Unavailable("x"), chance=0.0) == [0.25, 0.5, 1, 2, 4, 4, 4]
    assert delays(retry, Unavailable("x"), chance=1.0) == [0.5, 1, 2, 4, 8, 8, 8]


@pytest.mark.parametrize("kind", [*ERROR_CLASSES, StreamBroken], ids=lambda kind: kind.__name__)
def test_only_unavailable_and_overloaded_are_tried_again(kind: type[PawlError]) -> None:
    """A stream that broke was delivered in part; everything else would fail again."""
    assert bool(delays(Retry(), kind("x"))) == (kind in (Unavailable, Overloaded))


def test_number_of_retries() -> None:
    """Two by default; none on request."""
    assert len(delays(Retry(), Unavailable("x"))) == 2
    assert delays(Retry(retries=0), Unavailable("x")) == []


def test_the_server_is_obeyed() -> None:
    """Never less than RetryInfo says, and more if the backoff is longer."""
    assert delays(Retry(retries=2), Overloaded("x", retry_after=3.0), chance=1.0) == [3.0, 3.0]
    assert delays(Retry(retries=2), Overloaded("x", retry_after=0.01), chance=1.0) == [0.5, 1.0]


def test_budget_bounds_all_waits() -> None:
    """A server that asks for more than the budget is not waited for at all."""
    assert delays(Retry(retries=9, budget=5.0), Overloaded("x", retry_after=2.0)) == [2.0, 2.0]
    assert delays(Retry(retries=9, budget=5.0), Overloaded("x", retry_after=5.1)) == []


def test_no_wait_beyond_the_deadline() -> None:
    """A wait that would use up the time is not begun: the error comes at once."""
    assert delays(Retry(retries=9), Overloaded("x", retry_after=2.0), timeout=5.0) == [2.0, 2.0]


def test_remaining_time_counts_waits() -> None:
    """The timeout is for the whole call; infinite means no gRPC deadline."""
    clock = ManualClock()
    attempts = Attempts(Retry(), 10.0, clock.clock)
    clock.clock.sleep(4.0)
    assert attempts.remaining() == 6.0
    clock.clock.sleep(9.0)
    assert attempts.remaining() == 0.0
    assert Attempts(Retry(), math.inf, clock.clock).remaining() is None


@pytest.mark.parametrize("name", ["retries", "first_delay", "max_delay", "budget"])
def test_bad_values_are_refused(name: str) -> None:
    """With the name of the value."""
    with pytest.raises(InvalidRequest, match=name):
        Retry(**{name: -1})
    with pytest.raises(InvalidRequest, match=name):
        Retry(**{name: math.nan})  # type: ignore[arg-type]


def test_from_a_number() -> None:
    """`retries=3` is short for `Retry(retries=3)`."""
    whole = Retry(retries=1, first_delay=2.0)
    assert Retry.of(3) == Retry(retries=3)
    assert Retry.of(None) == Retry()
    assert Retry.of(whole) is whole
