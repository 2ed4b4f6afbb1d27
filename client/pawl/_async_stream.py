"""The async stream of a generation: events, or text alone, and the whole at the end.

Owns reading and waiting; `_assembly` has the rules.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self, cast

import grpc
import grpc.aio

from pawl._assembly import Assembly
from pawl._async_transport import AsyncServerStream
from pawl._convert import StreamMessage
from pawl._events import Delta, Event
from pawl._types import Completion
from pawl.errors import PawlError

__all__ = ["AsyncStream"]


class AsyncStream:
    """A generation that arrives as it is made; the async twin of `Stream`.

    Leaving the `async with` block early, `close()`, or cancelling the task cancels the request and frees its
    KV blocks.
    """

    def __init__(
        self,
        open_call: Callable[[float | None], AsyncServerStream[StreamMessage]],
        assembly: Assembly,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._open_call = open_call
        self._assembly = assembly
        self._sleep = sleep
        self._rpc: AsyncServerStream[StreamMessage] | None = None

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            PawlError: the stream failed, broke, or was closed before its end.
        """
        assembly = self._assembly
        while not assembly.done:
            try:
                message = await self._open().read()
            except grpc.RpcError as failure:
                delay = assembly.failed(failure)
                self._rpc = None
                if delay is not None:
                    await self._sleep(delay)
                continue
            except asyncio.CancelledError:
                if assembly.error is not None:  # `close()` of another task; this task was not cancelled
                    break
                self._cancel()
                raise
            try:
                event = assembly.exhausted() if message is grpc.aio.EOF else self._accept(message)
            except PawlError:
                self._cancel()
                raise
            if event is not None:
                return event
        if assembly.error is not None:
            raise assembly.error
        raise StopAsyncIteration

    def _accept(self, message: object) -> Event | None:
        return self._assembly.accept(cast("StreamMessage", message))

    def _open(self) -> AsyncServerStream[StreamMessage]:
        if self._rpc is None:
            self._rpc = self._open_call(self._assembly.attempts.remaining())
        return self._rpc

    @property
    async def text_stream(self) -> AsyncIterator[str]:
        """The text of the first sample, in pieces that are never empty; the events have those of all samples."""
        async for event in self:
            if isinstance(event, Delta) and event.text and not event.index:
                yield event.text

    async def final(self) -> Completion:
        """Read to the end; the same as `generate` returns.

        Raises:
            PawlError: the stream failed, broke, or was closed before its end.
        """
        async for _ in self:
            pass
        return self._assembly.completion()

    @property
    def partial(self) -> Completion:
        """What has come so far."""
        return self._assembly.completion()

    @property
    def request_id(self) -> str:
        """Id of the request; empty before the start event."""
        return self._assembly.start.request_id if self._assembly.start else ""

    async def close(self) -> None:
        """Cancel the request unless it has ended. May be called twice."""
        self._assembly.close()
        self._cancel()

    def _cancel(self) -> None:
        if self._rpc is not None:
            self._rpc.cancel()

    def __repr__(self) -> str:
        return f"AsyncStream({self.partial!r})"
