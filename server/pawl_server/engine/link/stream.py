"""One sequence at the front end's end of the link: whom to tell what, and which token is next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pawl_server.internal.v1 import engine_pb2

__all__ = ["EngineStream", "StreamEvents"]

Abort = Callable[[int, "engine_pb2.AbortReason.ValueType"], None]


class StreamEvents(Protocol):
    """What the caller of `EngineLink.open` is told. Called from the read loop: must not block.

    After `on_end`, `on_lost` or `on_defect`, nothing follows. One of the first two comes, and only if a callback
    raised, that one included, the third.
    """

    def on_tokens(
        self,
        indices: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Sequence[engine_pb2.PositionLogprobs],
    ) -> None:
        """New tokens: indices without a gap or a repeat. `logprobs` is empty or one per token."""

    def on_prompt_logprobs(self, frame: engine_pb2.PromptLogprobs) -> None:
        """Log-probabilities of a stretch of the prompt; stretches come in order."""

    def on_end(self, end: engine_pb2.End) -> None:
        """The engine ended the sequence."""

    def on_lost(self, detail: str) -> None:
        """The engine, or the thread of this sequence, was lost; `detail` says how."""

    def on_defect(self, error: Exception) -> None:
        """A callback of this sequence raised this: the engine is told to end it. Must not raise."""


class EngineStream:
    """One open sequence on a link."""

    __slots__ = ("_abort", "events", "handle", "next_index")

    def __init__(self, handle: int, events: StreamEvents, next_index: int, abort: Abort) -> None:
        self._abort = abort
        self.handle = handle
        self.events = events
        self.next_index = next_index  # index of the next token that is news

    def abort(self, reason: engine_pb2.AbortReason.ValueType) -> None:
        """Ask the engine to end it. `on_end` still comes; never blocks."""
        self._abort(self.handle, reason)
