"""The block pool against a naive model that keeps whole prefixes and looks at everything (invariants 1-18, 40)."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pawl_server.kv.block_hash import CacheRoot, HashChain, root_hash
from pawl_server.kv.block_pool import BlockPool, PoolError
from pawl_server.kv.draft import BlockDraft
from pawl_server.kv.events import PrefixesUnknown, PrefixRemoved, PrefixStored
from tests.fakes.naive_cache import NaiveCache

NUM_BLOCKS = 9
BLOCK_SIZE = 2
HALF_LIFE_S = 10.0
TENANTS = ("ada", "bob")


def root_of(namespace: int) -> bytes:
    """Namespaces 0 and 1 are two salts of one tenant, 2 is the other's."""
    return root_hash(CacheRoot("model", "float32", BLOCK_SIZE), bytes([namespace]))


@dataclass
class Sequence:
    """A sequence as a scheduler has it."""

    namespace: int
    tokens: list[int]
    chain: HashChain
    table: list[int] = field(default_factory=list)
    computed: int = 0
    in_flight: tuple[int, int] | None = None  # step, tokens
    number: int = 0

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return TENANTS[self.namespace // 2]


class PoolMachine(RuleBasedStateMachine):
    """Plans with shares, takes, announcements, forks and victims; steps that end well or fail; hints; time."""

    pool_class: type[BlockPool] = BlockPool
    draft_class: type[BlockDraft] = BlockDraft

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.pool_class(NUM_BLOCKS, retained_share=0.5, half_life_s=HALF_LIFE_S, max_events=1000)
        self.model = NaiveCache(NUM_BLOCKS, BLOCK_SIZE, HALF_LIFE_S, int(0.5 * NUM_BLOCKS))
        self.going: list[Sequence] = []
        self.step = self.num_sequences = 0
        self.now = 0.0
        self.replica: set[bytes] = set()  # what a reader of the events believes is there

    @rule(
        starts=st.lists(
            st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), min_size=1, max_size=9), st.integers(1, 9)),
            min_size=1,
            max_size=3,
        ),
        victim=st.none() | st.integers(0, 8),
    )
    def plan(self, starts: list[tuple[int, list[int], int]], victim: int | None) -> None:
        """A step: perhaps a victim gives way, then some start, each sharing what those before it will compute."""
        before = list(self.pool.eviction_order())
        self.step += 1
        draft = self.draft_class(self.pool)
        added: list[Sequence] = []
        idle = [sequence for sequence in self.going if sequence.in_flight is None]
        out = idle[victim % len(idle)] if victim is not None and idle else None
        self.pool.advance(self.now)
        if out is not None:
            draft.release(out.table)
            self.model.release(out.table)
            self.going.remove(out)
        for namespace, tokens, grant in starts:
            # Tenants' claims are weighed as the pool has them: what this draft itself does counts from the next on.
            sequence = self._start(draft, namespace, tokens, grant, exact=out is None and not added)
            if sequence is not None:
                added.append(sequence)
        assert list(self.pool.eviction_order()) == before, "planning changed the pool"
        draft.apply(self.step, self.now)
        self.going += added

    def _start(
        self, draft: BlockDraft, namespace: int, tokens: list[int], grant: int, *, exact: bool
    ) -> Sequence | None:
        sequence = Sequence(namespace, tokens, HashChain(root_of(namespace), BLOCK_SIZE, TENANTS[namespace // 2]))
        sequence.chain.extend(tokens, len(tokens) // BLOCK_SIZE)
        most = (len(tokens) - 1) // BLOCK_SIZE
        hits = draft.prefix_hits(sequence.chain, most)
        assert hits == self.model.find(namespace, tokens, most)
        cached = len(hits) * BLOCK_SIZE
        reach = min(len(tokens), cached + grant)
        missing = -(-reach // BLOCK_SIZE) - len(hits)
        unused = sum(not block.holders for block in self.model.blocks.values())
        assert draft.num_available == unused
        cost = missing + draft.num_free_among(hits)
        if cost > draft.num_available:
            assert missing + sum(not self.model.blocks[block].holders for block in hits) > unused
            return None
        order = [block for block in self.model.order() if block not in hits]
        draft.share(hits)
        self.model.share(hits)
        blocks = draft.take(missing)
        assert blocks is not None, "the fit test said that there is room"
        if exact:
            assert blocks == order[:missing]
        empty = sum(self.model.blocks[block].prefix is None for block in order)
        taken_empty = sum(self.model.blocks[block].prefix is None for block in blocks)
        assert taken_empty == min(missing, empty), "a cached block went before an empty one"
        for block in blocks:
            self.model.take(block)
        self.num_sequences += 1
        sequence.table, sequence.number, sequence.computed = hits + blocks, self.num_sequences, cached
        sequence.in_flight = (self.step, reach - cached)
        full = reach // BLOCK_SIZE
        draft.announce(sequence.chain, len(hits), sequence.table[len(hits) : full], sequence.number)
        for index in range(len(hits), full):
            prefix = (namespace, tuple(tokens[: (index + 1) * BLOCK_SIZE]))
            self.model.name(sequence.table[index], prefix, sequence.tenant, self.step, sequence.number)
        return sequence

    @precondition(lambda self: any(sequence.in_flight for sequence in self.going))
    @rule()
    def settle(self) -> None:
        """The oldest step in flight is done."""
        step = min(sequence.in_flight[0] for sequence in self.going if sequence.in_flight)
        self.pool.settle(step)
        for block in self.model.blocks.values():
            if block.pending_step is not None and block.pending_step <= step:
                block.pending_step = None
        for sequence in self.going:
            if sequence.in_flight and sequence.in_flight[0] == step:
                sequence.computed += sequence.in_flight[1]
                sequence.in_flight = None

    @precondition(lambda self: any(sequence.in_flight for sequence in self.going))
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A producer fails; who relies on it, directly or not, starts again."""
        failed = [data.draw(st.sampled_from([s for s in self.going if s.in_flight]))]
        while failed:
            sequence = failed.pop()
            assert sequence.in_flight is not None
            own = [block for block in sequence.table if self.model.blocks[block].producer == sequence.number]
            own = [block for block in own if self.model.blocks[block].pending_step is not None]
            assert sorted(self.pool.retract(sequence.in_flight[0], sequence.number)) == sorted(own)
            assert not any(map(self.pool.has_name, own)), "what failed is still found"
            for block in own:
                self.model.clear(block)
            self.pool.release(sequence.table)
            self.model.release(sequence.table)
            self.going.remove(sequence)
            failed += [s for s in self.going if s not in failed and s.in_flight and not set(own).isdisjoint(s.table)]

    @rule()
    def lose_worker(self) -> None:
        """Every step in flight fails; all that run start again, the cache is emptied, steps count from 1."""
        for step in sorted({s.in_flight[0] for s in self.going if s.in_flight}, reverse=True):
            self.pool.retract(step)
        assert not self.pool.pending_steps()
        for number, block in self.model.blocks.items():
            if block.pending_step is not None:
                self.model.clear(number)
        for sequence in self.going:
            self.pool.release(sequence.table)
            self.model.release(sequence.table)
        self.going = []
        self.flush()
        self.step = 0

    @precondition(lambda self: any(sequence.in_flight is None for sequence in self.going))
    @rule(data=st.data(), keep=st.none() | st.floats(0.5, 30.0))
    def finish(self, data: st.DataObject, keep: float | None) -> None:
        """Children become evictable before parents; a hint keeps the beginning."""
        sequence = data.draw(st.sampled_from([s for s in self.going if s.in_flight is None]))
        if keep is not None:
            assert self.pool.retain(sequence.table, self.now + keep) == self.model.keep(sequence.table, self.now + keep)
        self.pool.release(sequence.table)
        self.model.release(sequence.table)
        self.going.remove(sequence)

    @precondition(lambda self: any(s.in_flight is None for s in self.going))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """Full blocks are shared, a partial one is copied into the block that the new sequence has of its own."""
        parent = data.draw(st.sampled_from([s for s in self.going if s.in_flight is None]))
        num_tokens = data.draw(st.integers(1, parent.computed))
        full, rest = divmod(num_tokens, BLOCK_SIZE)
        draft = self.draft_class(self.pool)
        order = self.model.order()
        own = draft.take(1)
        if own is None:
            assert not order
            return
        table = draft.fork(parent.table, num_tokens, BLOCK_SIZE, own[0])
        assert table == [*parent.table[:full], order[0]]
        assert draft.copies == ([(parent.table[full], order[0])] if rest else [])
        self.model.share(table[:full])
        self.model.take(table[full])
        draft.apply(self.step, self.now)
        child = Sequence(parent.namespace, parent.tokens[:num_tokens], parent.chain, table, num_tokens)
        self.going.append(child)

    @rule(seconds=st.floats(0.25, 20.0))
    def tick(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.pool.advance(self.now)
        self.model.advance(self.now)

    @rule()
    def flush(self) -> None:
        """Forgets exactly the cached blocks that nobody holds; nobody finds them again."""
        cached = [n for n in self.model.order() if self.model.blocks[n].prefix is not None]
        assert self.pool.flush() == len(cached)
        for number in cached:
            self.model.clear(number)
            self.model.plain.insert(0, number)
        assert self.pool.num_cached == 0

    @invariant()
    def holds(self) -> None:
        """Counters, links, references, names and order agree with the model."""
        self.pool.check_invariants()
        for number, block in self.model.blocks.items():
            held = sum(sequence.table.count(number) for sequence in self.going)
            assert self.pool.references(number) == block.holders == held
            assert self.pool.has_name(number) == (block.prefix is not None)
            computed = block.prefix is not None and block.pending_step is None
            assert (self.pool.hash_of(number) is not None) == computed
        assert list(self.pool.eviction_order()) == self.model.order()
        for tenant in TENANTS:
            assert self.pool.num_published(tenant) == self.model.owned().get(tenant, 0)
        marked = [block for block in self.model.blocks.values() if block.kept_until is not None]
        assert self.pool.num_retained == len(marked) <= int(0.5 * NUM_BLOCKS)

    @invariant()
    def events(self) -> None:
        """Who replays the events knows exactly what is published."""
        for event in self.pool.events.drain():
            match event:
                case PrefixStored(name, parent, namespace, num_tokens):
                    assert name not in self.replica
                    assert num_tokens == BLOCK_SIZE
                    assert namespace in {root_of(n) for n in range(3)}
                    assert len(parent) == len(namespace)
                    self.replica.add(name)
                case PrefixRemoved(name):
                    self.replica.remove(name)
                case PrefixesUnknown():
                    raise AssertionError("the buffer is large enough")
        names = [self.pool.hash_of(number) for number in range(1, NUM_BLOCKS + 1)]
        assert self.replica == {name for name in names if name is not None}

    def teardown(self) -> None:
        """When all have ended, every block is free and no tenant has one referenced."""
        for sequence in self.going:
            self.pool.release(sequence.table)
        self.pool.check_invariants()
        assert self.pool.num_available == NUM_BLOCKS
        self.pool.flush()
        assert all(self.pool.num_published(tenant) == 0 for tenant in TENANTS)
        assert self.pool.num_retained == 0


PoolMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40)
TestPool = PoolMachine.TestCase


def test_misuse_is_an_error_and_changes_nothing() -> None:
    pool = BlockPool(3)
    chain = HashChain(root_of(0), 1)
    chain.extend([1, 2], 2)
    pool.take([1])
    with pytest.raises(PoolError):
        pool.take([1])
    with pytest.raises(PoolError):
        pool.take([0])
    with pytest.raises(PoolError):
        pool.release([1, 2])
    assert pool.references(1) == 1
    with pytest.raises(PoolError):
        pool.publish(2, chain, 0)
    pool.publish(1, chain, 0)
    with pytest.raises(PoolError):
        pool.publish(1, chain, 1)
    pool.check_invariants()
    pool.release([1])
    with pytest.raises(PoolError):
        pool.release([1])
    with pytest.raises(PoolError):
        BlockDraft(pool).fork([1], 1, 1, 2)
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
    with pytest.raises(PoolError):
        draft.release([1])
    draft.apply()
    pool.check_invariants()
    assert pool.num_used == 2


def test_a_failed_lookup_goes_on_where_it_ended() -> None:
    """The chain keeps its cursor while others publish, and finds a block that came or went."""
    pool = BlockPool(8)
    chains = [HashChain(root_of(0), 1) for _ in range(2)]
    for chain in chains:
        chain.extend([1, 2, 3, 4], 4)
    pool.take([1, 2, 3])
    pool.publish(1, chains[0], 0)
    assert pool.find(chains[1]) == [1]
    pool.publish(3, chains[0], 2)
    assert pool.find(chains[1]) == [1]
    pool.publish(2, chains[0], 1)
    assert pool.find(chains[1]) == [1, 2, 3]
    pool.release([1, 2, 3])
    pool.take([2])
    assert pool.find(chains[1]) == [1]
    pool.flush()
    assert pool.find(chains[1]) == []
