"""The async client's connection: makes calls, tries again, turns failures into `PawlError`.

Owns the channel, opened by the first call because it belongs to the running event loop. Cancelling a task
cancels its call; `asyncio.CancelledError` passes through.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf import message

from pawl._channel import metadata, open_async_channel
from pawl._core import Call
from pawl._failures import from_grpc
from pawl._logging import logger
from pawl._options import Settings
from pawl._retry import Attempts, Clock

__all__ = ["AsyncServerStream", "AsyncTransport"]

ResponseT = TypeVar("ResponseT", bound=message.Message)
ResponseT_co = TypeVar("ResponseT_co", bound=message.Message, covariant=True)
ResultT = TypeVar("ResultT")


class AsyncServerStream(Protocol[ResponseT_co]):
    """A running call that answers with a stream."""

    async def read(self) -> ResponseT_co | object:
        """The next message, or `grpc.aio.EOF`; raises `grpc.aio.AioRpcError` if the call failed."""

    def cancel(self) -> bool:
        """End the call."""


class AsyncTransport:
    """A channel and how it is used, by one event loop."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.target = settings.target
        self.clock = clock
        self._settings = settings
        self._channel: grpc.aio.Channel | None = None
        self._metadata = metadata(settings)
        self._closed = False

    def _open_channel(self) -> grpc.aio.Channel:
        if self._closed:
            raise RuntimeError("this client is closed; make a new one")
        if self._channel is None:
            self._channel = open_async_channel(self._settings)
        return self._channel

    async def unary(self, call: Call[ResponseT, ResultT]) -> ResultT:
        """Make a call with one response.

        Raises:
            PawlError: it failed for good.
        """
        invoke = self._open_channel().unary_unary(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        attempts = Attempts(call.retry, call.timeout, self.clock)
        while True:
            try:
                response: ResponseT = await invoke(call.request, timeout=attempts.remaining(), metadata=self._metadata)
            except grpc.RpcError as failure:
                error = from_grpc(failure, target=self.target, method=call.method.name, timeout=call.timeout)
                delay = attempts.next_delay(error)
                if delay is None:
                    raise error from failure
                logger.info("%s to %s: %s; again in %.2f s", call.method.name, self.target, error.reason, delay)
            else:
                return call.convert(response)
            await self.clock.sleep_async(delay)

    def open_stream(self, call: Call[ResponseT, object], timeout: float | None) -> AsyncServerStream[ResponseT]:
        """Start a call that answers with a stream; `timeout` in seconds for this attempt."""
        invoke = self._open_channel().unary_stream(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        stream: AsyncServerStream[ResponseT] = invoke(call.request, timeout=timeout, metadata=self._metadata)
        return stream

    async def close(self) -> None:
        """Close the channel; calls that still run are cancelled."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()
