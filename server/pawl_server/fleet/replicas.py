"""What the fleet knows of a replica, and the log of what happened to all of them: plain data.

Owns the states, the events and their JSON (they cross from the fleet actor to `pawl serve`); starts nothing and
imports neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque

import msgspec

from pawl_server.engine.spec import EngineProgress
from pawl_server.internal.v1 import fleet_pb2

__all__ = [
    "EventBatch",
    "EventLog",
    "FleetEvent",
    "ReplicaChanged",
    "ReplicaProgress",
    "ReplicaState",
    "ReplicaStatus",
    "decode_batch",
    "encode_batch",
]


class ReplicaState(enum.StrEnum):
    """Life of a replica."""

    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    DEAD = "DEAD"
    BACKOFF = "BACKOFF"

    @property
    def has_address(self) -> bool:
        """Whether an engine listens in this state."""
        return self in (ReplicaState.READY, ReplicaState.DRAINING)


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One replica now.

    Attributes:
        index: number, from 0; kept over restarts.
        incarnation: counts the starts, from 1 (or from the Unix time, see Supervisor).
        state: its life.
        address: host:port of the engine; empty unless READY or DRAINING.
        metrics_address: host:port of its /metrics; empty unless READY or DRAINING.
        process_id: of the engine, on its node; 0 unless READY or DRAINING.
        detail: why it is DEAD or in BACKOFF.
        restart_count: starts after the first.
    """

    index: int
    incarnation: int = 0
    state: ReplicaState = ReplicaState.STARTING
    address: str = ""
    metrics_address: str = ""
    process_id: int = 0
    detail: str = ""
    restart_count: int = 0

    def to_proto(self) -> fleet_pb2.Replica:
        """The message for front ends."""
        return fleet_pb2.Replica(
            index=self.index,
            incarnation=self.incarnation,
            state=fleet_pb2.ReplicaState.Value(f"REPLICA_STATE_{self.state}"),
            address=self.address,
            metrics_address=self.metrics_address,
            process_id=self.process_id,
            detail=self.detail,
            restart_count=self.restart_count,
        )


class ReplicaChanged(msgspec.Struct, frozen=True, kw_only=True, tag="changed", tag_field="event"):
    """A replica's status changed.

    Attributes:
        status: the new one.
        restart_reason: why it will be started again (died, start_timeout, start_failed); empty otherwise.
        gives_up: it failed for good at its first start; the fleet cannot come up.
    """

    status: ReplicaStatus
    restart_reason: str = ""
    gives_up: bool = False


class ReplicaProgress(msgspec.Struct, frozen=True, kw_only=True, tag="progress", tag_field="event"):
    """A starting replica got further."""

    replica: int
    incarnation: int
    progress: EngineProgress


FleetEvent = ReplicaChanged | ReplicaProgress


class EventBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Events after a number, and the number to ask with next."""

    next_number: int
    events: list[FleetEvent]


class EventLog:
    """The last events, numbered from 0, for readers that ask again and again.

    Args:
        capacity: events kept; a reader that falls further behind misses the oldest.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self._events: deque[FleetEvent] = deque(maxlen=capacity)
        self._next = 0
        self._news = asyncio.Event()

    def append(self, event: FleetEvent) -> None:
        """Add an event and wake the readers."""
        self._events.append(event)
        self._next += 1
        self._news.set()
        self._news = asyncio.Event()

    async def after(self, number: int, timeout_s: float) -> EventBatch:
        """Events from `number` on; waits up to `timeout_s` for the first of them.

        A number from before the fleet was started again lies beyond the end; it is read as 0.
        """
        if number > self._next:
            number = 0
        if number >= self._next:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
            except TimeoutError:
                return EventBatch(next_number=number, events=[])
        oldest = self._next - len(self._events)
        skipped = max(0, number - oldest)
        return EventBatch(next_number=self._next, events=list(self._events)[skipped:])


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(EventBatch)


def encode_batch(batch: EventBatch) -> bytes:
    """JSON of a batch."""
    return _encoder.encode(batch)


def decode_batch(data: bytes) -> EventBatch:
    """Decode and type-check a batch.

    Raises:
        msgspec.DecodeError: the bytes are none.
    """
    return _decoder.decode(data)
