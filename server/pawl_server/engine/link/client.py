"""The front end's end of the link: one bidirectional stream to one engine.

Owns the connection and the handles; calls back synchronously from its read loop and knows nothing of texts, clients
or other engines. What comes for a sequence is handed to it by `open_streams`. Imports no torch, no Ray and nothing
else of the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

import grpc

from pawl.errors import Unauthenticated, Unavailable
from pawl_server.engine.link.auth import token_metadata
from pawl_server.engine.link.open_streams import OpenStreams
from pawl_server.engine.link.protocol import HEARTBEAT_PERIOD_S, PROTOCOL_VERSION, channel_options
from pawl_server.engine.link.stream import EngineStream, StreamEvents
from pawl_server.internal.v1 import engine_pb2, engine_pb2_grpc

__all__ = ["EngineLink", "EngineStream", "StreamEvents"]

log = logging.getLogger(__name__)


class EngineLink:
    """A link to one engine, as an async context manager.

    Attributes:
        welcome: what the engine said of itself.
        load: the engine's latest state; zeros before the first.
        load_time: when it came, `time.monotonic()`.
        on_cache_events: told of changes of the engine's prefix cache, from the read loop; must not block or raise.
        closed: resolves with the reason once the link is gone, by loss or by leaving the context.
    """

    def __init__(
        self,
        address: str,
        token: str,
        frontend_id: str,
        heartbeat_timeout_s: float = 5.0,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self.address = address
        self.welcome = engine_pb2.Welcome()
        self.load = engine_pb2.EngineLoad()
        self.load_time = time.monotonic()
        self.on_cache_events: Callable[[engine_pb2.CacheEvents], None] = lambda _: None
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._metadata = token_metadata(token)
        self._frontend_id = frontend_id
        self._timeout_s = heartbeat_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._streams = OpenStreams(address, self._send_abort)
        self._handles = itertools.count(1)
        self._gathered: list[int] | None = None  # aborts of a body of `joint_aborts`
        self._outgoing: asyncio.Queue[engine_pb2.ConnectRequest] = asyncio.Queue()
        self._num_received = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Connect, say hello and wait for the welcome.

        Raises:
            Unauthenticated: the engine does not accept the token.
            Unavailable: it cannot be reached, says nothing, or speaks another version.
        """
        self._channel = grpc.aio.insecure_channel(self.address, options=channel_options())
        self._stub = engine_pb2_grpc.EngineServiceStub(self._channel)
        self._call = self._stub.Connect(metadata=self._metadata)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._greet()
        except BaseException as error:
            self.closed.cancel()
            self._call.cancel()
            await self._channel.close()
            if isinstance(error, TimeoutError):
                text = f"engine {self.address} did not answer in {self._connect_timeout_s:g} s"
                raise Unavailable(text, reason="ENGINE_UNREACHABLE") from error
            if isinstance(error, grpc.aio.AioRpcError):
                raise self._refusal(error) from error
            raise
        self.load_time = time.monotonic()
        self._tasks = [
            asyncio.create_task(work, name=f"link {self.address} {name}")
            for name, work in (
                ("read", self._read()),
                ("write", self._write()),
                ("heartbeat", self._beat()),
                ("watch", self._watch()),
            )
        ]
        for task in self._tasks:
            task.add_done_callback(self._on_task_end)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the link; the engine aborts what is open, and each open stream is told that it is lost."""
        self._lose("the front end closed the link")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    def open(self, submit: engine_pb2.Submit, events: StreamEvents) -> EngineStream:
        """Send a sequence. Never blocks; sets `submit.handle`.

        Raises:
            Unavailable: the link is lost.
        """
        return self.open_samples(submit, [events])[0]

    def open_samples(self, submit: engine_pb2.Submit, events: Sequence[StreamEvents]) -> list[EngineStream]:
        """Send all samples of a request. Never blocks; sets `submit.handle` and `submit.sample_handles`.

        Args:
            submit: with a seed in `sample_seeds` for each sample but the first.
            events: whom to tell of each sample.

        Raises:
            Unavailable: the link is lost.
        """
        if self.closed.done():
            raise Unavailable(f"engine {self.address} is lost", reason="ENGINE_LOST")
        handles = [next(self._handles) for _ in events]
        submit.handle, submit.sample_handles[:] = handles[0], handles[1:]
        streams = [
            EngineStream(handle, told, 0 if place else len(submit.resume_ids), self.abort)
            for place, (handle, told) in enumerate(zip(handles, events, strict=True))
        ]
        self._streams.add(streams)
        self._outgoing.put_nowait(engine_pb2.ConnectRequest(submit=submit))
        return streams

    def abort(self, handle: int, reason: engine_pb2.AbortReason.ValueType) -> None:
        """Ask the engine to end a sequence. Never blocks; without effect when it has ended or the link is lost."""
        if self._gathered is None:
            self.abort_samples([handle], reason)
        else:
            self._gathered.append(handle)

    @contextlib.contextmanager
    def joint_aborts(self, reason: engine_pb2.AbortReason.ValueType) -> Iterator[None]:
        """What the body aborts is ended all at once, for this reason."""
        gathered: list[int] = []
        self._gathered = gathered
        try:
            yield
        finally:
            self._gathered = None
            self.abort_samples(gathered, reason)

    def abort_samples(self, handles: Sequence[int], reason: engine_pb2.AbortReason.ValueType) -> None:
        """Ask the engine to end sequences, all at once; as `abort`."""
        live = [handle for handle in handles if handle in self._streams]
        if live:
            self._send_abort(live, reason)

    @property
    def num_streams(self) -> int:
        """Sequences without an end so far."""
        return len(self._streams)

    async def list_sequences(self, timeout_s: float = 5.0) -> Sequence[engine_pb2.SequenceState]:
        """The live sequences of the engine, of every front end, oldest first.

        Raises:
            Unavailable: the engine does not answer.
        """
        request = engine_pb2.ListSequencesRequest()
        try:
            reply = await self._stub.ListSequences(request, metadata=self._metadata, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._refusal(error) from error
        return reply.sequences

    async def flush_cache(self, timeout_s: float = 5.0) -> int:
        """Empty the prefix cache of the blocks nobody uses; returns how many blocks became free.

        Raises:
            Unavailable: the engine does not answer.
        """
        request = engine_pb2.FlushCacheRequest()
        try:
            reply = await self._stub.FlushCache(request, metadata=self._metadata, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._refusal(error) from error
        return reply.freed_blocks

    async def _greet(self) -> None:
        hello = engine_pb2.Hello(protocol_version=PROTOCOL_VERSION, frontend_id=self._frontend_id)
        try:
            await self._call.write(engine_pb2.ConnectRequest(hello=hello))
            frame = await self._call.read()
        except asyncio.InvalidStateError:  # grpc.aio's word for a call that ended before the write
            frame = grpc.aio.EOF
        if not isinstance(frame, engine_pb2.ConnectResponse) or not frame.HasField("welcome"):
            code, details = await self._call.code(), await self._call.details()
            if code is grpc.StatusCode.UNAUTHENTICATED:
                raise Unauthenticated(f"engine {self.address}: {details}", reason="INTERNAL_TOKEN_INVALID")
            raise Unavailable(
                f"engine {self.address} did not welcome the front end: {code.name}: {details}",
                reason="ENGINE_UNREACHABLE",
            )
        self.welcome = frame.welcome

    def _refusal(self, error: grpc.aio.AioRpcError) -> Unavailable | Unauthenticated:
        text = f"engine {self.address}: {error.code().name}: {error.details()}"
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated(text, reason="INTERNAL_TOKEN_INVALID")
        return Unavailable(text, reason="ENGINE_UNREACHABLE")

    async def _read(self) -> None:
        try:
            while isinstance(frame := await self._call.read(), engine_pb2.ConnectResponse):
                self._num_received += 1
                self._dispatch(frame)
            code, details = await self._call.code(), await self._call.details()
            self._lose(f"engine {self.address} ended the stream: {code.name}: {details}")
        except grpc.aio.AioRpcError as error:
            self._lose(f"engine {self.address} is gone: {error.code().name}: {error.details()}")

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outgoing.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._lose(f"engine {self.address} takes nothing more: {type(error).__name__}")

    async def _beat(self) -> None:
        for sequence in itertools.count(1):
            beat = engine_pb2.FrontendHeartbeat(sequence=sequence)
            self._outgoing.put_nowait(engine_pb2.ConnectRequest(heartbeat=beat))
            await asyncio.sleep(min(HEARTBEAT_PERIOD_S, self._timeout_s / 4))

    async def _watch(self) -> None:
        """Notice an engine that hangs. Counts ticks, so that a front end that itself stood still blames nobody."""
        seen, silent = self._num_received, 0
        while silent < 5:
            await asyncio.sleep(self._timeout_s / 5)
            silent = silent + 1 if seen == self._num_received else 0
            seen = self._num_received
        self._lose(f"engine {self.address} was silent for {self._timeout_s:g} s")

    def _dispatch(self, frame: engine_pb2.ConnectResponse) -> None:
        match frame.WhichOneof("frame"):
            case "tokens":
                self._streams.on_tokens(frame.tokens)
            case "load":
                self.load = frame.load
                self.load_time = time.monotonic()
            case "end":
                self._streams.on_end(frame.end)
            case "prompt_logprobs":
                self._streams.on_prompt_logprobs(frame.prompt_logprobs)
            case "cache_events":
                self.on_cache_events(frame.cache_events)

    def _send_abort(self, handles: Sequence[int], reason: engine_pb2.AbortReason.ValueType) -> None:
        abort = engine_pb2.Abort(handle=handles[0], more_handles=handles[1:], reason=reason)
        self._outgoing.put_nowait(engine_pb2.ConnectRequest(abort=abort))

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """A task that fails as nobody expected takes the link with it: half a link would look whole."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)
            self._lose(f"the link to engine {self.address} failed: {error!r}")

    def _lose(self, detail: str) -> None:
        """The one way out: resolve `closed`, stop the tasks and tell every open stream, once."""
        if self.closed.done():
            return
        self.closed.set_result(detail)
        self._call.cancel()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        self._streams.lose(detail)
