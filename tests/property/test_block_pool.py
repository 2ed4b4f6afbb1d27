"""The block pool against a naive model that keeps plain sets and lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pawl_server.kv.block_hash import CacheRoot, HashChain, root_hash
from pawl_server.kv.block_pool import BlockPool, PoolError
from pawl_server.kv.draft import BlockDraft

NUM_BLOCKS = 7


class PoolMachine(RuleBasedStateMachine):
    """Sequences take, share, publish and release; the model knows who holds what and what is cached in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[list[int]] = []
        self.cached: list[tuple[int, bytes]] = []  # free blocks with a hash, the next to be evicted first
        self.published: dict[int, bytes] = {}
        self.next_name = 0

    @rule(count=st.integers(1, 3))
    def take(self, count: int) -> None:
        """Unhashed blocks go first, then the least recently used."""
        draft = BlockDraft(self.pool)
        blocks = draft.take(count)
        in_use = {block for blocks in self.held for block in blocks}
        if count > NUM_BLOCKS - len(in_use):
            assert blocks is None
            return
        assert blocks is not None
        draft.apply()
        num_plain = NUM_BLOCKS - len(in_use) - len(self.cached)
        evicted = [block for block, _ in self.cached[: max(0, count - num_plain)]]
        assert blocks[min(count, num_plain) :] == evicted
        for block in evicted:
            del self.published[block]
        self.cached = self.cached[len(evicted) :]
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """A held block gets a name of its own."""
        block = data.draw(st.sampled_from([b for blocks in self.held for b in blocks]))
        if block not in self.published:
            name = self.next_name.to_bytes(4, "little")
            self.next_name += 1
            self.pool.publish(block, name)
            self.published[block] = name

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """A hit references the block that holds the name."""
        block = data.draw(st.sampled_from(sorted(self.published)))
        assert self.pool.lookup(self.published[block]) == block
        self.pool.acquire([block])
        self.cached = [entry for entry in self.cached if entry[0] != block]
        self.held.append([block])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Children become evictable before parents."""
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)
        in_use = {block for others in self.held for block in others}
        self.cached += [(b, self.published[b]) for b in reversed(blocks) if b not in in_use and b in self.published]

    @rule()
    def flush(self) -> None:
        """Forgets exactly the cached blocks."""
        assert self.pool.flush() == len(self.cached)
        for block, _ in self.cached:
            del self.published[block]
        self.cached = []

    @rule()
    def dropped_draft(self) -> None:
        """A draft that is not applied leaves no trace."""
        before = list(self.pool.eviction_order())
        draft = BlockDraft(self.pool)
        draft.take(1)
        if self.held:
            draft.release(self.held[0])
        assert list(self.pool.eviction_order()) == before

    @invariant()
    def holds(self) -> None:
        """Counters and links agree with the model."""
        self.pool.check_invariants()
        in_use = {block for blocks in self.held for block in blocks}
        assert self.pool.num_used == len(in_use)
        assert self.pool.num_cached == len(self.cached)
        order = [block for block in self.pool.eviction_order() if self.pool.hash_of(block) is not None]
        assert order == [block for block, _ in self.cached]


TestPool = PoolMachine.TestCase


def test_misuse_is_an_error_and_changes_nothing() -> None:
    pool = BlockPool(2)
    pool.take([1])
    with pytest.raises(PoolError):
        pool.take([1])
    with pytest.raises(PoolError):
        pool.release([2])
    with pytest.raises(PoolError):
        pool.publish(2, b"x")
    pool.check_invariants()
    pool.release([1])
    with pytest.raises(PoolError):
        pool.release([1])
    with pytest.raises(PoolError):
        BlockPool(0)


def test_a_draft_takes_what_its_own_releases_free() -> None:
    pool = BlockPool(2)
    pool.take([1, 2])
    draft = BlockDraft(pool)
    assert draft.take(1) is None
    draft.release([1, 2])
    assert draft.num_available == 2
    taken = draft.take(2)
    assert sorted(taken or []) == [1, 2]
    draft.apply()
    pool.check_invariants()
    assert pool.num_used == 2


@given(st.lists(st.integers(0, 3), min_size=8, max_size=24), st.integers(1, 4), st.data())
def test_equal_names_mean_equal_prefixes(tokens: list[int], block_size: int, data: st.DataObject) -> None:
    """Names agree exactly as far as tokens do, in whole blocks, and never over a difference in the root."""
    other = data.draw(st.lists(st.integers(0, 3), min_size=len(tokens), max_size=len(tokens)))
    root = root_hash(CacheRoot("m", "float32", block_size), b"tenant")
    chains = [HashChain(root, block_size) for _ in range(2)]
    for chain, ids in zip(chains, (tokens, other), strict=True):
        for blocks in range(len(tokens) // block_size + 1):  # extended piece by piece, as tokens come
            chain.extend(ids, blocks)
    for index in range(len(chains[0])):
        end = (index + 1) * block_size
        assert (chains[0][index] == chains[1][index]) == (tokens[:end] == other[:end])


def test_no_field_of_the_root_can_pose_as_another() -> None:
    base = CacheRoot("model", "float32", 16, "adapter")
    roots = [
        root_hash(base, b"tenant"),
        root_hash(base, b"tenan"),
        root_hash(CacheRoot("model", "float32", 16, "tenant"), b"adapter"),
        root_hash(CacheRoot("model", "float16", 16, "adapter"), b"tenant"),
        root_hash(CacheRoot("modelfloat32", "", 16, "adapter"), b"tenant"),
        root_hash(CacheRoot("model", "float32", 32, "adapter"), b"tenant"),
    ]
    assert len(set(roots)) == len(roots)
