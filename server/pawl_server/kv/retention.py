"""Cached prefixes that callers asked to keep for a while: a bounded number of blocks, each until some time.

A hint and no promise: a marked block is the last to be evicted, but nothing that runs ever waits for one.
"""

from __future__ import annotations

import heapq

from pawl_server.kv.eviction import Tenant

__all__ = ["Retention"]

_SLACK = 64  # entries of the expiry heap that may be outdated


class Retention:
    """Marks on blocks.

    A tenant may mark as long as it has no more blocks marked than the others have left over (dynamic thresholds,
    Choudhury and Hahne, IEEE/ACM Transactions on Networking 1998, with a factor of 1): alone it gets one half of
    the budget, two tenants a third each, and there is always something left for the next.

    Args:
        budget: most blocks that are marked at once.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._until: dict[int, float] = {}
        self._owner: dict[int, Tenant] = {}
        self._places: dict[int, int] = {}
        self._expiry: list[tuple[float, int, int]] = []  # until, minus the place in its sequence, block; lazily kept

    def __contains__(self, block: int) -> bool:
        return block in self._until

    def __len__(self) -> int:
        return len(self._until)

    def mark(self, block: int, place: int, tenant: Tenant, until: float) -> bool:
        """Mark a block, or mark it for longer; False when its tenant has used up what it may.

        Mark the blocks of a sequence in its order, and stop at the first that is refused: a child without its
        parent is worth nothing. `place` is the index in the sequence.
        """
        known = self._until.get(block)
        if known is None:
            if tenant.num_retained >= self.budget - len(self._until):
                return False
            tenant.num_retained += 1
            self._owner[block] = tenant
        elif known >= until:
            return True
        self._until[block] = until
        self._places[block] = -place
        heapq.heappush(self._expiry, (until, -place, block))
        if len(self._expiry) > 2 * len(self._until) + _SLACK:
            self._expiry = [(until, self._places[block], block) for block, until in self._until.items()]
            heapq.heapify(self._expiry)
        return True

    def drop(self, block: int) -> None:
        """Take the mark from a block that is evicted."""
        if self._until.pop(block, None) is not None:
            del self._places[block]
            self._owner.pop(block).num_retained -= 1

    def expire(self, now: float) -> list[int]:
        """Take the marks whose time is over; gives their blocks, children before their parents."""
        expired = []
        while self._expiry and self._expiry[0][0] <= now:
            until, _, block = heapq.heappop(self._expiry)
            if self._until.get(block) == until:  # else marked anew, or evicted
                self.drop(block)
                expired.append(block)
        return expired
