"""The fleet of a Ray of our own: inside `pawl serve`, which starts that Ray and takes it along when it ends.

An actor of its own would outlive nothing, and Ray would wake its main thread a hundred times a second
(docs/decisions/0015). Ray places, starts and watches the replicas; no token passes here.
"""

from __future__ import annotations

import asyncio
import logging

from pawl.errors import Unavailable
from pawl_server.config import Config
from pawl_server.fleet.hosted_fleet import HostedFleet
from pawl_server.fleet.ray_replica import RayLauncher
from pawl_server.fleet.ray_session import RaySession, gpus_per_replica
from pawl_server.fleet.replicas import EventBatch
from pawl_server.fleet.specs import engine_specs, memory_share, num_cores

__all__ = ["OwnRayFleet"]

log = logging.getLogger(__name__)

_STOP_S = 10.0


class OwnRayFleet:
    """A fleet over a local Ray. `start`, then `stop`.

    Args:
        config: the settings.
        token: the shared token.
        first_incarnation: see Supervisor.
    """

    kind = "Ray"

    def __init__(self, config: Config, token: str, first_incarnation: int = 1) -> None:
        self._config = config
        self._token = token
        self._first_incarnation = first_incarnation
        self._session = RaySession(config)
        self._hosted: HostedFleet | None = None
        self.address = ""

    async def start(self) -> None:
        """Start Ray, listen, and begin to start the replicas.

        Raises:
            Unavailable: Ray cannot be started, or the fleet's port is in use.
        """
        await self._session.open()
        config = self._config
        cores = max(1, num_cores() // config.fleet.replicas)
        specs = engine_specs(config, self._token, cores, memory_bytes=memory_share(config))
        gpus = await asyncio.to_thread(gpus_per_replica, config)
        launcher = RayLauncher("pawl-fleet", config.fleet.cpus_per_replica, gpus)
        self._hosted = HostedFleet(config, self._token, specs, launcher, self._first_incarnation)
        await self._hosted.start(config.fleet.fleet_port)
        self.address = self._hosted.address

    async def events(self, number: int) -> EventBatch:
        """Events from `number` on; may be none after a while.

        Raises:
            Unavailable: the fleet is not started.
        """
        if self._hosted is None:
            raise Unavailable("the fleet is not started", reason="FLEET_LOST")
        return await self._hosted.events(number)

    async def stop(self, grace_s: float) -> None:
        """Stop the replicas and Ray. Nothing is left on return."""
        await self._session.settle()
        try:
            if self._hosted is not None:
                async with asyncio.timeout(grace_s + _STOP_S):
                    await self._hosted.stop(grace_s)
        except TimeoutError:
            log.warning("the replicas did not stop in %.0f s; they end with Ray", grace_s + _STOP_S)
        finally:
            await self._session.close()
