"""A fleet inside this process: supervisor, log of events and listener, over any launcher of replicas."""

from __future__ import annotations

from collections.abc import Sequence

from pawl_server.addresses import host_port
from pawl_server.config import Config
from pawl_server.engine.spec import EngineSpec
from pawl_server.fleet.launcher import ReplicaLauncher
from pawl_server.fleet.replicas import EventBatch, EventLog
from pawl_server.fleet.service import FleetServer, FleetService
from pawl_server.fleet.specs import restart_policy, served_name
from pawl_server.fleet.supervisor import Supervisor

__all__ = ["HostedFleet"]

_EVENTS_WAIT_S = 5.0


class HostedFleet:
    """Supervisor and listener. `start`, then `stop`; made and used inside one event loop.

    Args:
        config: the settings.
        token: the shared token.
        specs: one per replica.
        launcher: starts them.
        first_incarnation: see Supervisor.

    Attributes:
        address: host:port for front ends, once started.
    """

    def __init__(
        self,
        config: Config,
        token: str,
        specs: Sequence[EngineSpec],
        launcher: ReplicaLauncher,
        first_incarnation: int,
    ) -> None:
        self._host = config.fleet.fleet_host
        self._events = EventLog()
        policy = restart_policy(config)
        self._supervisor = Supervisor(specs, launcher, policy, self._events, first_incarnation=first_incarnation)
        self._server = FleetServer(FleetService(self._supervisor, config.model.model, served_name(config)), token)
        self.address = ""

    async def start(self, port: int) -> None:
        """Listen, on any free port if it is 0, and begin to start the replicas.

        Raises:
            Unavailable: the port is in use.
        """
        self.address = host_port(self._host, await self._server.start(self._host, port))
        self._supervisor.start()

    async def events(self, number: int, timeout_s: float = _EVENTS_WAIT_S) -> EventBatch:
        """Events from `number` on; may be none after a while."""
        return await self._events.after(number, timeout_s)

    async def stop(self, grace_s: float) -> None:
        """Stop replicas and listener; nothing is left on return."""
        await self._supervisor.stop(grace_s)
        await self._server.stop()
