"""A front end's view of the fleet: the last list of replicas, kept while the fleet is away.

Owns the connection and its reconnects; knows neither engines nor routing. Imports no torch and no Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc

from pawl.errors import PawlError, Unauthenticated, Unavailable
from pawl_server.engine.link.auth import token_metadata
from pawl_server.internal.v1 import fleet_pb2, fleet_pb2_grpc

__all__ = ["FleetWatch"]

log = logging.getLogger(__name__)

_RETRY_FIRST_S = 0.1
_RETRY_LONGEST_S = 2.0
_CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A fleet that was started again is tried at our pace, not after gRPC's own growing wait.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


class FleetWatch:
    """Follows a fleet, as an async context manager.

    Args:
        address: host:port of the fleet.
        token: the shared token.
        frontend_id: id of this process, for the fleet's log.
        on_change: called in the event loop with every list; must not block.

    Attributes:
        view: the latest list; None before the first.
        connected: whether the fleet can be heard now.
    """

    def __init__(
        self,
        address: str,
        token: str,
        frontend_id: str,
        on_change: Callable[[fleet_pb2.WatchReplicasResponse], None] | None = None,
    ) -> None:
        self.address = address
        self.view: fleet_pb2.WatchReplicasResponse | None = None
        self.connected = False
        self._token = token
        self._frontend_id = frontend_id
        self._on_change = on_change
        self._first: asyncio.Future[fleet_pb2.WatchReplicasResponse] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin to watch; does not wait for the fleet."""
        self._task = asyncio.create_task(self._watch(), name="pawl-fleet-watch")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._first.cancel()

    async def first(self, timeout_s: float) -> fleet_pb2.WatchReplicasResponse:
        """The first list.

        Raises:
            Unauthenticated: the fleet does not accept the token.
            Unavailable: it did not answer in time.
        """
        try:
            return await asyncio.wait_for(asyncio.shield(self._first), timeout_s)
        except TimeoutError:
            raise Unavailable(
                f"no fleet answers at {self.address} within {timeout_s:g} s: is `pawl fleet` running there?",
                reason="FLEET_UNREACHABLE",
            ) from None

    async def _watch(self) -> None:
        wait_s = _RETRY_FIRST_S
        complained = False
        async with grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS) as channel:
            stub = fleet_pb2_grpc.FleetServiceStub(channel)
            while True:
                try:
                    await self._follow(stub)
                    problem = "it ended the stream"
                except grpc.aio.AioRpcError as error:
                    problem = f"{error.code().name}: {error.details()}"
                    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                        self._refused(Unauthenticated(f"the fleet at {self.address} refused: {problem}"))
                if self.connected:
                    wait_s, complained = _RETRY_FIRST_S, False
                self.connected = False
                if not complained:
                    kept = "" if self.view is None else "; its last list stays"
                    log.warning("the fleet at %s is away (%s)%s", self.address, problem, kept)
                complained = True
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, _RETRY_LONGEST_S)

    async def _follow(self, stub: fleet_pb2_grpc.FleetServiceAsyncStub) -> None:
        request = fleet_pb2.WatchReplicasRequest(frontend_id=self._frontend_id)
        async for response in stub.WatchReplicas(request, metadata=token_metadata(self._token)):
            self.connected = True
            self.view = response
            if not self._first.done():
                self._first.set_result(response)
            if self._on_change is not None:
                self._on_change(response)

    def _refused(self, error: PawlError) -> None:
        if not self._first.done():
            self._first.set_exception(error)
            self._first.exception()  # seen: nobody may be waiting for it
