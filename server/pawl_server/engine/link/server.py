"""The engine's end of the link: one stream per front end, two calls for operators, and one for the fleet.

Owns connections, their hellos, heartbeats and writers; hands frames on to the step loop and knows nothing of
scheduling. When a stream breaks, or its front end falls silent, everything that came in through it is aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import grpc

from pawl.errors import PawlError, Unavailable
from pawl_server.addresses import host_port
from pawl_server.engine.link.auth import TokenInterceptor
from pawl_server.engine.link.frames import SequenceKey, abort_text, refused_end, to_request, to_sequence_state
from pawl_server.engine.link.outbox import Outbox
from pawl_server.engine.link.protocol import PROTOCOL_VERSION, server_options
from pawl_server.internal.v1 import engine_pb2, engine_pb2_grpc
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SequenceView

if TYPE_CHECKING:
    # Generic for the type checker alone.
    Connection = grpc.aio.ServicerContext[engine_pb2.ConnectRequest, engine_pb2.ConnectResponse]
    Context = grpc.aio.ServicerContext[object, object]

__all__ = ["EngineService", "LinkServer", "Sequences"]

log = logging.getLogger(__name__)


class Sequences(Protocol):
    """The step loop, as the link sees it. Nothing here blocks."""

    def attach(self, outbox: Outbox) -> None:
        """A connection opened; its tokens go into `outbox`."""

    def detach(self, outbox: Outbox) -> None:
        """A connection is gone: abort its sequences and forget it."""

    def submit(self, request: SequenceRequest) -> None:
        """Take a sequence at the next step, or refuse it there. The handle is a SequenceKey."""

    def abort(self, keys: Sequence[SequenceKey], reason: str) -> None:
        """End sequences at the next step; without effect on those that ended already."""

    def describe(self) -> Iterable[SequenceView]:
        """The live sequences, oldest first."""

    def stop(self) -> None:
        """End after the steps that run."""

    def flush_prefix_cache(self) -> int:
        """Empty the prefix cache of the blocks nobody uses; returns how many that were."""


class EngineService(engine_pb2_grpc.EngineServiceServicer):
    """EngineService over a step loop.

    Args:
        sequences: the step loop.
        welcome: the first frame of every connection.
        heartbeat_timeout_s: a front end silent for so long is gone.
    """

    def __init__(self, sequences: Sequences, welcome: engine_pb2.Welcome, heartbeat_timeout_s: float) -> None:
        self._sequences = sequences
        self._welcome = welcome
        self._timeout_s = heartbeat_timeout_s
        self._connections = itertools.count(1)
        self._num_received: dict[int, int] = {}

    async def Connect(  # type: ignore[override]  # noqa: N802 (gRPC names methods; a coroutine may write, too)
        self, request_iterator: AsyncIterator[engine_pb2.ConnectRequest], context: Connection
    ) -> None:
        """Serve one front end until its stream breaks."""
        frontend_id = await self._hello(context)
        outbox = Outbox(next(self._connections))
        self._sequences.attach(outbox)
        self._num_received[outbox.connection] = 0
        log.info("front end %s connected from %s", frontend_id, context.peer())
        tasks = [
            asyncio.create_task(work, name=f"connection {outbox.connection} {name}")
            for name, work in (
                ("read", self._read(context, outbox)),
                ("write", self._write(context, outbox)),
                ("watch", self._watch(outbox)),
            )
        ]
        detail = "the stream broke"
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            detail = done.pop().result()
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            detail = f"the stream broke: {type(error).__name__}"
        finally:
            context.set_code(grpc.StatusCode.ABORTED)
            context.set_details(detail)
            log.info("front end %s is gone, %d sequences are aborted: %s", frontend_id, len(outbox.handles), detail)
            self._sequences.detach(outbox)
            del self._num_received[outbox.connection]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def ListSequences(  # noqa: N802 (gRPC names methods)
        self, request: engine_pb2.ListSequencesRequest, context: Context
    ) -> engine_pb2.ListSequencesResponse:
        """The live sequences, oldest first."""
        states = [to_sequence_state(view) for view in self._sequences.describe()]
        return engine_pb2.ListSequencesResponse(sequences=states)

    async def FlushCache(  # noqa: N802 (gRPC names methods)
        self, request: engine_pb2.FlushCacheRequest, context: Context
    ) -> engine_pb2.FlushCacheResponse:
        """Empty the prefix cache of the blocks nobody uses."""
        return engine_pb2.FlushCacheResponse(freed_blocks=self._sequences.flush_prefix_cache())

    async def Stop(  # noqa: N802 (gRPC names methods)
        self, request: engine_pb2.StopRequest, context: Context
    ) -> engine_pb2.StopResponse:
        """End the engine; the answer comes before it has ended."""
        log.info("asked to end by %s", context.peer())
        self._sequences.stop()
        return engine_pb2.StopResponse()

    async def _hello(self, context: Connection) -> str:
        """Read the hello and answer it; refuses another protocol with FAILED_PRECONDITION."""
        frame = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                frame = await context.read()
        if not isinstance(frame, engine_pb2.ConnectRequest) or not frame.HasField("hello"):
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first frame must be a Hello")
        if frame.hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"front end {frame.hello.frontend_id} speaks protocol {frame.hello.protocol_version}, this"
                f" engine {PROTOCOL_VERSION}: run both from one version of pawl",
            )
        await context.write(engine_pb2.ConnectResponse(welcome=self._welcome))
        return frame.hello.frontend_id

    async def _read(self, context: Connection, outbox: Outbox) -> str:
        while True:
            frame: object = await context.read()
            if not isinstance(frame, engine_pb2.ConnectRequest):
                return "it closed the stream"
            self._num_received[outbox.connection] += 1
            match frame.WhichOneof("frame"):
                case "submit":
                    given = [frame.submit.handle, *frame.submit.sample_handles]
                    if len(set(given)) < len(given) or not outbox.handles.isdisjoint(given):
                        return f"it gave one of the handles {given} to two sequences"
                    self._submit(frame.submit, outbox)
                case "abort":
                    handles = (frame.abort.handle, *frame.abort.more_handles)
                    keys = [(outbox.connection, handle) for handle in handles]
                    self._sequences.abort(keys, abort_text(frame.abort.reason))

    def _submit(self, submit: engine_pb2.Submit, outbox: Outbox) -> None:
        try:
            vocab_size = self._welcome.model.vocab_size
            request = to_request(submit, (outbox.connection, submit.handle), vocab_size)
        except PawlError as error:
            for handle in (submit.handle, *submit.sample_handles):
                outbox.add_end(refused_end(handle, error))
            return
        outbox.handles.update((submit.handle, *submit.sample_handles))
        self._sequences.submit(request)

    async def _write(self, context: Connection, outbox: Outbox) -> str:
        while True:
            for frame in await outbox.take():
                await context.write(frame)

    async def _watch(self, outbox: Outbox) -> str:
        """Notice a silent front end. Counts ticks, so that an engine that itself stood still blames nobody."""
        seen, silent = 0, 0
        while silent < 5:
            await asyncio.sleep(self._timeout_s / 5)
            received = self._num_received[outbox.connection]
            silent = silent + 1 if received == seen else 0
            seen = received
        return f"it was silent for {self._timeout_s:g} s"


class LinkServer:
    """The listener of one engine."""

    def __init__(self, service: EngineService, token: str) -> None:
        self._server = grpc.aio.server(interceptors=[TokenInterceptor(token)], options=server_options())
        engine_pb2_grpc.add_EngineServiceServicer_to_server(service, self._server)

    async def start(self, host: str, ports: range) -> int:
        """Listen on the first free port; returns it.

        Raises:
            Unavailable: none of the ports is free, or the host is not ours.
        """
        for port in ports:
            try:
                bound = self._server.add_insecure_port(host_port(host, port))
            except RuntimeError:
                continue
            if bound:
                await self._server.start()
                return bound
        raise Unavailable(
            f"no free port for the engine on {host} in {ports.start}-{ports.stop - 1}: set engine_ports",
            reason="PORT_IN_USE",
        )

    async def stop(self, grace_s: float = 0.0) -> None:
        """Close the listener and, after the grace, every stream."""
        await self._server.stop(grace_s)
