"""What a supervisor asks of whoever starts its replicas, as processes or as actors of Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pawl_server.engine.spec import EngineAddresses, EngineFailed, EngineProgress, EngineSpec

__all__ = ["LaunchError", "OnProgress", "ReplicaLauncher", "Running"]

OnProgress = Callable[[EngineProgress], None]


class LaunchError(Exception):
    """A replica did not become ready.

    Attributes:
        failure: the root cause in the engine's own words.
        reported: whether the engine named the cause itself. It will fail the same way again; one that died
            without a word may not.
    """

    def __init__(self, failure: EngineFailed, *, reported: bool) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.reported = reported


class Running(Protocol):
    """A replica that serves."""

    @property
    def addresses(self) -> EngineAddresses:
        """Where it listens."""

    async def died(self) -> str:
        """Return, with the reason, once any process of the replica is gone."""

    async def stop(self, grace_s: float) -> None:
        """Ask it to stop, wait up to `grace_s`, then kill it. Nothing of it is left on return."""

    async def kill(self) -> None:
        """Kill what is left of it, and free what it holds."""


class ReplicaLauncher(Protocol):
    """Starts replicas."""

    async def start(self, spec: EngineSpec, on_progress: OnProgress) -> Running:
        """Start one and wait until it is ready. When cancelled, it leaves nothing behind.

        Raises:
            LaunchError: it failed or died before it was ready.
        """
