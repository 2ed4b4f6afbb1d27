"""The life of every replica: started, watched, rebuilt after a growing wait, stopped.

Owns the state machine (STARTING -> READY -> DEAD -> BACKOFF -> STARTING; DRAINING at the end). The replica is the
unit of failure. How one is started is the launcher's business, time comes from outside, and neither Ray,
processes nor sockets are known here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from pawl_server.engine.spec import EngineAddresses, EngineFailed, EngineProgress, EngineSpec
from pawl_server.fleet.launcher import LaunchError, ReplicaLauncher, Running
from pawl_server.fleet.replicas import EventLog, ReplicaChanged, ReplicaProgress, ReplicaState, ReplicaStatus

__all__ = ["Backoff", "RestartPolicy", "Supervisor"]

log = logging.getLogger(__name__)

# A first start that crashes without a word may have met a passing trouble, so it gets this many tries.
_FIRST_START_TRIES = 3
_PROGRESS_PERIOD_S = 0.1


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a replica is started again. Seconds.

    Attributes:
        start_timeout_s: a start that takes longer is given up and tried again.
        backoff_initial_s: first wait.
        backoff_max_s: longest wait.
        stable_s: a replica that served so long is no crash loop; the next wait is the first one again.
    """

    start_timeout_s: float
    backoff_initial_s: float
    backoff_max_s: float
    stable_s: float = 60.0


class Backoff:
    """Waits that double from the first to the longest."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._failures = 0

    def next_wait(self, served_s: float) -> float:
        """Wait after a failure; `served_s` is how long the replica had served before it."""
        if served_s >= self._policy.stable_s:
            self._failures = 0
        wait = self._policy.backoff_initial_s * 2.0 ** min(self._failures, 60)
        self._failures += 1
        return min(wait, self._policy.backoff_max_s)


class _Replica:
    """One replica and its task."""

    __slots__ = ("backoff", "ever_ready", "running", "spec", "status", "task")

    def __init__(self, spec: EngineSpec, policy: RestartPolicy) -> None:
        self.spec = spec
        self.status = ReplicaStatus(index=spec.replica)
        self.backoff = Backoff(policy)
        self.running: Running | None = None
        self.ever_ready = False
        self.task: asyncio.Task[None] | None = None


class Supervisor:
    """Keeps replicas running. `start`, then `stop`; used once, inside one event loop.

    Args:
        specs: one per replica; their `incarnation` is counted here.
        launcher: starts them.
        policy: when to start them again.
        events: told of every change and of the progress of starts.
        first_incarnation: number of each replica's first start. A fleet whose front ends outlive it starts at the
            Unix time, so that no number comes twice.
        clock: monotonic seconds.
        sleep: waits for seconds.
    """

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        launcher: ReplicaLauncher,
        policy: RestartPolicy,
        events: EventLog,
        *,
        first_incarnation: int = 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._launcher = launcher
        self._policy = policy
        self._events = events
        self._first_incarnation = first_incarnation
        self._clock = clock
        self._sleep = sleep
        self._replicas = [_Replica(spec, policy) for spec in specs]
        self._changed = asyncio.Event()
        self.revision = 1

    @property
    def statuses(self) -> tuple[ReplicaStatus, ...]:
        """Every replica, by index."""
        return tuple(replica.status for replica in self._replicas)

    async def changed(self, revision: int) -> None:
        """Return as soon as `self.revision` is another than `revision`."""
        while self.revision == revision:
            # The event of the latest change; the next change makes a new one.
            await self._changed.wait()

    def start(self) -> None:
        """Begin to start every replica."""
        for replica in self._replicas:
            replica.task = asyncio.create_task(self._supervise(replica), name=f"pawl-replica-{replica.spec.replica}")

    async def stop(self, grace_s: float) -> None:
        """Stop every replica; what is not gone `grace_s` later is killed. Nothing is left on return."""
        await asyncio.gather(*(self._stop(replica, grace_s) for replica in self._replicas))

    async def _stop(self, replica: _Replica, grace_s: float) -> None:
        if replica.task is not None:
            replica.task.cancel()
            await asyncio.wait({replica.task})
        running, replica.running = replica.running, None
        if running is not None:
            self._set(replica, ReplicaState.DRAINING)
            await running.stop(grace_s)
        self._set(replica, ReplicaState.DEAD, detail="stopped")

    async def _supervise(self, replica: _Replica) -> None:
        while True:
            served_s = 0.0
            try:
                served_s, detail = await self._live_once(replica)
                reason = "died"
            except LaunchError as error:
                detail = error.failure.message
                if self._gives_up(replica, error):
                    self._set(replica, ReplicaState.DEAD, detail=_all_words(error.failure), gives_up=True)
                    return
                reason = "start_timeout" if error.failure.reason == "START_TIMEOUT" else "start_failed"
            except Exception as error:  # a defect of the launcher; the other replicas must go on
                log.exception("the launcher of replica %d failed", replica.spec.replica)
                reason, detail = "start_failed", f"{type(error).__name__}: {error}"
            wait_s = replica.backoff.next_wait(served_s)
            log.warning("replica %d: %s; next start in %.1f s", replica.spec.replica, detail, wait_s)
            self._set(replica, ReplicaState.BACKOFF, detail=detail, restart_reason=reason)
            await self._sleep(wait_s)

    def _gives_up(self, replica: _Replica, error: LaunchError) -> bool:
        tries = 1 if error.reported else _FIRST_START_TRIES
        return not replica.ever_ready and replica.status.restart_count + 1 >= tries

    async def _live_once(self, replica: _Replica) -> tuple[float, str]:
        """One life, from start to death: the seconds it served, and why it ended.

        Raises:
            LaunchError: it did not become ready.
        """
        running = await self._start(replica)
        replica.running = running
        replica.ever_ready = True
        started = self._clock()
        self._set(replica, ReplicaState.READY, addresses=running.addresses)
        detail = await running.died()
        served_s = self._clock() - started
        self._set(replica, ReplicaState.DEAD, detail=detail)
        # One process of it is dead; the others, if any, sit in a collective and cannot be drained.
        await running.kill()
        replica.running = None
        return served_s, detail

    async def _start(self, replica: _Replica) -> Running:
        """Start within the time limit; see _live_once."""
        before = replica.status
        replica.status = msgspec.structs.replace(
            before,
            incarnation=before.incarnation + 1 if before.incarnation else self._first_incarnation,
            restart_count=before.restart_count + 1 if before.incarnation else 0,
        )
        self._set(replica, ReplicaState.STARTING)
        spec = msgspec.structs.replace(replica.spec, incarnation=replica.status.incarnation)
        latest = ""
        told = -_PROGRESS_PERIOD_S

        def on_progress(progress: EngineProgress) -> None:
            nonlocal latest, told
            latest = f"{progress.step} {progress.text}".strip()
            # Thousands of tensors are read in a second; their number helps nobody.
            if progress.done != progress.total and self._clock() - told < _PROGRESS_PERIOD_S:
                return
            told = self._clock()
            self._events.append(ReplicaProgress(replica=spec.replica, incarnation=spec.incarnation, progress=progress))

        starting = asyncio.ensure_future(self._launcher.start(spec, on_progress))
        limit = asyncio.ensure_future(self._sleep(self._policy.start_timeout_s))
        try:
            await asyncio.wait({starting, limit}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _undo(starting)
            raise
        finally:
            limit.cancel()
        if not starting.done():
            await _undo(starting)
            raise LaunchError(_timed_out(self._policy.start_timeout_s, latest), reported=False)
        return starting.result()

    def _set(
        self,
        replica: _Replica,
        state: ReplicaState,
        *,
        detail: str = "",
        addresses: EngineAddresses | None = None,
        restart_reason: str = "",
        gives_up: bool = False,
    ) -> None:
        before = replica.status
        if addresses is None and state.has_address:
            addresses = EngineAddresses(
                address=before.address,
                metrics_address=before.metrics_address,
                process_id=before.process_id,
            )
        replica.status = msgspec.structs.replace(
            before,
            state=state,
            detail=detail,
            address=addresses.address if addresses else "",
            metrics_address=addresses.metrics_address if addresses else "",
            process_id=addresses.process_id if addresses else 0,
        )
        self.revision += 1
        self._events.append(ReplicaChanged(status=replica.status, restart_reason=restart_reason, gives_up=gives_up))
        self._changed.set()
        self._changed = asyncio.Event()


async def _undo(starting: asyncio.Future[Running]) -> None:
    """Cancel a start; what became ready in the same moment is killed."""
    starting.cancel()
    await asyncio.wait({starting})
    if not starting.cancelled() and starting.exception() is None:
        await starting.result().kill()


def _timed_out(limit_s: float, latest: str) -> EngineFailed:
    return EngineFailed(
        code="unavailable",
        reason="START_TIMEOUT",
        message=f"not ready {limit_s:g} s after its start (--start-timeout-s); it had got to: {latest or 'nothing'}",
    )


def _all_words(failure: EngineFailed) -> str:
    return f"{failure.message}\n{failure.detail}".strip()
