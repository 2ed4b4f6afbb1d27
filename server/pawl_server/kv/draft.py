"""A draft of block allocations, laid over the pool and applied whole or not at all.

Planning a step reads the pool and writes into a draft; `apply` is the only moment the pool changes. A draft that is
dropped leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pawl_server.kv.block_hash import HashChain
from pawl_server.kv.block_pool import BlockPool

__all__ = ["BlockDraft"]


class BlockDraft:
    """Blocks that a step would release, share and take. Valid until the pool changes."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._order: Iterator[int] = pool.eviction_order()
        self._released: list[list[int]] = []
        self._freed: list[int] = []  # blocks that become free by the releases, next to be taken last
        self._hits: list[int] = []
        self._taken: list[int] = []
        self._taken_set: set[int] = set()
        self._references: dict[int, int] = {}  # change of references, where there is one
        self._num_available = pool.num_available

    @property
    def num_available(self) -> int:
        """Blocks that could still be taken."""
        return self._num_available

    def _count(self, block: int) -> int:
        return self._pool.references(block) + self._references.get(block, 0)

    def prefix_hits(self, chain: HashChain, max_blocks: int) -> list[int]:
        """The longest cached prefix, at most `max_blocks` full blocks: the blocks that hold it, in order."""
        hits: list[int] = []
        for index in range(min(max_blocks, len(chain))):
            block = self._pool.lookup(chain[index])
            if block is None or block in self._taken_set:
                break
            hits.append(block)
        return hits

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody holds: sharing them takes them out of what is available."""
        return sum(not self._count(block) for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Reference blocks found by `prefix_hits`."""
        for block in blocks:
            if not self._count(block):
                self._num_available -= 1
            self._references[block] = self._references.get(block, 0) + 1
            self._hits.append(block)

    def take(self, count: int) -> list[int] | None:
        """Blocks to write, in eviction order; None (and nothing changes) when there are not as many."""
        if count > self._num_available:
            return None
        blocks: list[int] = []
        while len(blocks) < count:
            block = next(self._order, None)
            if block is None:
                block = self._freed.pop()
            if not self._count(block):
                blocks.append(block)
        for block in blocks:
            self._taken_set.add(block)
            self._references[block] = self._references.get(block, 0) + 1
        self._taken += blocks
        self._num_available -= count
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back the blocks of a sequence, as `BlockPool.release` will."""
        self._released.append(list(blocks))
        for block in reversed(blocks):
            self._references[block] = self._references.get(block, 0) - 1
            if not self._count(block):
                self._num_available += 1
                self._freed.insert(0, block)

    def apply(self) -> None:
        """Change the pool: releases first, then shares, then takes."""
        for blocks in self._released:
            self._pool.release(blocks)
        self._pool.acquire(self._hits)
        self._pool.take(self._taken)
