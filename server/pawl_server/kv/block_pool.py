"""Reference counts and names of the KV blocks of one replica, and who gives way when there are not enough.

Every block is either referenced or free; a free block may still hold a cached prefix, which it loses when it is
taken. Knows nothing of tokens or sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pawl_server.kv.block_hash import HashChain
from pawl_server.kv.events import CacheEvents
from pawl_server.kv.eviction import PLAIN, EvictionOrder, Tenant
from pawl_server.kv.host_tier import HostTier
from pawl_server.kv.pool_check import contradiction
from pawl_server.kv.prefix_index import PrefixIndex
from pawl_server.kv.retention import Retention

__all__ = ["BlockPool", "PoolError"]


class PoolError(RuntimeError):
    """An operation that would break the accounting, such as releasing a free block. A defect, never bad input."""


class BlockPool:
    """Blocks 1 to `num_blocks`; block 0, the null block, is nobody's.

    Source: paged attention, Kwon et al. 2023 (arXiv 2309.06180), section 4; the free list as LRU is vLLM's idea.

    Args:
        num_blocks: how many there are.
        retained_share: most of them that may be marked to be kept, as a share.
        half_life_s: time in which a tenant's claim to its cached blocks halves while it does nothing, seconds.
        max_events: most cache events that are kept until they are drained; 0 = none are.
        host: the second tier, if there is one.

    Attributes:
        now: the latest time that the pool was told, in seconds.
        events: prefixes stored and removed.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        retained_share: float = 0.25,
        half_life_s: float = 300.0,
        max_events: int = 0,
        host: HostTier | None = None,
    ) -> None:
        if num_blocks < 1:
            raise PoolError(f"num_blocks = {num_blocks}: a pool has at least one block")
        self.num_blocks = num_blocks
        self.now = 0.0
        self.events = CacheEvents(max_events)
        self.host = host
        self._references = [0] * (num_blocks + 1)
        self._owners: list[Tenant | None] = [None] * (num_blocks + 1)  # of blocks with a name
        self._order = EvictionOrder(num_blocks, half_life_s)
        self._index = PrefixIndex(num_blocks, self.events)
        self._retention = Retention(int(retained_share * num_blocks))

    @property
    def num_available(self) -> int:
        """Blocks nobody references, cached ones included: what can be taken."""
        return self._order.num_free

    @property
    def num_cached(self) -> int:
        """Blocks nobody references that hold a cached prefix."""
        return self._order.num_cached

    @property
    def num_used(self) -> int:
        """Blocks that somebody references."""
        return self.num_blocks - self._order.num_free

    @property
    def num_retained(self) -> int:
        """Blocks that are marked to be kept."""
        return len(self._retention)

    def num_published(self, tenant: str) -> int:
        """Blocks of a tenant that others could share, pending ones included."""
        return next((known.num_published for known in self._order.tenants() if known.name == tenant), 0)

    def references(self, block: int) -> int:
        """How many hold the block."""
        return self._references[block]

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody references."""
        return list(map(self._references.__getitem__, blocks)).count(0)

    def hash_of(self, block: int) -> bytes | None:
        """Name of the prefix that the block holds, None if it is not published (or only announced)."""
        return None if self._index.is_pending(block) else self._index.name_of(block)

    def name_of(self, block: int) -> bytes | None:
        """Name by which a lookup may find the block: it is published, or announced."""
        return self._index.name_of(block)

    def has_name(self, block: int) -> bool:
        """Whether a lookup may find the block: it is published, or announced."""
        return self._owners[block] is not None

    def lookup(self, name: bytes) -> int | None:
        """Block that holds the prefix with this name, or will when the launched steps are done."""
        return self._index.lookup(name)

    def find(self, chain: HashChain) -> list[int]:
        """The longest cached beginning of a chain: its blocks, in order. Not to be changed."""
        return self._index.find(chain)

    def eviction_order(self) -> Iterator[int]:
        """Available blocks, the next to be taken first. Not valid after the pool changes."""
        return self._order.walk()

    def advance(self, now: float) -> None:
        """Say what time it is, in seconds. What was to be kept until then counts as used then."""
        self.now = max(self.now, now)
        for block in self._retention.expire(self.now):
            owner = self._owners[block]
            if not self._references[block] and owner is not None:
                self._order.remove(block)
                self._order.put_last(owner.ring, block)

    def take(self, blocks: Iterable[int]) -> None:
        """Reference available blocks for writing; what they cached is forgotten.

        Raises:
            PoolError: one of them is referenced.
        """
        for block in blocks:
            if self._references[block] or block == PLAIN:
                raise PoolError(f"block {block} is taken while it is referenced")
            self._order.remove(block)
            self._forget(block)
            self._references[block] = 1

    def acquire(self, blocks: Sequence[int]) -> None:
        """Reference blocks for reading (prefix hits, forks); what they hold stays."""
        for block in blocks:
            if not self._references[block]:
                self._order.remove(block)
            self._references[block] += 1
        if blocks and (owner := self._owners[blocks[-1]]) is not None:
            owner.last_used = self.now

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block of a sequence, given in the order of the sequence.

        What becomes free is evicted children before parents: the last block of the sequence goes behind the other
        cached blocks of its tenant first; blocks that hold nothing reusable, or did not live to hold it, go first.

        Raises:
            PoolError: one of them is not referenced; nothing has changed, unless a block is named twice.
        """
        references, order = self._references, self._order
        if 0 in map(references.__getitem__, blocks):
            raise PoolError(f"blocks {blocks} are released while nobody references one of them")
        for block in reversed(blocks):
            references[block] -= 1
            if references[block] > 0:
                continue
            if references[block] < 0:
                raise PoolError(f"block {block} is released twice at once")
            if self._index.is_pending(block):
                self._forget(block)
            owner = self._owners[block]
            if owner is None:
                order.put_first(PLAIN, block)
            else:
                owner.last_used = self.now
                order.put_last(order.retained if block in self._retention else owner.ring, block)

    def announce(self, block: int, chain: HashChain, index: int, step: int, producer: int = 0) -> None:
        """Say that `step` fills a referenced block with what `chain` names; it can be shared from then on.

        Steps are announced in their order; `producer` says which sequence of the step fills it. When another block
        has the name already, this one stays without.

        Raises:
            PoolError: nobody references the block, or it has another name.
        """
        self._check_publishable(block, chain, index)
        if self._index.announce(block, chain, index, step, producer):
            self._own(block, chain)

    def settle(self, step: int) -> None:
        """The steps up to this one are done: what they announced is published."""
        self._index.settle(step)

    def retract(self, step: int, producer: int | None = None) -> list[int]:
        """Take back what was announced of a step that failed, or of a producer that failed in it.

        Returns:
            The blocks. Whoever shares one has read what is not right, and must start again.
        """
        blocks = self._index.announced_by(step, producer)
        for block in blocks:
            self._forget(block)
        if producer is None:
            self._index.drop_unsettled(step)
        return blocks

    def pending_steps(self) -> set[int]:
        """Steps whose announcements are not settled."""
        return {step for _, step in self._index.pending()}

    def is_pending(self, block: int) -> bool:
        """Whether the block can be shared though its step is not done."""
        return self._index.is_pending(block)

    def publish(self, block: int, chain: HashChain, index: int) -> None:
        """Say that a referenced block holds what `chain` names, computed.

        When another block holds the same prefix already, this one stays unpublished.

        Raises:
            PoolError: nobody references the block, or it has another name.
        """
        self._check_publishable(block, chain, index)
        if self._index.publish(block, chain, index):
            self._own(block, chain)

    def retain(self, blocks: Sequence[int], until: float) -> int:
        """Mark the published beginning of a sequence to be kept until `until`; gives how many blocks that were.

        Call it before `release`. Bounded by the pool's share for it and between tenants: see `Retention`.
        """
        for place, block in enumerate(blocks):
            owner = self._owners[block]
            if owner is None or not self._retention.mark(block, place, owner, until):
                return place
        return len(blocks)

    def flush(self) -> int:
        """Forget every cached prefix that nobody references, kept ones and those in the host tier, too.

        Returns:
            How many blocks that were, host blocks not counted.
        """
        if self.host is not None:
            self.host.clear()
        cached = [block for block in self.eviction_order() if self._index.name_of(block) is not None]
        for block in cached:
            self._order.remove(block)
            self._forget(block)
            self._order.put_first(PLAIN, block)
        return len(cached)

    def check_invariants(self) -> None:
        """Verify the accounting (invariants 1, 3, 4, 9, 11 and 13 of the design's list).

        Raises:
            PoolError: naming the first thing that does not hold.
        """
        problem = self._order.check() or self._index.check()
        if problem is None:
            problem = contradiction(self._references, self._owners, self._order, self._index, self._retention)
        if problem is None and self.host is not None:
            problem = self.host.check()
        if problem is not None:
            raise PoolError(problem)

    def _check_publishable(self, block: int, chain: HashChain, index: int) -> None:
        if not self._references[block]:
            raise PoolError(f"block {block} is published while nobody references it")
        if self._index.name_of(block) not in (None, chain[index]):
            raise PoolError(f"block {block} is published under two names")

    def _own(self, block: int, chain: HashChain) -> None:
        owner = self._owners[block] = self._order.tenant(chain.owner)
        owner.num_published += 1
        owner.last_used = self.now

    def _forget(self, block: int) -> None:
        owner = self._owners[block]
        if owner is None:
            return
        self._index.forget(block)
        self._retention.drop(block)
        self._owners[block] = None
        owner.num_published -= 1
        if not owner.num_published:
            self._order.forget(owner)
