"""The engine's end of the link with a script in place of an engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc

from pawl_server.engine.link.client import EngineLink
from pawl_server.engine.link.protocol import PROTOCOL_VERSION
from pawl_server.internal.v1 import engine_pb2, engine_pb2_grpc


class ScriptedEngine(engine_pb2_grpc.EngineServiceServicer):
    """Welcomes, then sends what `send` was given, in order; notes what comes."""

    def __init__(self) -> None:
        self.address = ""
        self.submits: list[engine_pb2.Submit] = []
        self.aborts: list[tuple[int, int]] = []
        self.welcome = engine_pb2.Welcome(protocol_version=PROTOCOL_VERSION)
        self._outgoing: asyncio.Queue[engine_pb2.ConnectResponse | None] = asyncio.Queue()

    def send(self, *frames: engine_pb2.ConnectResponse) -> None:
        """Send these after what was given before."""
        for frame in frames:
            self._outgoing.put_nowait(frame)

    def hang_up(self) -> None:
        """End the stream."""
        self._outgoing.put_nowait(None)

    def link(self, heartbeat_timeout_s: float = 30.0) -> EngineLink:
        """A link to it, not yet connected."""
        return EngineLink(self.address, "secret", "test", heartbeat_timeout_s)

    async def Connect(
        self,
        request_iterator: AsyncIterator[engine_pb2.ConnectRequest],
        context: object,
    ) -> AsyncIterator[engine_pb2.ConnectResponse]:
        """Serve one stream."""
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            yield engine_pb2.ConnectResponse(welcome=self.welcome)
            while (frame := await self._outgoing.get()) is not None:
                yield frame
        finally:
            reader.cancel()

    async def ListSequences(self, request: object, context: object) -> engine_pb2.ListSequencesResponse:
        """Nothing lives here."""
        return engine_pb2.ListSequencesResponse()

    async def FlushCache(self, request: object, context: object) -> engine_pb2.FlushCacheResponse:
        """Nothing is cached here."""
        return engine_pb2.FlushCacheResponse()

    async def Stop(self, request: object, context: object) -> engine_pb2.StopResponse:
        """Its test stops it."""
        return engine_pb2.StopResponse()

    async def _read(self, frames: AsyncIterator[engine_pb2.ConnectRequest]) -> None:
        async for frame in frames:
            if frame.HasField("submit"):
                self.submits.append(frame.submit)
            if frame.HasField("abort"):
                self.aborts.append((frame.abort.handle, frame.abort.reason))


@contextlib.asynccontextmanager
async def scripted_engine() -> AsyncIterator[ScriptedEngine]:
    """Listen on a free port of loopback."""
    engine = ScriptedEngine()
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServiceServicer_to_server(engine, server)
    engine.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield engine
    finally:
        await server.stop(0)
