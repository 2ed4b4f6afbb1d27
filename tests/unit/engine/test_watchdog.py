from __future__ import annotations

import logging
import threading

import pytest

from pawl_server.engine.watchdog import Watchdog


def test_a_hung_step_is_killed_once_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    killed = threading.Event()
    watchdog = Watchdog(0.05, killed.set)
    with caplog.at_level(logging.CRITICAL), watchdog.watch(41):
        assert killed.wait(20)
    watchdog.close()
    assert "step 41" in caplog.text
    assert len(caplog.records) == 1


def test_steps_that_return_are_left_alone() -> None:
    killed = threading.Event()
    watchdog = Watchdog(30.0, killed.set)
    for step in range(100):
        with watchdog.watch(step):
            pass
    watchdog.close()
    assert not killed.is_set()
    assert watchdog.limit_s == 30.0


def test_the_limit_follows_steps_that_are_slow_by_nature(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 10))  # each step takes 10 s
    watchdog = Watchdog(60.0, lambda: None)
    monkeypatch.setattr("pawl_server.engine.watchdog.time.monotonic", lambda: float(next(now)))
    for step in range(200):
        with watchdog.watch(step):
            pass
    monkeypatch.undo()
    watchdog.close()
    assert watchdog.limit_s == pytest.approx(200.0, rel=0.01)
