"""Which free block goes next: rings of blocks, each in its order of eviction. Knows no hashes and no sequences.

First blocks that hold nothing; then the cached blocks of the tenant that has the most for how recently it was
active, least recently used first; last those somebody asked to keep. Linking and unlinking are O(1).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

__all__ = ["PLAIN", "EvictionOrder", "Tenant"]

PLAIN = 0
"""The ring of blocks that hold nothing reusable. Block 0, the null block, is its head: it is never handed out."""

_NOWHERE = -1


class Tenant:
    """Whose cached blocks count together.

    Attributes:
        name: of the tenant.
        ring: of its free cached blocks.
        weight: of its share; 1 unless said otherwise.
        num_published: its blocks with a name, free or referenced.
        num_retained: those among them that are marked to be kept.
        last_used: when it last published, shared or released a block, in seconds.
    """

    __slots__ = ("last_used", "name", "num_published", "num_retained", "ring", "weight")

    def __init__(self, name: str, ring: int) -> None:
        self.name = name
        self.ring = ring
        self.weight = 1.0
        self.num_published = 0
        self.num_retained = 0
        self.last_used = 0.0


class EvictionOrder:
    """The free blocks of a pool.

    A tenant gives way in the order of log2(blocks / weight) - last_used / half_life_s, the highest first: among
    active tenants the one with the most blocks for its weight (longest queue drop: Suter et al., INFOCOM 1998), and
    a tenant's claim halves with every half-life in which it does nothing (forward decay: Cormode et al., ICDE 2009),
    so that what was left behind does not stand for ever.

    Attributes:
        num_free: blocks in all rings.
        retained: the ring of cached blocks that are to be kept.
    """

    def __init__(self, num_blocks: int, half_life_s: float) -> None:
        self.num_free = num_blocks
        self.retained = num_blocks + 1
        self._half_life_s = half_life_s
        # Entries past the blocks are heads of rings; a ring's head links its last block to its first.
        self._next = [*range(1, num_blocks + 1), PLAIN, self.retained]
        self._previous = [num_blocks, *range(num_blocks), self.retained]
        self._ring = [_NOWHERE, *([PLAIN] * num_blocks)]
        self._sizes: dict[int, int] = {PLAIN: num_blocks, self.retained: 0}
        self._tenants: dict[str, Tenant] = {}
        self._spare_rings: list[int] = []
        self._uses = [0] * (num_blocks + 1)  # counter of uses at which the block became free
        self._num_uses = 0

    @property
    def num_cached(self) -> int:
        """Free blocks that hold a cached prefix."""
        return self.num_free - self._sizes[PLAIN]

    def tenant(self, name: str) -> Tenant:
        """The tenant of this name, made at its first block."""
        found = self._tenants.get(name)
        if found is None:
            ring = self._spare_rings.pop() if self._spare_rings else len(self._next)
            if ring == len(self._next):
                self._next.append(ring)
                self._previous.append(ring)
            self._sizes[ring] = 0
            found = self._tenants[name] = Tenant(name, ring)
        return found

    def tenants(self) -> list[Tenant]:
        """Every tenant that has a block."""
        return list(self._tenants.values())

    def forget(self, tenant: Tenant) -> None:
        """Drop a tenant that has no block any more."""
        del self._tenants[tenant.name], self._sizes[tenant.ring]
        self._spare_rings.append(tenant.ring)

    def put_first(self, ring: int, block: int) -> None:
        """Let a block be the next of its ring."""
        after = self._next[ring]
        self._next[ring] = self._previous[after] = block
        self._previous[block], self._next[block] = ring, after
        self._ring[block] = ring
        self._sizes[ring] += 1
        self.num_free += 1

    def put_last(self, ring: int, block: int) -> None:
        """Let a block be the last of its ring."""
        before = self._previous[ring]
        self._next[before] = self._previous[ring] = block
        self._previous[block], self._next[block] = before, ring
        self._ring[block] = ring
        self._sizes[ring] += 1
        self.num_free += 1
        self._num_uses += 1
        self._uses[block] = self._num_uses

    def remove(self, block: int) -> None:
        """Take a block out of its ring."""
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self._sizes[self._ring[block]] -= 1
        self._ring[block] = _NOWHERE
        self.num_free -= 1

    def ring_of(self, block: int) -> int | None:
        """The ring that a block is in; None when it is not free."""
        ring = self._ring[block]
        return None if ring == _NOWHERE else ring

    def walk(self) -> Iterator[int]:
        """Free blocks in the order in which they would go. Not valid after the order changes.

        O(1) a block, O(log tenants) a cached one; O(tenants) once, when the first cached block is reached.
        """
        following = self._next
        block = following[PLAIN]
        while block != PLAIN:
            yield block
            block = following[block]
        yield from self._walk_cached()
        block = following[self.retained]
        while block != self.retained:
            yield block
            block = following[block]

    def _walk_cached(self) -> Iterator[int]:
        following = self._next
        heap = []
        for place, tenant in enumerate(self._tenants.values()):
            if self._sizes[tenant.ring]:
                block = following[tenant.ring]
                left = tenant.num_published
                heap.append((self._claim(tenant, left), self._uses[block], place, block, left, tenant))
        heapq.heapify(heap)
        while heap:
            _, _, place, block, left, tenant = heap[0]
            yield block
            block, left = following[block], left - 1
            if block == tenant.ring:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (self._claim(tenant, left), self._uses[block], place, block, left, tenant))

    def _claim(self, tenant: Tenant, num_published: int) -> float:
        """The lower, the sooner a tenant gives way."""
        return tenant.last_used / self._half_life_s - math.log2(num_published / tenant.weight)

    def check(self) -> str | None:
        """The first thing that contradicts itself, None when there is none."""
        listed = list(self.walk())
        if len(listed) != len(set(listed)) or len(listed) != self.num_free or len(listed) != sum(self._sizes.values()):
            return f"the rings hold {len(listed)} blocks, the counter says {self.num_free}"
        for place in (*listed, *self._sizes):
            if self._previous[self._next[place]] != place:
                return f"links around block {place} disagree"
        if sum(ring != _NOWHERE for ring in self._ring) != len(listed):
            return "a block says that it is in a ring and is not"
        if self._ring[PLAIN] != _NOWHERE:
            return "the null block is listed"
        return None
