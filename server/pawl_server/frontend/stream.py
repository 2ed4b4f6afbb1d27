"""The life of one admitted request: tokens in from its engine, text and exactly one end out to its reader.

Owns journal, text and mailbox of the request and the choice of its one end; the engine side calls back and is
never made to wait. Knows neither gRPC nor other requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from pawl.errors import PawlError, ServerError, Unavailable
from pawl.v1 import types_pb2
from pawl_server.engine.link.client import EngineStream
from pawl_server.frontend import convert
from pawl_server.frontend.calls import Call
from pawl_server.frontend.convert import Finish
from pawl_server.frontend.journal import Journal
from pawl_server.frontend.mailbox import Delta, Mailbox
from pawl_server.frontend.output_text import OutputText
from pawl_server.internal.v1 import engine_pb2

__all__ = ["Account", "RequestStream"]

log = logging.getLogger(__name__)

_END_WAIT_S = 2.0  # an engine that was told to end a sequence says so in a step; then its figures are done without

Ending = tuple[types_pb2.FinishReason.ValueType, str]
"""Finish reason and outcome."""

_CANCELLED = (types_pb2.FINISH_REASON_CANCELLED, "cancelled")
_TIME_LIMIT = (types_pb2.FINISH_REASON_TIME_LIMIT, "time_limit")
_STOP = (types_pb2.FINISH_REASON_STOP, "stop")
_NATURAL = {
    engine_pb2.END_REASON_EOS: _STOP,
    engine_pb2.END_REASON_STOP_TOKEN: _STOP,
    engine_pb2.END_REASON_MAX_TOKENS: (types_pb2.FINISH_REASON_MAX_TOKENS, "max_tokens"),
    engine_pb2.END_REASON_CONTEXT_LENGTH: (types_pb2.FINISH_REASON_CONTEXT_LENGTH, "context_length"),
}


class Account(Protocol):
    """Where a request's tokens are counted: its ticket of admission."""

    def first_token(self) -> None:
        """The request has left the queue; told once."""

    def charge(self, num_tokens: int) -> None:
        """So many new tokens were made."""

    def retry_after(self) -> float:
        """Seconds after which a refused or lost request may come back."""


class RequestStream:
    """One request at one engine. Implements `StreamEvents` of the link.

    Args:
        submit: what the engine was sent.
        text: turns its tokens into text.
        mailbox: where its reader waits.
        call: that asked for it.
        account: what its tokens are counted on.
        path: prefix of fields in an engine's refusal.

    Attributes:
        first_token: `time.monotonic()` of the first token, None before.
    """

    def __init__(
        self,
        submit: engine_pb2.Submit,
        text: OutputText,
        mailbox: Mailbox[Finish | PawlError],
        *,
        call: Call,
        account: Account,
        path: str,
    ) -> None:
        self.journal = Journal(submit)
        self.first_token: float | None = None
        self._last_token = call.arrived
        self._stop_ids = frozenset((*submit.eos_token_ids, *submit.stop_token_ids))
        self._num_prompt = len(submit.prompt_ids)
        self._least = submit.min_output_tokens
        self._text = text
        self._mailbox = mailbox
        self._call = call
        self._account = account
        self._path = path
        self._prompt_logprobs: list[engine_pb2.PositionLogprobs] = []
        self._held_stop: tuple[int, Sequence[engine_pb2.PositionLogprobs]] | None = None
        self._engine: EngineStream | None = None
        self._chosen: Ending | None = None  # an end of our own making
        self._timers: list[asyncio.TimerHandle] = []

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.journal.token_ids)

    @property
    def phase(self) -> str:
        """Where the request is, as far as this process knows: "queue" up to the first token, then "decode"."""
        return "queue" if self.first_token is None else "decode"

    def begin(self, engine: EngineStream, time_limit_s: float) -> None:
        """The request is at an engine now; it ends with TIME_LIMIT `time_limit_s` from now."""
        self._engine = engine
        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_later(max(time_limit_s, 0.0), self._on_time_limit))

    async def take(self) -> Delta | Finish:
        """The next piece of output, or how it ended. The caller bounds the wait.

        Raises:
            PawlError: the request failed; nothing follows.
        """
        taken = await self._mailbox.take()
        if isinstance(taken, PawlError):
            raise taken
        return taken

    def cancel(self) -> None:
        """End it with FINISH_REASON_CANCELLED and the text so far."""
        self._end_early(_CANCELLED, engine_pb2.ABORT_REASON_CANCELLED)

    def close(self, reason: engine_pb2.AbortReason.ValueType) -> None:
        """Nobody reads any more. Frees the engine's blocks if the request had not ended."""
        for timer in self._timers:
            timer.cancel()
        if not self._mailbox.finished:
            self._mailbox.finish(ServerError("the reader has gone", reason="READER_GONE"))
            if self._engine is not None:
                self._engine.abort(reason)

    # What the link calls. It tells `on_defect` of what escapes.

    def on_tokens(
        self, indices: Sequence[int], token_ids: Sequence[int], logprobs: Sequence[engine_pb2.PositionLogprobs]
    ) -> None:
        """New tokens."""
        if self._chosen is not None or self._mailbox.finished:
            return
        if repeats := self.journal.accept(indices, token_ids):
            token_ids, logprobs = token_ids[repeats:], logprobs[repeats:]
        self._show(token_ids, logprobs)

    def on_prompt_logprobs(self, frame: engine_pb2.PromptLogprobs) -> None:
        """Log-probabilities of a stretch of the prompt."""
        expected = len(self._prompt_logprobs) + 1
        skip = expected - frame.first_position
        if skip < 0:
            raise ValueError(f"prompt log-probabilities begin at {frame.first_position}, expected {expected}")
        self._prompt_logprobs += frame.positions[skip:]

    def on_end(self, end: engine_pb2.End) -> None:
        """The engine ended the sequence, or has not said so in time."""
        try:
            self._settle(end)
        except Exception as error:  # also called by timers, behind which nobody stands
            self.on_defect(error)

    def on_lost(self, detail: str) -> None:
        """The engine is lost."""
        if self._chosen is not None:
            self.on_end(engine_pb2.End())
            return
        self._finish(self._lost(f"the replica of this request was lost after {self.num_tokens} tokens: {detail}"))

    def on_defect(self, error: Exception) -> None:
        """A defect of ours or of the engine: end the request, log the cause once."""
        if self._mailbox.finished:
            return
        log.error("request %s: the stream failed", self._call.request_id, exc_info=error)
        text = "internal error; the server's log has the cause under this request id"
        self._finish(ServerError(text, request_id=self._call.request_id))
        if self._engine is not None:
            self._engine.abort(engine_pb2.ABORT_REASON_INTERNAL)

    def _show(self, token_ids: Sequence[int], logprobs: Sequence[engine_pb2.PositionLogprobs]) -> None:
        """Hand new tokens to the reader, up to a stop token or a stop string."""
        if not token_ids:
            return
        if self._held_stop is not None:
            raise ValueError("tokens after a stop token")
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now
            self._account.first_token()
        self._last_token = now
        self._account.charge(len(token_ids))
        pieces: list[str] = []
        for token_id in token_ids:
            if token_id in self._stop_ids and self._text.num_tokens >= self._least:
                self._held_stop = (token_id, logprobs[len(pieces) : len(pieces) + 1])
                break
            pieces.append(self._text.push(token_id))
            if self._text.stop_string is not None:
                break
        if pieces:
            self._mailbox.put(token_ids[: len(pieces)], logprobs[: len(pieces)], "".join(pieces))
        if self._text.stop_string is not None:
            del self.journal.token_ids[self._text.num_tokens :]
            self._end_early(_STOP, engine_pb2.ABORT_REASON_STOP_STRING)

    def _on_time_limit(self) -> None:
        try:
            self._end_early(_TIME_LIMIT, engine_pb2.ABORT_REASON_TIME_LIMIT)
        except Exception as error:
            self.on_defect(error)

    def _end_early(self, chosen: Ending, reason: engine_pb2.AbortReason.ValueType) -> None:
        """Choose the end here; the engine's own `End` then only brings its figures."""
        if self._chosen is not None or self._mailbox.finished:
            return
        self._chosen = chosen
        if self._engine is None:
            self.on_end(engine_pb2.End())
            return
        self._engine.abort(reason)
        self._timers.append(asyncio.get_running_loop().call_later(_END_WAIT_S, self.on_end, engine_pb2.End()))

    def _settle(self, end: engine_pb2.End) -> None:
        """Make the one end of the request out of the engine's word and our own choice."""
        if self._mailbox.finished:
            return
        chosen = self._chosen or _NATURAL.get(end.reason)
        if chosen is None:
            self._finish(self._failure(end))
            return
        if self._held_stop is not None:
            self._show_stop_token(*self._held_stop)
        tail = self._text.flush()
        if tail:
            self._mailbox.put((), (), tail)
        match = None
        if chosen is _STOP or self._text.stop_string is not None:
            chosen, match = _STOP, self._match(end)
        self._finish(self._good_finish(chosen, match, end))

    def _show_stop_token(self, token_id: int, logprobs: Sequence[engine_pb2.PositionLogprobs]) -> None:
        """The stop token itself: part of the output only if asked for, counted in any case."""
        self._held_stop = None
        if self._text.include_stop:
            self._mailbox.put((token_id,), logprobs, self._text.push(token_id))
        else:
            self._text.skip()

    def _match(self, end: engine_pb2.End) -> types_pb2.StopMatch:
        if self._text.stop_string is not None:
            return types_pb2.StopMatch(stop_string=self._text.stop_string)
        if end.reason == engine_pb2.END_REASON_EOS:
            return types_pb2.StopMatch(eos_token_id=end.stop_token_id)
        return types_pb2.StopMatch(stop_token_id=end.stop_token_id)

    def _good_finish(self, chosen: Ending, match: types_pb2.StopMatch | None, end: engine_pb2.End) -> Finish:
        now = time.monotonic()
        if not end.handle and self.first_token is not None:  # the engine did not say: our own clock has to do
            end.decode_s = self._last_token - self.first_token
        first = (self.first_token or now) - self._call.arrived
        usage = types_pb2.Usage(
            prompt_tokens=self._num_prompt,
            cached_prompt_tokens=end.cached_prompt_tokens,
            output_tokens=self.num_tokens,
        )
        times = convert.phases(now - self._call.arrived, first, end)
        return Finish(*chosen, match, usage, times, self._prompt_logprobs)

    def _failure(self, end: engine_pb2.End) -> PawlError:
        if end.reason in (engine_pb2.END_REASON_REFUSED, engine_pb2.END_REASON_FAILED):
            return convert.engine_error(end.error, self._call.request_id, self._path, self._account.retry_after())
        return self._lost(f"the replica ended the request after {self.num_tokens} tokens without a reason")

    def _lost(self, text: str) -> Unavailable:
        return Unavailable(
            text,
            reason="WORKER_LOST",
            request_id=self._call.request_id,
            metadata={"output_tokens": str(self.num_tokens)},
            retry_after=self._account.retry_after(),
        )

    def _finish(self, ending: Finish | PawlError) -> None:
        for timer in self._timers:
            timer.cancel()
        self._mailbox.finish(ending)
