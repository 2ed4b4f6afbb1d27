"""From what a step gave to the outboxes of the front ends that asked for it. Touches no socket: never blocks."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import cast

from pawl_server.engine.link.frames import (
    SequenceKey,
    to_end,
    to_failed_end,
    to_position,
    to_prompt_logprobs,
    to_refused_end,
)
from pawl_server.engine.link.outbox import Outbox
from pawl_server.internal.v1 import engine_pb2
from pawl_server.scheduler.admission import Refusal
from pawl_server.scheduler.committer import Committed
from pawl_server.scheduler.endings import Ended
from pawl_workers.plan import TokenLogprobs

__all__ = ["Delivery"]


def _position(logprobs: TokenLogprobs | None) -> engine_pb2.PositionLogprobs | None:
    return None if logprobs is None else to_position(logprobs)


class Delivery:
    """The outboxes by connection. What belongs to a connection that is gone is dropped."""

    def __init__(self) -> None:
        self._outboxes: dict[int, Outbox] = {}

    def attach(self, outbox: Outbox) -> None:
        """A connection opened."""
        self._outboxes[outbox.connection] = outbox

    def detach(self, outbox: Outbox) -> Iterator[SequenceKey]:
        """A connection is gone; gives the sequences that it leaves behind."""
        del self._outboxes[outbox.connection]
        for handle in sorted(outbox.handles):
            yield outbox.connection, handle

    def emit(self, committed: Committed, step: int) -> None:
        """Hand on the tokens and ends of a step: one frame of tokens per connection."""
        touched: set[Outbox] = set()
        keys = cast("list[SequenceKey]", committed.handles)
        for connection in {connection for connection, _ in keys}:
            outbox = self._outboxes.get(connection)
            if outbox is None:
                continue
            touched.add(outbox)
            mine = [place for place, key in enumerate(keys) if key[0] == connection]
            outbox.add_tokens(
                [keys[place][1] for place in mine],
                [committed.indices[place] for place in mine],
                [committed.token_ids[place] for place in mine],
                [_position(committed.logprobs[place]) for place in mine] if committed.logprobs else (),
            )
        for key, scored in committed.prompt_logprobs:
            outbox, handle = self._find(key)
            if outbox is not None:
                outbox.add_prompt_logprobs(to_prompt_logprobs(handle, scored))
                touched.add(outbox)
        for ended in committed.ended:
            self.ended(ended)
        for outbox in touched:
            outbox.step_done(step)

    def ended(self, ended: Ended) -> None:
        """Hand on the end of a sequence."""
        outbox, handle = self._find(ended.handle)
        if outbox is not None:
            outbox.add_end(to_end(handle, ended))

    def failed(self, ended: Ended, message: str) -> None:
        """Hand on that a sequence was taken out because it crashes the worker."""
        outbox, handle = self._find(ended.handle)
        if outbox is not None:
            outbox.add_end(to_failed_end(handle, ended, message))

    def refused(self, key: Hashable, refusal: Refusal) -> None:
        """Hand on that the scheduler did not take a sequence."""
        outbox, handle = self._find(key)
        if outbox is not None:
            outbox.add_end(to_refused_end(handle, refusal))

    def load(self, load: engine_pb2.EngineLoad) -> None:
        """Hand the engine's state to every connection."""
        for outbox in self._outboxes.values():
            outbox.set_load(load)

    def cache_events(self, events: engine_pb2.CacheEvents) -> None:
        """Hand changes of the prefix cache to every connection."""
        for outbox in self._outboxes.values():
            outbox.add_cache_events(events)

    def _find(self, key: Hashable) -> tuple[Outbox | None, int]:
        connection, handle = cast("SequenceKey", key)
        return self._outboxes.get(connection), handle
