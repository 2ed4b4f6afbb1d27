"""One stream to its client: a message at a time, and the end of a reader that takes nothing for too long.

Owns the watch over the running write; knows nothing of what is written.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

import grpc
from google.protobuf.message import Message

from pawl.errors import Cancelled
from pawl_server.frontend.calls import Context

__all__ = ["Writer"]


class Writer:
    """Writes to one call, as an async context manager around all of it.

    A scope of its own around each message would take a tenth of a front end's time, so one timer looks after them all:
    it goes off when the oldest write it knew of could have become too long, and looks when the one that runs began.

    Args:
        context: of the call.
        limit_s: how long a message may wait for the client.
    """

    def __init__(self, context: Context, limit_s: float) -> None:
        self._context = context
        self._limit_s = limit_s
        self._begun = 0.0  # when the running write began; 0 between two
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        self._look_in(self._limit_s)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the watch.

        Raises:
            Cancelled: the reader was too slow.
        """
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError:
            text = f"the client took nothing for {self._limit_s:g} s: the stream was given up"
            raise Cancelled(text, reason="SLOW_READER") from None
        if isinstance(error, grpc.aio.InternalError):  # gRPC's word for a client that left while we were writing
            raise asyncio.CancelledError from None

    async def write(self, message: Message) -> float:
        """Send one message; returns when gRPC had taken it, `time.monotonic()`."""
        self._begun = time.monotonic()
        await self._context.write(message)
        self._begun = 0.0
        return time.monotonic()

    def _look_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        left = self._begun + self._limit_s - time.monotonic() if self._begun else self._limit_s
        if left > 0:
            self._look_in(left)
        else:
            self._scope.reschedule(asyncio.get_running_loop().time())
