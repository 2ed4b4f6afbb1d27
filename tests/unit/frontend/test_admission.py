"""Who is refused at the door, and that an operator can see it."""

from __future__ import annotations

import logging

import pytest

from pawl.errors import Overloaded
from pawl_server.frontend.admission import Admission
from pawl_server.frontend.auth import Principal


def test_the_log_says_once_a_minute_whom_and_why(caplog: pytest.LogCaptureFixture) -> None:
    """A flood of refusals is no flood of lines; what was not told at once is counted in the next line."""
    now = 0.0
    admission = Admission(2, clock=lambda: now)
    greedy, modest = Principal("greedy", max_concurrent=1), Principal("modest")

    def refused(principal: Principal, name: str) -> str:
        with pytest.raises(Overloaded) as caught:
            admission.admit(principal, name)
        return caught.value.reason

    with caplog.at_level(logging.WARNING, "pawl_server"):
        admission.admit(greedy, "a")
        assert [refused(greedy, f"b{number}") for number in range(5)] == ["CONCURRENCY"] * 5
        admission.admit(modest, "c")
        assert [refused(modest, "d"), refused(greedy, "e")] == ["QUEUE_FULL"] * 2
        now = 59.9
        refused(modest, "f")
        assert len(caplog.messages) == 3
        now = 60.0
        refused(modest, "g")
    said = [(text.partition(":")[0], int(text.split()[2]), text.rpartition(" ")[2]) for text in caplog.messages]
    assert said == [
        ("tenant 'greedy'", 1, "CONCURRENCY"),
        ("tenant 'modest'", 1, "QUEUE_FULL"),
        ("tenant 'greedy'", 1, "QUEUE_FULL"),
        ("tenant 'modest'", 2, "QUEUE_FULL"),
    ]
