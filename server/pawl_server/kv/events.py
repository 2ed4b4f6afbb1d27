"""What changed in the prefix cache, for those who route by it: prefixes stored and removed. A bounded buffer."""

from __future__ import annotations

from collections import deque

import msgspec

__all__ = ["CacheEvent", "CacheEvents", "PrefixRemoved", "PrefixStored", "PrefixesUnknown"]


class PrefixStored(msgspec.Struct, frozen=True, gc=False):
    """A full block can be shared from now on.

    Attributes:
        name: of the prefix that ends with the block, 32 bytes.
        parent: name of the prefix before it; the namespace for a first block.
        namespace: root of the chain: a digest over the tenant's key and all else that KV depends on.
        num_tokens: tokens of the block.
    """

    name: bytes
    parent: bytes
    namespace: bytes
    num_tokens: int


class PrefixRemoved(msgspec.Struct, frozen=True, gc=False):
    """A prefix is not cached any more."""

    name: bytes


class PrefixesUnknown(msgspec.Struct, frozen=True, gc=False):
    """Events were lost: what was said before does not hold; what follows does."""


CacheEvent = PrefixStored | PrefixRemoved | PrefixesUnknown


class CacheEvents:
    """Events since they were last drained, at most `capacity`; 0 = none are kept.

    When they grow over that, all are dropped and the reader is told that it knows nothing.
    """

    __slots__ = ("_capacity", "_events")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._events: deque[CacheEvent] = deque()

    @property
    def wanted(self) -> bool:
        """Whether events are kept at all."""
        return self._capacity > 0

    def add(self, event: PrefixStored | PrefixRemoved) -> None:
        """Note one event."""
        if len(self._events) >= self._capacity:
            self._events.clear()
            self._events.append(PrefixesUnknown())
        self._events.append(event)

    def drain(self) -> list[CacheEvent]:
        """Everything since the last call, oldest first."""
        events = list(self._events)
        self._events.clear()
        return events
