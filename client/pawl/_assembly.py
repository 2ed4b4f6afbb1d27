"""One stream's state: what came, whether it has begun, whether it is whole, whether it may be opened again.

Owns the rules; `_stream` and `_async_stream` do the reading and the waiting. A stream has begun when its
first delta came: before that a retryable failure is tried again, after it the failure is `StreamBroken`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
from google.protobuf import message as protobuf

from pawl import _convert
from pawl._convert import StreamMessage
from pawl._core import Call
from pawl._events import Delta, End, Event, SampleEnd, Start
from pawl._failures import from_grpc
from pawl._logging import logger
from pawl._retry import Attempts, Clock
from pawl._types import Completion, Sample, TokenLogprob, Usage
from pawl.errors import Cancelled, PawlError, StreamBroken, Unavailable

__all__ = ["Assembly"]

ResponseT = TypeVar("ResponseT", bound=protobuf.Message)


@dataclass(slots=True)
class _Output:
    """What has come of one sample."""

    num_tokens: int = 0
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: SampleEnd | None = None

    def sample(self, index: int) -> Sample:
        """As callers see it."""
        return Sample(
            index=index,
            text="".join(self.text),
            finish_reason=self.end.finish_reason if self.end else None,
            stop_match=self.end.stop_match if self.end else None,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
        )


class Assembly:
    """Puts the events of a stream together.

    Args:
        call: what was asked for.
        target: where it goes, for messages.
        clock: where time comes from.
        on_complete: called once, when the end has come, with the whole completion.
    """

    def __init__(
        self,
        call: Call[ResponseT, StreamMessage],
        *,
        target: str,
        clock: Clock,
        on_complete: Callable[[Completion], None] | None = None,
    ) -> None:
        self.attempts = Attempts(call.retry, call.timeout, clock)
        self.done = False
        self.error: PawlError | None = None
        self._target = target
        self._method = call.method.name
        self._timeout = call.timeout
        self._on_complete = on_complete
        self._reset()

    def _reset(self) -> None:
        self.start: Start | None = None
        self._end: End | None = None
        self._begun = False
        self._outputs: dict[int, _Output] = {0: _Output()}

    def accept(self, message: StreamMessage) -> Event | None:
        """Take one message; None for an event that is not passed on.

        Raises:
            StreamBroken: tokens are missing or came twice.
        """
        event = _convert.event(message)
        match event:
            case Delta():
                self._begun = True
                self._add(event)
            case Start():
                self.start = event
            case SampleEnd():
                self._begun = True
                self._output(event.index).end = event
            case End():
                self._end = event
                if self._on_complete is not None:
                    self._on_complete(self.completion())
            case None:
                pass
        return event

    def _add(self, delta: Delta) -> None:
        output = self._output(delta.index)
        if delta.token_offset != output.num_tokens:
            raise self._fail(
                self._broken(
                    f"sample {delta.index} went on at token {delta.token_offset}, expected {output.num_tokens}",
                    reason="STREAM_GAP",
                )
            )
        output.num_tokens += delta.token_count
        output.text.append(delta.text)
        output.token_ids.extend(delta.token_ids)
        output.logprobs.extend(delta.logprobs)

    def _output(self, index: int) -> _Output:
        output = self._outputs.get(index)
        if output is None:
            output = self._outputs[index] = _Output()
        return output

    @property
    def _num_tokens(self) -> int:
        return sum(output.num_tokens for output in self._outputs.values())

    def exhausted(self) -> Event | None:
        """No message is left; there is no event either.

        Raises:
            StreamBroken: the end event never came.
        """
        self.done = True
        if self._end is None:
            raise self._fail(self._broken("the stream stopped without its end event", reason="STREAM_CUT"))
        return None

    def failed(self, failure: grpc.RpcError) -> float | None:
        """The call failed.

        Returns:
            Seconds to wait before the stream is opened again; None if it was complete already.

        Raises:
            PawlError: the failure is final.
        """
        if self.error is not None:
            raise self.error from failure
        if self._end is not None:
            self.done = True  # everything came; only the trailers are missing
            return None
        error = from_grpc(failure, target=self._target, method=self._method, timeout=self._timeout)
        if self.start is not None and not error.request_id:
            error.request_id = self.start.request_id
        if self._begun:
            if isinstance(error, Unavailable):
                error = self._broken(error.message, reason=error.reason, cause=error)
            raise self._fail(error) from failure
        delay = self.attempts.next_delay(error)
        if delay is None:
            raise self._fail(error) from failure
        logger.info("%s to %s: %s; again in %.2f s", self._method, self._target, error.reason, delay)
        self._reset()
        return delay

    def close(self) -> None:
        """The caller wants no more."""
        if self._end is not None:
            self.done = True
        elif not self.done:
            request_id = self.start.request_id if self.start else ""
            self._fail(Cancelled("the stream was closed before its end", reason="CLOSED", request_id=request_id))

    def _fail(self, error: PawlError) -> PawlError:
        self.done = True
        self.error = error
        return error

    def _broken(self, message: str, *, reason: str, cause: PawlError | None = None) -> StreamBroken:
        error = StreamBroken(
            f"the stream broke after {self._num_tokens} tokens: {message}",
            reason=reason,
            request_id=self.start.request_id if self.start else "",
            metadata=cause.metadata if cause else None,
            retry_after=cause.retry_after if cause else None,
        )
        error.partial = self.completion()
        return error

    def completion(self) -> Completion:
        """What has come so far, whole or not."""
        start, end = self.start, self._end
        samples = tuple(output.sample(index) for index, output in sorted(self._outputs.items()))
        first = samples[0]
        return Completion(
            text=first.text,
            finish_reason=first.finish_reason,
            stop_match=first.stop_match,
            token_ids=first.token_ids,
            logprobs=first.logprobs,
            samples=samples,
            prompt_logprobs=end.prompt_logprobs if end else (),
            usage=end.usage if end else Usage(output_tokens=self._num_tokens),
            timings=end.timings if end else None,
            request_id=start.request_id if start else "",
            model=start.model if start else "",
            seed=start.seed if start else 0,
            created=start.created if start else None,
        )
