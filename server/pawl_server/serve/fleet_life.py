"""A fleet from its start to its end, seen from the process that started it.

Owns the reading of its events: they fill metrics and output, and tell when every replica is ready or one can
never be.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pawl.errors import Unavailable
from pawl_server.fleet.opening import Fleet
from pawl_server.fleet.replicas import FleetEvent, ReplicaChanged, ReplicaState
from pawl_server.serve.events import Output
from pawl_server.serve.joined_metrics import FleetGauges

__all__ = ["FleetLife", "start_failed"]

log = logging.getLogger(__name__)


class FleetLife:
    """Follows a started fleet.

    Args:
        fleet: started.
        num_replicas: how many must be ready.
        gauges: filled with what happens.
        output: told of what happens.
    """

    def __init__(self, fleet: Fleet, num_replicas: int, gauges: FleetGauges, output: Output) -> None:
        self._fleet = fleet
        self._num_replicas = num_replicas
        self._gauges = gauges
        self._output = output
        self._ready: set[int] = set()
        self._all_ready = asyncio.Event()

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[asyncio.Task[None]]:
        """Follow it while the context lasts; the task ends only with an error."""
        task = asyncio.create_task(self._follow(), name="pawl-fleet-events")
        try:
            yield task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Unavailable):
                await task

    async def all_ready(self) -> None:
        """Return once every replica has been ready."""
        await self._all_ready.wait()

    async def _follow(self) -> None:
        """Read events for ever.

        Raises:
            Unavailable: a replica can never start, or the fleet is gone.
        """
        number = 0
        while True:
            batch = await self._fleet.events(number)
            number = batch.next_number
            for event in batch.events:
                self._take(event)

    def _take(self, event: FleetEvent) -> None:
        self._gauges.fleet_event(event)
        self._output.fleet_event(event)
        if not isinstance(event, ReplicaChanged):
            return
        status = event.status
        if event.gives_up:
            raise start_failed(status.index, status.detail)
        if status.state is ReplicaState.READY:
            self._ready.add(status.index)
            log.info("replica %d is ready at %s (start %d)", status.index, status.address, status.incarnation)
            if len(self._ready) == self._num_replicas:
                self._all_ready.set()
        elif status.state in (ReplicaState.DEAD, ReplicaState.BACKOFF):
            log.warning("replica %d is %s: %s", status.index, status.state, status.detail)


def start_failed(index: int, detail: str) -> Unavailable:
    """The error of a replica that can never start, with its own words."""
    return Unavailable(f"replica {index} cannot start: {detail}", reason="REPLICA_FAILED")
