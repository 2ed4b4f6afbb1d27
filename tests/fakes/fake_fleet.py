"""A fleet without processes behind a real socket: it lists what a test shows it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc

from pawl_server.engine.link.auth import TokenInterceptor
from pawl_server.internal.v1 import fleet_pb2, fleet_pb2_grpc
from tests.fakes.fake_engine import TOKEN, FakeEngine

__all__ = ["FakeFleet", "fakes"]


class FakeFleet(fleet_pb2_grpc.FleetServiceServicer):
    """Lists engines. `show` changes the list."""

    def __init__(self, model_source: str, model_id: str = "toy") -> None:
        self._source = model_source
        self._id = model_id
        self._revision = 0
        self._listing = fleet_pb2.WatchReplicasResponse()
        self._watchers: set[asyncio.Queue[fleet_pb2.WatchReplicasResponse]] = set()
        self._server: grpc.aio.Server | None = None
        self.address = ""

    async def start(self) -> FakeFleet:
        """Listen on a free port."""
        self._server = grpc.aio.server(interceptors=[TokenInterceptor(TOKEN)], options=[("grpc.so_reuseport", 0)])
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def stop(self) -> None:
        """Go away."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    def show(
        self,
        engines: Iterable[FakeEngine],
        state: fleet_pb2.ReplicaState.ValueType = fleet_pb2.REPLICA_STATE_READY,
        incarnation: int = 1,
    ) -> None:
        """List engines, all in one state."""
        listed = state in (fleet_pb2.REPLICA_STATE_READY, fleet_pb2.REPLICA_STATE_DRAINING)
        replicas = [
            fleet_pb2.Replica(
                index=engine.replica,
                incarnation=incarnation,
                state=state,
                address=engine.address if listed else "",
            )
            for engine in engines
        ]
        self._show(replicas)

    def show_address(self, address: str) -> None:
        """List one engine, ready at an address."""
        self._show([fleet_pb2.Replica(incarnation=1, state=fleet_pb2.REPLICA_STATE_READY, address=address)])

    def _show(self, replicas: Iterable[fleet_pb2.Replica]) -> None:
        self._revision += 1
        self._listing = fleet_pb2.WatchReplicasResponse(
            revision=self._revision, model_source=self._source, model_id=self._id, replicas=replicas
        )
        for watcher in self._watchers:
            watcher.put_nowait(self._listing)

    async def WatchReplicas(self, request: Any, context: Any) -> AsyncIterator[fleet_pb2.WatchReplicasResponse]:
        """The list, at once and after every change."""
        queue: asyncio.Queue[fleet_pb2.WatchReplicasResponse] = asyncio.Queue()
        self._watchers.add(queue)
        if self._revision:
            queue.put_nowait(self._listing)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)


@contextlib.asynccontextmanager
async def fakes(model_source: str, num_engines: int = 1) -> AsyncIterator[tuple[FakeFleet, list[FakeEngine]]]:
    """A fleet and its engines, all ready."""
    engines = [await FakeEngine(replica).start() for replica in range(num_engines)]
    fleet = await FakeFleet(model_source).start()
    fleet.show(engines)
    try:
        yield fleet, engines
    finally:
        await fleet.stop()
        for engine in engines:
            await engine.kill()
