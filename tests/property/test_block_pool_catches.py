"""Planted bugs: the suite of `test_block_pool` must fail over each of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from pawl_server.kv.block_hash import HashChain
from pawl_server.kv.block_pool import BlockPool, PoolError
from pawl_server.kv.draft import BlockDraft
from tests.property.test_block_pool import PoolMachine


class FreesTwice(BlockPool):
    """Drops one reference too many of a block that others hold."""

    def release(self, blocks: Sequence[int]) -> None:
        super().release(blocks)
        super().release([block for block in blocks if self.references(block)][:1])


class PublishesBeforeCompute(BlockPool):
    """Takes what is announced for computed."""

    def announce(self, block: int, chain: HashChain, index: int, step: int, producer: int = 0) -> None:
        del step, producer
        self.publish(block, chain, index)


class EvictsParentsFirst(BlockPool):
    """Frees a sequence from its beginning."""

    def release(self, blocks: Sequence[int]) -> None:
        super().release(blocks[::-1])


class KeepsWhatFailed(BlockPool):
    """Lets others find blocks whose producer failed."""

    def retract(self, step: int, producer: int | None = None) -> list[int]:
        return self._index.announced_by(step, producer)


class ForgetsNothing(BlockPool):
    """Empties the cache of everything but the last block."""

    def flush(self) -> int:
        cached = [block for block in self.eviction_order() if self.has_name(block)][:-1]
        self.take(cached)
        self.release(cached)
        return len(cached)


class HidesTenants(BlockPool):
    """Counts every block against one tenant."""

    def _own(self, block: int, chain: HashChain) -> None:
        anonymous = HashChain(chain.root, chain.block_size)
        super()._own(block, anonymous)


class KeepsForEver(BlockPool):
    """Lets no hint expire."""

    def advance(self, now: float) -> None:
        self.now = max(self.now, now)


class ForgetsFreeHits(BlockDraft):
    """Takes cached blocks that nobody holds for free of cost."""

    def num_free_among(self, blocks: Sequence[int]) -> int:
        del blocks
        return 0


class SharesWhatItTook(BlockDraft):
    """Finds prefixes in blocks that the same step overwrites."""

    def take(self, count: int) -> list[int] | None:
        blocks = super().take(count)
        self._nameless.clear()
        return blocks


class CopiesTheWrongWay(BlockDraft):
    """Copies a forked block over its source."""

    def fork(self, blocks: Sequence[int], num_tokens: int, block_size: int, own: int) -> list[int]:
        table = super().fork(blocks, num_tokens, block_size, own)
        self.copies = [(destination, source) for source, destination in self.copies]
        return table


@pytest.mark.parametrize(
    "planted",
    [
        FreesTwice, PublishesBeforeCompute, EvictsParentsFirst, KeepsWhatFailed, ForgetsNothing, HidesTenants,
        KeepsForEver, ForgetsFreeHits, SharesWhatItTook, CopiesTheWrongWay,
    ],
)  # fmt: skip
def test_a_planted_bug_is_found(planted: type[BlockPool] | type[BlockDraft]) -> None:
    class Planted(PoolMachine):
        pool_class = planted if issubclass(planted, BlockPool) else BlockPool
        draft_class = planted if issubclass(planted, BlockDraft) else BlockDraft

    found = settings(max_examples=2000, stateful_step_count=40, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, PoolError)):
        run_state_machine_as_test(Planted, settings=found)
