"""Reference counts and the free list of the KV blocks of one replica.

Every block is either referenced or in the free list; a free block may still hold a cached prefix (a hash), which it
loses when it is taken. The free list is kept in eviction order, so it *is* the LRU. Knows nothing of tokens or
sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

__all__ = ["BlockPool", "PoolError"]

# Block 0 is the null block: never handed out; its links close the free list into a ring.
_HEAD = 0


class PoolError(RuntimeError):
    """An operation that would break the accounting, such as releasing a free block. A defect, never bad input."""


class BlockPool:
    """Blocks 1 to `num_blocks`.

    Source: paged attention, Kwon et al. 2023 (arXiv 2309.06180), section 4; the free list as LRU is vLLM's idea.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise PoolError(f"num_blocks = {num_blocks}: a pool has at least one block")
        self.num_blocks = num_blocks
        self._references = [0] * (num_blocks + 1)
        self._next = [*range(1, num_blocks + 1), _HEAD]
        self._previous = [num_blocks, *range(num_blocks)]
        self._hash: list[bytes | None] = [None] * (num_blocks + 1)
        self._by_hash: dict[bytes, int] = {}
        self._num_free = num_blocks
        self._num_cached = 0  # free blocks that hold a cached prefix

    @property
    def num_available(self) -> int:
        """Blocks nobody references, cached ones included: what can be taken."""
        return self._num_free

    @property
    def num_cached(self) -> int:
        """Blocks nobody references that hold a cached prefix."""
        return self._num_cached

    @property
    def num_used(self) -> int:
        """Blocks that somebody references."""
        return self.num_blocks - self._num_free

    def references(self, block: int) -> int:
        """How many hold the block."""
        return self._references[block]

    def hash_of(self, block: int) -> bytes | None:
        """Hash of the prefix the block holds, None if it is not published."""
        return self._hash[block]

    def lookup(self, block_hash: bytes) -> int | None:
        """Block that holds the prefix with this hash."""
        return self._by_hash.get(block_hash)

    def eviction_order(self) -> Iterator[int]:
        """Available blocks, the next to be taken first. Not valid after the pool changes."""
        block = self._next[_HEAD]
        while block != _HEAD:
            yield block
            block = self._next[block]

    def take(self, blocks: Iterable[int]) -> None:
        """Reference available blocks for writing; what they cached is forgotten.

        Raises:
            PoolError: one of them is referenced.
        """
        for block in blocks:
            if self._references[block] or block == _HEAD:
                raise PoolError(f"block {block} is taken while it is referenced")
            self._unlink(block)
            self._forget(block)
            self._references[block] = 1

    def acquire(self, blocks: Iterable[int]) -> None:
        """Reference blocks for reading (prefix hits); what they hold stays."""
        for block in blocks:
            if not self._references[block]:
                self._unlink(block)
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block of a sequence, given in the order of the sequence.

        What becomes free is evicted children before parents: published blocks go to the far end of the free list,
        the last of the sequence first; blocks that hold nothing reusable go to the near end.

        Raises:
            PoolError: one of them is not referenced.
        """
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise PoolError(f"block {block} is released while nobody references it")
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._hash[block] is None:
                self._link_after(_HEAD, block)
            else:
                self._link_after(self._previous[_HEAD], block)

    def publish(self, block: int, block_hash: bytes) -> None:
        """Say that a referenced block holds the computed prefix with this hash.

        When another block holds the same prefix already, this one stays unpublished.

        Raises:
            PoolError: nobody references the block, or it was published under another hash.
        """
        if not self._references[block]:
            raise PoolError(f"block {block} is published while nobody references it")
        if self._hash[block] not in (None, block_hash):
            raise PoolError(f"block {block} is published twice under different hashes")
        if block_hash not in self._by_hash:
            self._by_hash[block_hash] = block
            self._hash[block] = block_hash

    def flush(self) -> int:
        """Forget every cached prefix that nobody references; returns how many blocks that were."""
        cached = [block for block in self.eviction_order() if self._hash[block] is not None]
        for block in cached:
            self._forget(block)
        self._num_cached = 0
        return len(cached)

    def check_invariants(self) -> None:
        """Verify the accounting (invariants 1, 3, 4 and 11 of the design's list).

        Raises:
            PoolError: naming the first thing that does not hold.
        """
        listed = list(self.eviction_order())
        if len(listed) != len(set(listed)) or len(listed) != self._num_free:
            raise PoolError(f"free list has {len(listed)} entries, counter says {self._num_free}")
        for block in (_HEAD, *listed):
            if self._previous[self._next[block]] != block:
                raise PoolError(f"links around block {block} disagree")
        free = set(listed)
        for block in range(1, self.num_blocks + 1):
            if (self._references[block] == 0) != (block in free):
                raise PoolError(f"block {block} has {self._references[block]} references, free: {block in free}")
            block_hash = self._hash[block]
            if block_hash is not None and self._by_hash.get(block_hash) != block:
                raise PoolError(f"block {block} carries a hash that the map does not know")
        if sum(value is not None for value in self._hash) != len(self._by_hash):
            raise PoolError("the hash map has entries that no block carries")
        if sum(self._hash[block] is not None for block in listed) != self._num_cached:
            raise PoolError("the counter of cached blocks is off")
        if self._references[_HEAD] or self._hash[_HEAD] is not None:
            raise PoolError("the null block is in use")

    def _forget(self, block: int) -> None:
        block_hash = self._hash[block]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hash[block] = None

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self._num_free -= 1
        self._num_cached -= self._hash[block] is not None

    def _link_after(self, before: int, block: int) -> None:
        after = self._next[before]
        self._next[before] = self._previous[after] = block
        self._previous[block], self._next[block] = before, after
        self._num_free += 1
        self._num_cached += self._hash[block] is not None
