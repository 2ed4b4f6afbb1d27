"""The sequences that are open on a link: each is told of its tokens in order, and of its one end.

Owns the order of the tokens and what happens to a sequence whose callbacks raise; touches no socket.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec

from pawl_server.engine.link.stream import EngineStream
from pawl_server.internal.v1 import engine_pb2

__all__ = ["OpenStreams"]

log = logging.getLogger(__name__)

Told = ParamSpec("Told")
SendAbort = Callable[[Sequence[int], "engine_pb2.AbortReason.ValueType"], None]


class OpenStreams:
    """Open sequences by their handles.

    Args:
        address: of the engine, for messages.
        send_abort: tells the engine to end sequences.
    """

    def __init__(self, address: str, send_abort: SendAbort) -> None:
        self._address = address
        self._send_abort = send_abort
        self._streams: dict[int, EngineStream] = {}

    def __len__(self) -> int:
        """Sequences without an end so far."""
        return len(self._streams)

    def __contains__(self, handle: int) -> bool:
        """Whether a sequence has had no end so far."""
        return handle in self._streams

    def add(self, streams: Iterable[EngineStream]) -> None:
        """These were opened."""
        self._streams.update((stream.handle, stream) for stream in streams)

    def on_end(self, end: engine_pb2.End) -> None:
        """The engine ended a sequence."""
        if stream := self._streams.pop(end.handle, None):
            self._tell(stream, stream.events.on_end, end)

    def on_prompt_logprobs(self, frame: engine_pb2.PromptLogprobs) -> None:
        """Log-probabilities of a stretch of a prompt."""
        if stream := self._streams.get(frame.handle):
            self._tell(stream, stream.events.on_prompt_logprobs, frame)

    def lose(self, detail: str) -> None:
        """The engine is lost, and every sequence with it."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            self._tell(stream, stream.events.on_lost, detail)

    def on_tokens(self, tokens: engine_pb2.Tokens) -> None:
        """Hand each sequence its tokens of one frame: repeats are dropped, a gap loses the sequence."""
        handles, logprobs = list(tokens.handles), tokens.logprobs
        indices, token_ids = list(tokens.indices), list(tokens.token_ids)
        if len(set(handles)) < len(handles):
            self._on_several_each(handles, indices, token_ids, logprobs)
            return
        for place, handle in enumerate(handles):  # nearly always: a token of each sequence
            stream = self._streams.get(handle)
            if stream is not None:
                news = slice(place, place + 1)
                self._give(stream, indices[news], token_ids[news], logprobs[news] if logprobs else ())

    def _on_several_each(
        self,
        handles: Sequence[int],
        indices: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Sequence[engine_pb2.PositionLogprobs],
    ) -> None:
        """A frame in which a sequence has several tokens, between those of others."""
        places_of: dict[int, list[int]] = {}
        for place, handle in enumerate(handles):
            places_of.setdefault(handle, []).append(place)
        for handle, places in places_of.items():
            if stream := self._streams.get(handle):
                self._give(
                    stream,
                    [indices[place] for place in places],
                    [token_ids[place] for place in places],
                    [logprobs[place] for place in places] if logprobs else (),
                )

    def _give(
        self,
        stream: EngineStream,
        indices: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Sequence[engine_pb2.PositionLogprobs],
    ) -> None:
        """Hand a sequence tokens of it, less those that it has."""
        expected = stream.next_index
        if len(indices) > 1 or indices[0] != expected:
            news = [place for place, index in enumerate(indices) if index >= expected]
            indices, token_ids = [indices[place] for place in news], [token_ids[place] for place in news]
            logprobs = [logprobs[place] for place in news] if logprobs else ()
            if not news:
                return
            if indices != list(range(expected, expected + len(news))):
                self._drop(stream, f"engine {self._address} sent tokens {indices[:8]}, expected {expected}")
                return
        stream.next_index += len(indices)
        self._tell(stream, stream.events.on_tokens, indices, token_ids, logprobs)

    def _tell(
        self, stream: EngineStream, callback: Callable[Told, None], *told: Told.args, **named: Told.kwargs
    ) -> None:
        """Call back. A callback that raises ends its own sequence at once, never the link."""
        try:
            callback(*told, **named)
        except Exception as error:
            if self._streams.pop(stream.handle, None):
                self._send_abort([stream.handle], engine_pb2.ABORT_REASON_INTERNAL)
            try:
                stream.events.on_defect(error)
            except Exception:
                log.exception("sequence %d of engine %s: nobody takes its failure", stream.handle, self._address)

    def _drop(self, stream: EngineStream, detail: str) -> None:
        """Give up a sequence whose tokens do not fit together."""
        log.error("sequence %d: %s", stream.handle, detail)
        del self._streams[stream.handle]
        self._send_abort([stream.handle], engine_pb2.ABORT_REASON_INTERNAL)
        self._tell(stream, stream.events.on_lost, detail)
