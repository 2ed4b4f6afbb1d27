"""A draft of block allocations, laid over the pool and applied whole or not at all.

Planning a step reads the pool and writes into a draft; `apply` is the only moment the pool changes. A draft that is
dropped leaves no trace, and an empty one costs nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from pawl_server.kv.block_hash import HashChain
from pawl_server.kv.block_pool import BlockPool, PoolError
from pawl_server.kv.host_draft import HostDraft

__all__ = ["BlockDraft"]

_RESTORED = -1  # producer of blocks that come from the host: no row, so that none fails with them


class BlockDraft:
    """Blocks that a step would release, share, take and copy. Valid until the pool changes.

    Attributes:
        copies: (source, destination) of blocks that the worker must copy after it has computed the step.
    """

    __slots__ = (
        "_announced",
        "_changes",
        "_freed",
        "_freed_plain",
        "_hits",
        "_host",
        "_nameless",
        "_num_available",
        "_pending",
        "_pool",
        "_released",
        "_taken",
        "_walk",
        "copies",
    )  # fmt: skip

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._num_available = pool.num_available
        self._walk: Iterator[int] | None = None  # of the pool's order, as far as it was taken from
        self._changes: dict[int, int] = {}  # of references, where there was one
        self._released: list[Sequence[int]] = []
        self._freed_plain: list[int] = []  # freed by the releases and of no further use, the next to be taken last
        self._freed: deque[int] = deque()  # freed by the releases and cached: taken after the pool's
        self._hits: list[int] = []
        self._taken: list[int] = []
        self._nameless: set[int] = set()  # those taken or given up that the pool still knows a name of
        self._pending: dict[bytes, int] = {}
        self._announced: list[tuple[int, HashChain, int, int]] = []
        self._host = None if pool.host is None else HostDraft(pool.host)
        self.copies: list[tuple[int, int]] = []

    @property
    def swap_out(self) -> list[tuple[int, int]]:
        """(block, host block) that the worker must copy first of all."""
        return [] if self._host is None else self._host.swap_out

    @property
    def swap_in(self) -> list[tuple[int, int]]:
        """(host block, block) that the worker must copy next."""
        return [] if self._host is None else self._host.swap_in

    @property
    def num_available(self) -> int:
        """Blocks that could still be taken."""
        return self._num_available

    def _count(self, block: int) -> int:
        return self._pool.references(block) + self._changes.get(block, 0)

    def prefix_hits(self, chain: HashChain, max_blocks: int) -> list[int]:
        """The longest cached prefix, at most `max_blocks` full blocks: the blocks that hold it, in order.

        Finds also what launched steps and this draft itself have announced, and not what this draft has taken.
        """
        hits = self._pool.find(chain)[:max_blocks]
        if self._nameless and not self._nameless.isdisjoint(hits):
            hits = hits[: next(place for place, block in enumerate(hits) if block in self._nameless)]
        if self._pending:
            end = min(max_blocks, len(chain))
            while len(hits) < end and (block := self._lookup(chain.names[len(hits)])) is not None:
                hits.append(block)
        return hits

    def _lookup(self, name: bytes) -> int | None:
        block = self._pending.get(name)
        if block is None:
            block = self._pool.lookup(name)
            if block in self._nameless:
                return None
        return block

    def host_hits(self, chain: HashChain, begin: int, max_blocks: int) -> int:
        """How many blocks of a chain, from `begin` up to `max_blocks`, are better brought back than computed."""
        return 0 if self._host is None else self._host.num_found(chain.names[begin:max_blocks])

    def restore(self, chain: HashChain, begin: int, count: int) -> list[int] | None:
        """Blocks for so many of the `host_hits`; the worker fills them before it computes the step.

        Others may share them at once. None, and nothing changes, when there are not as many blocks.
        """
        if not count or self._host is None or count > self._num_available:
            return None if count else []
        self._host.hold(chain.names[begin : begin + count])
        blocks = self.take(count)
        if blocks is not None:
            self._host.bring(chain.names[begin : begin + count], blocks)
            self.announce(chain, begin, blocks, _RESTORED)
        return blocks

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody holds: sharing them takes them out of what is available."""
        if not self._changes:
            return self._pool.num_free_among(blocks)
        return sum(not self._count(block) for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Reference blocks found by `prefix_hits`."""
        for block in blocks:
            if not self._count(block):
                self._num_available -= 1
            self._changes[block] = self._changes.get(block, 0) + 1
        self._hits += blocks

    def take(self, count: int) -> list[int] | None:
        """Blocks to write, in eviction order; None (and nothing changes) when there are not as many."""
        if count > self._num_available:
            return None
        blocks = []
        for _ in range(count):
            block = self._next()
            self._changes[block] = self._changes.get(block, 0) + 1
            if self._pool.has_name(block):
                self._nameless.add(block)
                if self._host is not None and (name := self._pool.hash_of(block)) is not None:
                    self._host.save(block, name)
            blocks.append(block)
        self._taken += blocks
        self._num_available -= count
        return blocks

    def _next(self) -> int:
        while self._freed_plain:
            if not self._count(block := self._freed_plain.pop()):
                return block
        if self._walk is None:
            self._walk = self._pool.eviction_order()
        for block in self._walk:
            if not self._count(block):
                return block
        while self._count(block := self._freed.popleft()):
            pass
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Give back the blocks of a sequence, as `BlockPool.release` will.

        Raises:
            PoolError: this draft itself took one of them.
        """
        if self._taken and not set(self._taken).isdisjoint(blocks):
            raise PoolError(f"blocks {blocks} are released by the draft that takes them")
        self._released.append(tuple(blocks))
        for block in reversed(blocks):
            self._changes[block] = self._changes.get(block, 0) - 1
            if not self._count(block):
                self._num_available += 1
                if self._pool.hash_of(block) is not None:
                    self._freed.append(block)
                    continue
                self._freed_plain.append(block)
                if self._pool.has_name(block):  # its step is not done, and who would tell a reader that it failed?
                    self._nameless.add(block)

    def fork(self, blocks: Sequence[int], num_tokens: int, block_size: int, own: int) -> list[int]:
        """The blocks of a new sequence that begins with the first `num_tokens` tokens of another.

        Full blocks are shared, a partial one is copied by the worker after it has computed the step (copy on write).
        The tokens must be computed by this step or earlier ones; what becomes of their holder does not matter.

        Args:
            blocks: of the other sequence, in its order.
            num_tokens: that both have in common.
            block_size: tokens of a block.
            own: a block that the new sequence holds already, for what follows the full ones.

        Returns:
            The new table.

        Raises:
            PoolError: nobody holds one of the blocks.
        """
        num_full, rest = divmod(num_tokens, block_size)
        if not all(self._count(block) for block in (*blocks[: num_full + bool(rest)], own)):
            raise PoolError("a sequence is forked from or into blocks that nobody holds")
        self.share(blocks[:num_full])
        if rest:
            self.copies.append((blocks[num_full], own))
        return [*blocks[:num_full], own]

    def announce(self, chain: HashChain, begin: int, blocks: Sequence[int], producer: int = 0) -> None:
        """Say that the step fills blocks of a sequence, from its block `begin` on.

        Those planned after this one share them; `apply` announces them to the pool. Blocks that `chain` has no names
        for, since their tokens are not known, are passed over.
        """
        for index, block in zip(range(begin, len(chain)), blocks, strict=False):
            name = chain.names[index]
            if self._lookup(name) is None:  # a block that this step overwrites does not count
                self._pending[name] = block
                self._announced.append((block, chain, index, producer))

    def apply(self, step: int = 0, now: float = 0.0) -> None:
        """Change the pool: releases first, then shares, then takes, then announcements, those of `step`."""
        pool = self._pool
        pool.advance(now)
        for blocks in self._released:
            pool.release(blocks)
        if self._hits or self._taken:
            # A block that this draft both takes and shares is referenced by the taker first.
            taken = set(self._taken) if self._hits else set()
            pool.acquire([block for block in self._hits if block not in taken])
            pool.take(self._taken)
            pool.acquire([block for block in self._hits if block in taken])
        if self._host is not None:
            self._host.apply()
        for block, chain, index, producer in self._announced:
            pool.announce(block, chain, index, step, producer)
