"""A draft of copies to and from the host tier, laid over it and applied with the draft of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pawl_server.kv.host_tier import HostTier

__all__ = ["HostDraft"]


class HostDraft:
    """What a step would save to the host and bring back from it. Valid until the tier changes.

    Attributes:
        swap_out: (block, host block), copied first.
        swap_in: (host block, block), copied next.
    """

    __slots__ = ("_held", "_lost", "_order", "_saved", "_tier", "swap_in", "swap_out")

    def __init__(self, tier: HostTier) -> None:
        self._tier = tier
        self._order: Iterator[tuple[bytes | None, int]] | None = None
        self._held: dict[bytes, None] = {}  # prefixes that are brought back, which nothing may overwrite
        self._lost: set[bytes] = set()
        self._saved: list[tuple[bytes, int, bytes | None]] = []
        self.swap_out: list[tuple[int, int]] = []
        self.swap_in: list[tuple[int, int]] = []

    def save(self, block: int, name: bytes) -> None:
        """A cached block is overwritten in this step: copy it, if it pays and is not there yet."""
        tier = self._tier
        if not tier.cost.pays(_MANY):
            return
        if tier.find(name) is not None and name not in self._lost:
            self._held.setdefault(name)
            return
        if self._order is None:
            self._order = tier.order()
        for lost, place in self._order:
            if lost in self._held:
                continue
            if lost is not None:
                self._lost.add(lost)
            self._saved.append((name, place, lost))
            self.swap_out.append((block, place))
            return

    def num_found(self, names: Sequence[bytes]) -> int:
        """How many of these, from the first on, lie in the host, if bringing so many back pays; else 0."""
        count = 0
        for name in names:
            if self._tier.find(name) is None or name in self._lost:
                break
            count += 1
        return count if self._tier.cost.pays(count) else 0

    def hold(self, names: Sequence[bytes]) -> None:
        """These are brought back: nothing may overwrite them in this step."""
        self._held.update(dict.fromkeys(names))

    def bring(self, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Bring prefixes that were found back into these blocks."""
        for name, block in zip(names, blocks, strict=True):
            place = self._tier.find(name)
            if place is None:
                raise LookupError("a prefix is brought back that is not in the host")
            self.swap_in.append((place, block))

    def apply(self) -> None:
        """Change the tier."""
        for name in self._held:
            self._tier.use(name)
        for name, place, lost in self._saved:
            self._tier.store(name, place, lost)


_MANY = 1 << 20  # blocks: whether restoring pays at all, whatever a transfer costs
