"""What one connection has yet to be sent: filled by the step loop, emptied by the connection's writer.

Never blocks and never grows by frames: what a stalled connection was not sent is merged, so it is bounded by
the tokens of the live sequences.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pawl_server.engine.link.protocol import MAX_CACHE_EVENTS, MAX_FRAME_TOKENS
from pawl_server.internal.v1 import engine_pb2

__all__ = ["Outbox"]


class Outbox:
    """Pending frames of one connection.

    Attributes:
        connection: number of the connection, unique in this engine.
        handles: the connection's live sequences.
    """

    def __init__(self, connection: int) -> None:
        self.connection = connection
        self.handles: set[int] = set()
        self._ready = asyncio.Event()
        self._step = 0
        self._handles: list[int] = []
        self._indices: list[int] = []
        self._token_ids: list[int] = []
        self._logprobs: dict[int, engine_pb2.PositionLogprobs] = {}  # by place in the arrays
        self._prompt_logprobs: list[engine_pb2.PromptLogprobs] = []
        self._ends: list[engine_pb2.End] = []
        self._load: engine_pb2.EngineLoad | None = None
        self._cache_events: engine_pb2.CacheEvents | None = None

    def add_tokens(
        self,
        handles: Sequence[int],
        indices: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Sequence[engine_pb2.PositionLogprobs | None] = (),
    ) -> None:
        """Queue tokens, as parallel arrays; no log-probabilities when nobody asked. Call `step_done` after a step."""
        for place, position in enumerate(logprobs, start=len(self._handles)):
            if position is not None:
                self._logprobs[place] = position
        self._handles += handles
        self._indices += indices
        self._token_ids += token_ids

    def add_prompt_logprobs(self, frame: engine_pb2.PromptLogprobs) -> None:
        """Queue a stretch of prompt log-probabilities. Sent before the tokens."""
        self._prompt_logprobs.append(frame)

    def add_end(self, end: engine_pb2.End) -> None:
        """Queue the end of a sequence. Sent after the tokens."""
        self.handles.discard(end.handle)
        self._ends.append(end)
        self._ready.set()

    def set_load(self, load: engine_pb2.EngineLoad) -> None:
        """Queue the engine's state; a newer one replaces it."""
        self._load = load
        self._ready.set()

    def add_cache_events(self, events: engine_pb2.CacheEvents) -> None:
        """Queue changes of the prefix cache. Too many make the reader begin anew. Sent with the next load."""
        if self._cache_events is None:
            self._cache_events = engine_pb2.CacheEvents()
        pending = self._cache_events
        if events.reset or len(pending.events) + len(events.events) > MAX_CACHE_EVENTS:
            del pending.events[:]
            pending.reset = True
        pending.events.extend(events.events)

    def step_done(self, step: int) -> None:
        """Let the writer have what the step gave."""
        self._step = step
        self._ready.set()

    async def take(self) -> list[engine_pb2.ConnectResponse]:
        """Wait until something is pending and take all of it, in the order in which it must be sent."""
        await self._ready.wait()
        self._ready.clear()
        frames = [engine_pb2.ConnectResponse(prompt_logprobs=frame) for frame in self._prompt_logprobs]
        frames += [engine_pb2.ConnectResponse(tokens=tokens) for tokens in self._take_tokens()]
        frames += [engine_pb2.ConnectResponse(end=end) for end in self._ends]
        if self._load is not None:
            frames.append(engine_pb2.ConnectResponse(load=self._load))
        if self._cache_events is not None:
            frames.append(engine_pb2.ConnectResponse(cache_events=self._cache_events))
        self._prompt_logprobs, self._ends, self._load, self._cache_events = [], [], None, None
        return frames

    def _take_tokens(self) -> list[engine_pb2.Tokens]:
        frames: list[engine_pb2.Tokens] = []
        none = engine_pb2.PositionLogprobs()
        for start in range(0, len(self._handles), MAX_FRAME_TOKENS):
            places = range(start, min(start + MAX_FRAME_TOKENS, len(self._handles)))
            frames.append(
                engine_pb2.Tokens(
                    step=self._step,
                    handles=self._handles[places.start : places.stop],
                    indices=self._indices[places.start : places.stop],
                    token_ids=self._token_ids[places.start : places.stop],
                    logprobs=[self._logprobs.get(place, none) for place in places] if self._logprobs else (),
                )
            )
        self._handles, self._indices, self._token_ids, self._logprobs = [], [], [], {}
        return frames
