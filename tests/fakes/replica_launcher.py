"""A launcher and a clock that tests drive by hand: replicas become ready, fail, die and hang when told to."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

from pawl_server.engine.spec import EngineAddresses, EngineFailed, EngineProgress, EngineSpec
from pawl_server.fleet.launcher import LaunchError

__all__ = ["FakeClock", "FakeLauncher", "FakeReplica", "settle"]


async def settle() -> None:
    """Let every task that can run now run."""
    for _ in range(50):
        await asyncio.sleep(0)


class FakeClock:
    """Monotonic seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def __call__(self) -> float:
        """The time."""
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Return once so much time has passed."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._numbers), waiting))
        await waiting

    @property
    def wakes_in(self) -> float | None:
        """Seconds until the next sleeper wakes."""
        self._sleepers = [entry for entry in self._sleepers if not entry[2].done()]
        heapq.heapify(self._sleepers)
        return self._sleepers[0][0] - self.now if self._sleepers else None

    async def advance(self, seconds: float) -> None:
        """Let time pass, waking sleepers in order."""
        await settle()
        end = self.now + seconds
        while self._sleepers and self._sleepers[0][0] <= end:
            time, _, waiting = heapq.heappop(self._sleepers)
            self.now = max(self.now, time)
            if not waiting.done():
                waiting.set_result(None)
            await settle()
        self.now = end
        await settle()


class FakeReplica:
    """A replica that serves until told otherwise."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stopped_with: float | None = None
        self.kills = 0

    @property
    def addresses(self) -> EngineAddresses:
        """Different for every incarnation."""
        port = 1000 * (self.spec.replica + 1) + self.spec.incarnation
        return EngineAddresses(address=f"127.0.0.1:{port}", metrics_address=f"127.0.0.1:{port + 500}", process_id=port)

    async def died(self) -> str:
        """Wait for `death`."""
        return await asyncio.shield(self.death)

    async def stop(self, grace_s: float) -> None:
        """Note it."""
        self.stopped_with = grace_s

    async def kill(self) -> None:
        """Count it."""
        self.kills += 1


class FakeLauncher:
    """Each start waits for `become_ready` or `fail`, unless `automatic`."""

    def __init__(self, *, automatic: bool = False) -> None:
        self.automatic = automatic
        self.specs: list[EngineSpec] = []
        self.replicas: list[FakeReplica] = []
        self.progress: Callable[[EngineProgress], None] | None = None
        self.num_cancelled = 0
        self._starts: dict[int, asyncio.Future[None]] = {}

    async def start(self, spec: EngineSpec, on_progress: Callable[[EngineProgress], None]) -> FakeReplica:
        """See ReplicaLauncher."""
        self.specs.append(spec)
        self.progress = on_progress
        if not self.automatic:
            waiting = self._starts[spec.replica] = asyncio.get_running_loop().create_future()
            try:
                await waiting
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
        replica = FakeReplica(spec)
        self.replicas.append(replica)
        return replica

    async def become_ready(self, index: int = 0) -> FakeReplica:
        """Let the start of a replica succeed."""
        await settle()
        self._starts.pop(index).set_result(None)
        await settle()
        return self.replicas[-1]

    async def fail(self, index: int = 0, *, reported: bool = True, reason: str = "CHECKPOINT") -> None:
        """Let the start of a replica fail."""
        await settle()
        failure = EngineFailed(code="unavailable", reason=reason, message=f"no such folder ({reason})")
        self._starts.pop(index).set_exception(LaunchError(failure, reported=reported))
        await settle()
