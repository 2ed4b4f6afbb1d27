"""FleetService: tells front ends who is where.

Owns the listener of the fleet; reads the supervisor and changes nothing in it. Callers show the shared token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from pawl.errors import Unavailable
from pawl_server.addresses import host_port
from pawl_server.engine.link.auth import TokenInterceptor
from pawl_server.fleet.supervisor import Supervisor
from pawl_server.internal.v1 import fleet_pb2, fleet_pb2_grpc

if TYPE_CHECKING:
    # Generic for the type checker alone.
    Context = grpc.aio.ServicerContext[fleet_pb2.WatchReplicasRequest, fleet_pb2.WatchReplicasResponse]

__all__ = ["FleetServer", "FleetService"]

log = logging.getLogger(__name__)


class FleetService(fleet_pb2_grpc.FleetServiceServicer):
    """FleetService over a supervisor.

    Args:
        supervisor: whose replicas are shown.
        model_source: directory or hub id of the model.
        model_id: id under which it is served.
    """

    def __init__(self, supervisor: Supervisor, model_source: str, model_id: str) -> None:
        self._supervisor = supervisor
        self._model_source = model_source
        self._model_id = model_id

    async def WatchReplicas(  # noqa: N802 (name of the RPC)
        self, request: fleet_pb2.WatchReplicasRequest, context: Context
    ) -> AsyncIterator[fleet_pb2.WatchReplicasResponse]:
        """Send the whole list at once, and again whenever anything in it changes."""
        log.info("front end %s at %s watches", request.frontend_id, context.peer())
        while True:
            revision = self._supervisor.revision
            yield fleet_pb2.WatchReplicasResponse(
                revision=revision,
                model_source=self._model_source,
                model_id=self._model_id,
                replicas=[status.to_proto() for status in self._supervisor.statuses],
            )
            await self._supervisor.changed(revision)


class FleetServer:
    """The fleet's listener.

    Args:
        service: what it serves.
        token: what callers must show.
    """

    def __init__(self, service: FleetService, token: str) -> None:
        self._server = grpc.aio.server(
            interceptors=[TokenInterceptor(token)],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
        )
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(service, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port (0 = any free one was asked for).

        Raises:
            Unavailable: the port is in use.
        """
        try:
            bound = self._server.add_insecure_port(host_port(host, port))
        except RuntimeError as error:
            bound = 0
            log.debug("%s", error)
        if not bound:
            raise Unavailable(
                f"the fleet cannot listen on {host_port(host, port)}: the port is in use (--fleet-port)",
                reason="PORT_IN_USE",
            )
        await self._server.start()
        return bound

    async def stop(self) -> None:
        """Close the listener; watchers see their stream break."""
        await asyncio.shield(self._server.stop(grace=0))
