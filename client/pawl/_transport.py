"""The sync client's connection: makes calls, tries again, turns failures into `PawlError`.

Owns the channel. Knows nothing of what a call means (`_core` does).
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import grpc
from google.protobuf import message

from pawl._channel import metadata, open_channel
from pawl._core import Call
from pawl._failures import from_grpc
from pawl._logging import logger
from pawl._options import Settings
from pawl._retry import Attempts, Clock

__all__ = ["ServerStream", "Transport"]

ResponseT = TypeVar("ResponseT", bound=message.Message)
ResponseT_co = TypeVar("ResponseT_co", bound=message.Message, covariant=True)
ResultT = TypeVar("ResultT")


class ServerStream(Protocol[ResponseT_co]):
    """A running call that answers with a stream."""

    def __next__(self) -> ResponseT_co:
        """The next message; raises `grpc.RpcError` if the call failed."""

    def cancel(self) -> object:
        """End the call."""


class Transport:
    """A channel and how it is used. Safe to use from several threads."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.target = settings.target
        self.clock = clock
        self._channel = open_channel(settings)
        self._metadata = metadata(settings)
        self._closed = False

    def unary(self, call: Call[ResponseT, ResultT]) -> ResultT:
        """Make a call with one response.

        Raises:
            PawlError: it failed for good.
        """
        self._check_open()
        invoke = self._channel.unary_unary(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        attempts = Attempts(call.retry, call.timeout, self.clock)
        while True:
            try:
                response: ResponseT = invoke(call.request, timeout=attempts.remaining(), metadata=self._metadata)
            except grpc.RpcError as failure:
                error = from_grpc(failure, target=self.target, method=call.method.name, timeout=call.timeout)
                delay = attempts.next_delay(error)
                if delay is None:
                    raise error from failure
                logger.info("%s to %s: %s; again in %.2f s", call.method.name, self.target, error.reason, delay)
            else:
                return call.convert(response)
            self.clock.sleep(delay)

    def open_stream(self, call: Call[ResponseT, object], timeout: float | None) -> ServerStream[ResponseT]:
        """Start a call that answers with a stream; `timeout` in seconds for this attempt."""
        self._check_open()
        invoke = self._channel.unary_stream(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        stream: ServerStream[ResponseT] = invoke(call.request, timeout=timeout, metadata=self._metadata)
        return stream

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed; make a new one")

    def close(self) -> None:
        """Close the channel; calls that still run are cancelled."""
        self._closed = True
        self._channel.close()
