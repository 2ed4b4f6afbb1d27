"""The sync stream of a generation: events, or text alone, and the whole at the end.

Owns reading and waiting; `_assembly` has the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import grpc

from pawl._assembly import Assembly
from pawl._convert import StreamMessage
from pawl._events import Delta, Event
from pawl._transport import ServerStream
from pawl._types import Completion
from pawl.errors import PawlError

__all__ = ["Stream"]


class Stream:
    """A generation that arrives as it is made.

    Iterate over it for events, or over `text_stream` for text. Leaving the `with` block early, or `close()`,
    cancels the request and frees its KV blocks. A failure before the first delta is tried again as the
    client's `retries` say; after it `StreamBroken` is raised, with what came in `partial`.
    """

    def __init__(
        self,
        open_call: Callable[[float | None], ServerStream[StreamMessage]],
        assembly: Assembly,
        sleep: Callable[[float], None],
    ) -> None:
        self._open_call = open_call
        self._assembly = assembly
        self._sleep = sleep
        self._rpc: ServerStream[StreamMessage] | None = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        """The next event.

        Raises:
            PawlError: the stream failed, broke, or was closed before its end.
        """
        assembly = self._assembly
        while not assembly.done:
            try:
                message = next(self._open(), None)
            except grpc.RpcError as failure:
                delay = assembly.failed(failure)
                self._rpc = None
                if delay is not None:
                    self._sleep(delay)
                continue
            try:
                event = assembly.accept(message) if message is not None else assembly.exhausted()
            except PawlError:
                self._cancel()
                raise
            if event is not None:
                return event
        if assembly.error is not None:
            raise assembly.error
        raise StopIteration

    def _open(self) -> ServerStream[StreamMessage]:
        if self._rpc is None:
            self._rpc = self._open_call(self._assembly.attempts.remaining())
        return self._rpc

    @property
    def text_stream(self) -> Iterator[str]:
        """The text of the first sample, in pieces that are never empty; the events have those of all samples."""
        for event in self:
            if isinstance(event, Delta) and event.text and not event.index:
                yield event.text

    def final(self) -> Completion:
        """Read to the end; the same as `generate` returns.

        Raises:
            PawlError: the stream failed, broke, or was closed before its end.
        """
        for _ in self:
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

    def close(self) -> None:
        """Cancel the request unless it has ended. May be called from another thread, and twice."""
        self._assembly.close()
        self._cancel()

    def _cancel(self) -> None:
        if self._rpc is not None:
            self._rpc.cancel()

    def __repr__(self) -> str:
        return f"Stream({self.partial!r})"
