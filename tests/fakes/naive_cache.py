"""A prefix cache without any index: it keeps whole prefixes in plain lists and finds everything by looking at all.

The oracle of the block pool. A prefix is (namespace, tokens); sizes are small, so nothing here is fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Prefix = tuple[int, tuple[int, ...]]


@dataclass
class NaiveBlock:
    """One block: who holds it, what it holds, and since when it is free."""

    holders: int = 0
    prefix: Prefix | None = None
    tenant: str = ""
    pending_step: int | None = None
    producer: int = 0
    freed_at: int = 0
    kept_until: float | None = None


@dataclass
class NaiveCache:
    """All blocks of a pool, by number from 1."""

    num_blocks: int
    block_size: int
    half_life_s: float
    budget: int
    now: float = 0.0
    blocks: dict[int, NaiveBlock] = field(default_factory=dict)
    plain: list[int] = field(default_factory=list)  # free and empty, the next to be taken first
    last_used: dict[str, float] = field(default_factory=dict)
    frees: int = 0

    def __post_init__(self) -> None:
        self.blocks = {number: NaiveBlock() for number in range(1, self.num_blocks + 1)}
        self.plain = list(self.blocks)

    def find(self, namespace: int, tokens: list[int], most: int) -> list[int]:
        """The longest chain of blocks that hold beginnings of these tokens."""
        hits: list[int] = []
        while len(hits) < min(most, len(tokens) // self.block_size):
            wanted = (namespace, tuple(tokens[: (len(hits) + 1) * self.block_size]))
            found = [number for number, block in self.blocks.items() if block.prefix == wanted]
            if not found:
                break
            hits += found
        return hits

    def order(self) -> list[int]:
        """Free blocks, the next to be taken first."""
        free = {n: b for n, b in self.blocks.items() if not b.holders and b.prefix is not None}
        kept = sorted((n for n, b in free.items() if b.kept_until is not None), key=lambda n: free[n].freed_at)
        order = list(self.plain)
        owned = self.owned()
        left = [n for n in free if n not in kept]
        while left:
            heads = {free[n].tenant: n for n in sorted(left, key=lambda n: -free[n].freed_at)}  # the oldest of each
            chosen = min(
                heads.values(),
                key=lambda n: (
                    self.last_used[free[n].tenant] / self.half_life_s - math.log2(owned[free[n].tenant]),
                    free[n].freed_at,
                ),
            )
            owned[free[chosen].tenant] -= 1
            left.remove(chosen)
            order.append(chosen)
        return order + kept

    def owned(self) -> dict[str, int]:
        """Blocks with a prefix, by tenant."""
        counts: dict[str, int] = {}
        for block in self.blocks.values():
            if block.prefix is not None:
                counts[block.tenant] = counts.get(block.tenant, 0) + 1
        return counts

    def advance(self, now: float) -> None:
        """Time passes; what was to be kept until then counts as used then, the children first."""
        self.now = now
        over = [n for n, b in self.blocks.items() if b.kept_until is not None and b.kept_until <= now]
        for number in sorted(over, key=lambda n: (self.blocks[n].kept_until or 0.0, -self.depth(n))):
            block = self.blocks[number]
            block.kept_until = None
            if not block.holders:
                self.frees += 1
                block.freed_at = self.frees

    def depth(self, number: int) -> int:
        """Place of a block in its sequence."""
        prefix = self.blocks[number].prefix
        return 0 if prefix is None else len(prefix[1])

    def take(self, number: int) -> None:
        """Hold a free block for writing."""
        block = self.blocks[number]
        assert not block.holders
        if block.prefix is None:
            self.plain.remove(number)
        self.clear(number)
        block.holders = 1

    def share(self, hits: list[int]) -> None:
        """Hold blocks for reading."""
        for number in hits:
            self.blocks[number].holders += 1
        if hits and self.blocks[hits[-1]].prefix is not None:
            self.last_used[self.blocks[hits[-1]].tenant] = self.now

    def clear(self, number: int) -> None:
        """Forget what a block holds."""
        block = self.blocks[number]
        block.prefix = block.pending_step = block.kept_until = None

    def name(self, number: int, prefix: Prefix, tenant: str, step: int, producer: int) -> None:
        """Say what a held block holds, or will hold when the step is done; the first to say so wins."""
        if all(block.prefix != prefix for block in self.blocks.values()):
            block = self.blocks[number]
            block.prefix, block.tenant, block.pending_step, block.producer = prefix, tenant, step, producer
            self.last_used[tenant] = self.now

    def release(self, table: list[int]) -> None:
        """Let the blocks of a sequence go, the last first."""
        for number in reversed(table):
            block = self.blocks[number]
            block.holders -= 1
            if block.holders:
                continue
            if block.pending_step is not None:
                self.clear(number)
            if block.prefix is None:
                self.plain.insert(0, number)
            else:
                self.frees += 1
                block.freed_at = self.frees
                self.last_used[block.tenant] = self.now

    def keep(self, table: list[int], until: float) -> int:
        """Mark the beginning of a sequence, as far as its tenant may; gives how many blocks that were."""
        for place, number in enumerate(table):
            block = self.blocks[number]
            if block.prefix is None:
                return place
            marked = [b for b in self.blocks.values() if b.kept_until is not None]
            own = sum(b.tenant == block.tenant for b in marked)
            if block.kept_until is None and own >= self.budget - len(marked):
                return place
            block.kept_until = max(until, block.kept_until or 0.0)
        return len(table)
