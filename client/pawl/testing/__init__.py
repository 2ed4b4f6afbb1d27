"""For tests of programs that use pawl: a server without a model, and a clock that does not wait.

from pawl import Client
from pawl.testing import FakeServer

def test_answer() -> None:
    with FakeServer(reply="Paris.") as server, Client(server.target) as client:
        assert client.generate("The capital of France is").text == "Paris."
"""

from __future__ import annotations

from pawl.testing._clock import ManualClock
from pawl.testing._server import FakeServer
from pawl.testing._state import ReceivedCall

__all__ = ["FakeServer", "ManualClock", "ReceivedCall"]
