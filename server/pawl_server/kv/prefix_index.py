"""Which block holds which prefix: published, or pending until the step that computes it is done.

Publication has two phases. A plan *announces* the blocks that its step fills; those who are planned after, in the
same step or a later one, may share them at once, since a worker runs its steps in order and every layer writes
before it reads. When the step is done the announcements are *settled*; when their producer fails they are *retracted*.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from pawl_server.kv.block_hash import HashChain
from pawl_server.kv.events import CacheEvents, PrefixRemoved, PrefixStored

__all__ = ["PrefixIndex"]


class _Pending(msgspec.Struct, frozen=True, gc=False):
    """What is announced of a block: the step that fills it, who in that step, and what it will be."""

    step: int
    producer: int
    stored: PrefixStored


class PrefixIndex:
    """Names of blocks, both ways. Knows no references.

    Attributes:
        events: what was stored and removed; pending blocks are neither.
    """

    def __init__(self, num_blocks: int, events: CacheEvents) -> None:
        self.events = events
        self._names: list[bytes | None] = [None] * (num_blocks + 1)
        self._blocks: dict[bytes, int] = {}
        self._pending: dict[int, _Pending] = {}
        self._unsettled: deque[tuple[int, int, bytes]] = deque()  # step, block, name; outdated entries are skipped
        self._num_removals = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def lookup(self, name: bytes) -> int | None:
        """Block that holds, or is about to hold, the prefix with this name."""
        return self._blocks.get(name)

    def name_of(self, block: int) -> bytes | None:
        """Name of what a block holds or is about to hold."""
        return self._names[block]

    def is_pending(self, block: int) -> bool:
        """Whether a block's name is announced and its step not done."""
        return block in self._pending

    def pending(self) -> Iterator[tuple[int, int]]:
        """Blocks that are pending, and their steps."""
        for block, entry in self._pending.items():
            yield block, entry.step

    def find(self, chain: HashChain) -> list[int]:
        """The longest beginning of a chain that is there: its blocks, in order. Not to be changed.

        Goes on where the last lookup of the chain ended: O(1) when nothing changed, O(blocks found) with a small
        constant when something was removed since.
        """
        num_removals, found = chain.found
        names, blocks = chain.names, self._blocks
        if num_removals != self._num_removals and found != list(map(blocks.get, names[: len(found)])):
            found = []
        place = len(found)
        while place < len(names) and (block := blocks.get(names[place])) is not None:
            found.append(block)
            place += 1
        chain.found = (self._num_removals, found)
        return found

    def announce(self, block: int, chain: HashChain, index: int, step: int, producer: int) -> bool:
        """Say that `step` will fill the block; False when another block has the name, or the block has one."""
        name = chain.names[index]
        if name in self._blocks or self._names[block] is not None:
            return False
        self._blocks[name] = block
        self._names[block] = name
        stored = PrefixStored(name, chain.parent(index), chain.root, chain.block_size)
        self._pending[block] = _Pending(step, producer, stored)
        self._unsettled.append((step, block, name))
        return True

    def settle(self, step: int) -> None:
        """The steps up to this one are done: what they announced is published."""
        unsettled = self._unsettled
        while unsettled:
            announced, block, name = unsettled[0]
            entry = self._pending.get(block)
            holds = entry is not None and entry.step == announced and entry.stored.name == name
            if holds and announced > step:
                break
            unsettled.popleft()
            if holds:
                self._settle(block)

    def _settle(self, block: int) -> None:
        entry = self._pending.pop(block)
        if self.events.wanted:
            self.events.add(entry.stored)

    def drop_unsettled(self, step: int) -> None:
        """A step failed, and those after it with it: their numbers may come again."""
        self._unsettled = deque(entry for entry in self._unsettled if entry[0] < step)

    def announced_by(self, step: int, producer: int | None) -> list[int]:
        """Blocks that are pending until a step is done, of one producer or of all."""
        return [
            block for block, entry in self._pending.items() if entry.step == step and producer in (None, entry.producer)
        ]

    def publish(self, block: int, chain: HashChain, index: int) -> bool:
        """Say that the block holds the prefix; False when another block has the name."""
        name = chain.names[index]
        if self._names[block] is not None:
            if block in self._pending:
                self._settle(block)
            return False
        if name in self._blocks:
            return False
        self._blocks[name] = block
        self._names[block] = name
        if self.events.wanted:
            self.events.add(PrefixStored(name, chain.parent(index), chain.root, chain.block_size))
        return True

    def forget(self, block: int) -> None:
        """Take the name from a block: it is evicted, or what was announced of it does not hold."""
        name = self._names[block]
        if name is None:
            return
        del self._blocks[name]
        self._names[block] = None
        self._num_removals += 1
        if self._pending.pop(block, None) is None and self.events.wanted:
            self.events.add(PrefixRemoved(name))

    def check(self) -> str | None:
        """The first thing that contradicts itself, None when there is none."""
        for block, name in enumerate(self._names):
            if name is not None and self._blocks.get(name) != block:
                return f"block {block} carries a name that the map does not know"
        if sum(name is not None for name in self._names) != len(self._blocks):
            return "the map has names that no block carries"
        if any(self._names[block] is None for block in self._pending):
            return "a pending block carries no name"
        return None
