"""The second tier of the prefix cache: which prefix lies in which block of host memory, and when to bring it back.

A cached block that is about to be overwritten goes to the host; a prompt that needs it gets it back when that takes
less time than computing it again. Accounting only: a plan names the copies, the worker makes them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["HostTier", "RestoreCost"]


@dataclass(frozen=True, slots=True)
class RestoreCost:
    """What bringing blocks back takes against computing their tokens again; measured when the replica starts.

    Attributes:
        fixed_s: of a transfer of any number of blocks, seconds.
        block_s: of each block in it, seconds.
        token_s: of computing one token of a prompt in a large step, seconds.
        block_size: tokens of a block.
    """

    fixed_s: float
    block_s: float
    token_s: float
    block_size: int

    def pays(self, num_blocks: int) -> bool:
        """Whether restoring so many blocks is faster than computing them.

        Attention over what is before makes computing dearer than `token_s` says, so this errs on its side.
        """
        return num_blocks > 0 and self.fixed_s + num_blocks * self.block_s < num_blocks * self.block_size * self.token_s


class HostTier:
    """Prefixes by name in host blocks 0 to num_blocks - 1; the least recently stored or used gives way.

    Args:
        num_blocks: how many host blocks there are.
        cost: of a restore.
    """

    def __init__(self, num_blocks: int, cost: RestoreCost) -> None:
        self.num_blocks = num_blocks
        self.cost = cost
        self._places: OrderedDict[bytes, int] = OrderedDict()
        self._unused = list(range(num_blocks - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._places)

    def find(self, name: bytes) -> int | None:
        """Host block that holds a prefix."""
        return self._places.get(name)

    def order(self) -> Iterator[tuple[bytes | None, int]]:
        """What would be overwritten, in order: (prefix that would be lost, host block). Invalid after a change."""
        for place in reversed(self._unused):
            yield None, place
        yield from self._places.items()

    def store(self, name: bytes, place: int, lost: bytes | None) -> None:
        """A prefix was copied to a host block, over what `order` said is lost with it."""
        if lost is None:
            self._unused.remove(place)
        else:
            del self._places[lost]
        self._places[name] = place

    def use(self, name: bytes) -> None:
        """A prefix was copied back, or would have been stored again."""
        self._places.move_to_end(name)

    def clear(self) -> None:
        """Forget everything: the worker was reset, or the cache is emptied."""
        self._places.clear()
        self._unused = list(range(self.num_blocks - 1, -1, -1))

    def check(self) -> str | None:
        """The first thing that contradicts itself, None when there is none."""
        if sorted([*self._places.values(), *self._unused]) != list(range(self.num_blocks)):
            return "a host block is lost, or holds two prefixes"
        return None
