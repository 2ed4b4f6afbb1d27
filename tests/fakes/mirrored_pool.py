"""A block pool whose every operation also happens to a naive model, and whose answers are compared with the model's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pawl_server.kv.block_hash import HashChain
from pawl_server.kv.block_pool import BlockPool
from pawl_server.scheduler.state import SchedulerState
from tests.fakes.naive_cache import NaiveCache, Prefix

__all__ = ["MirroredPool"]

_HALF_LIFE_S = 300.0
_ORDER_EVERY = 8  # checks: the model goes through all blocks for each block of the order


class MirroredPool(BlockPool):
    """The pool of a scheduler, beside a list of prefixes that is searched from end to end (invariant 40).

    Prefixes are taken from the tokens of the live sequences, not from the names under test.

    Args:
        state: a new scheduler; its pool is replaced by this one.
    """

    def __init__(self, state: SchedulerState) -> None:
        limits = state.limits
        super().__init__(
            limits.num_blocks, retained_share=limits.retained_share, half_life_s=_HALF_LIFE_S, host=state.pool.host
        )
        budget = int(limits.retained_share * limits.num_blocks)
        self.model = NaiveCache(limits.num_blocks, limits.block_size, _HALF_LIFE_S, budget)
        self.num_compared = self.num_found = 0
        self._num_checks = 0
        self._state = state
        state.pool = self

    def _tokens(self, chain: HashChain) -> tuple[int, list[int]]:
        """Namespace and known tokens of the sequence that a chain belongs to."""
        (sequence,) = [one for one in self._state.live.values() if one.chain is chain]
        return sequence.request.cache_key[0], sequence.tokens.tolist()

    def _prefix(self, chain: HashChain, index: int) -> Prefix:
        namespace, tokens = self._tokens(chain)
        return namespace, tuple(tokens[: (index + 1) * chain.block_size])

    def find(self, chain: HashChain) -> list[int]:
        found = super().find(chain)
        assert found == self.model.find(*self._tokens(chain), len(chain)), "another prefix is found than there is"
        self.num_compared += 1
        self.num_found += bool(found)
        return found

    def advance(self, now: float) -> None:
        super().advance(now)
        self.model.advance(self.now)

    def take(self, blocks: Iterable[int]) -> None:
        taken = list(blocks)
        super().take(taken)
        for block in taken:
            self.model.take(block)

    def acquire(self, blocks: Sequence[int]) -> None:
        super().acquire(blocks)
        for block in map(self.model.blocks.__getitem__, blocks):
            assert block.holders or block.prefix is not None, "a block is shared that holds nothing"
        self.model.share(list(blocks))

    def release(self, blocks: Sequence[int]) -> None:
        super().release(blocks)
        self.model.release(list(blocks))

    def announce(self, block: int, chain: HashChain, index: int, step: int, producer: int = 0) -> None:
        super().announce(block, chain, index, step, producer)
        if self.model.blocks[block].prefix is None:
            self.model.name(block, self._prefix(chain, index), chain.owner, step, producer)

    def publish(self, block: int, chain: HashChain, index: int) -> None:
        super().publish(block, chain, index)
        known = self.model.blocks[block]
        if known.prefix is None:
            self.model.name(block, self._prefix(chain, index), chain.owner, 0, 0)
        known.pending_step = None

    def settle(self, step: int) -> None:
        super().settle(step)
        for block in self.model.blocks.values():
            if block.pending_step is not None and block.pending_step <= step:
                block.pending_step = None

    def retract(self, step: int, producer: int | None = None) -> list[int]:
        broken = super().retract(step, producer)
        expected = [
            number
            for number, block in self.model.blocks.items()
            if block.pending_step == step and producer in (None, block.producer)
        ]
        assert sorted(broken) == expected, "other blocks are taken back than the step announced"
        for number in broken:
            self.model.clear(number)
        return broken

    def retain(self, blocks: Sequence[int], until: float) -> int:
        marked = super().retain(blocks, until)
        assert marked == self.model.keep(list(blocks), until)
        return marked

    def flush(self) -> int:
        cached = [number for number in self.model.order() if self.model.blocks[number].prefix is not None]
        num_flushed = super().flush()
        assert num_flushed == len(cached)
        for number in cached:
            self.model.clear(number)
            self.model.plain.insert(0, number)
        return num_flushed

    def check_invariants(self) -> None:
        super().check_invariants()
        for number, block in self.model.blocks.items():
            assert self.references(number) == block.holders
            assert self.has_name(number) == (block.prefix is not None)
            assert self.is_pending(number) == (block.pending_step is not None)
        self._num_checks += 1
        if self._num_checks % _ORDER_EVERY == 0:
            assert list(self.eviction_order()) == self.model.order(), "blocks are evicted in another order"
