"""Bugs planted in the scheduler, one at a time: the traces of its property tests must fail over each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pawl_server.kv.block_hash import HashChain
from pawl_server.kv.block_pool import BlockPool, PoolError
from pawl_server.kv.draft import BlockDraft
from pawl_server.scheduler import committer, draft_grants, planner, priority, starts
from pawl_server.scheduler.committer import StaleResultError
from pawl_server.scheduler.fit import Room
from pawl_server.scheduler.invariants import InvariantError
from pawl_server.scheduler.ledger import LedgerEntry
from pawl_server.scheduler.queues import Cursor
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.slots import BoolArray, IntArray, SlotTable
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import StepResult
from tests.fakes.scheduler_traces import play

NUM_TRACES = 120


def run_traces() -> None:
    """As many of those that `test_traces` plays, from the first."""
    for seed in range(NUM_TRACES):
        play(seed)


_RELEASE = BlockPool.release


def _free_twice(pool: BlockPool, blocks: Sequence[int]) -> None:
    """One reference too many is dropped of a block that others hold."""
    _RELEASE(pool, blocks)
    _RELEASE(pool, [block for block in blocks if pool.references(block)][:1])


def _free_parents_first(pool: BlockPool, blocks: Sequence[int]) -> None:
    """A sequence is freed from its beginning, which is evicted first then."""
    _RELEASE(pool, blocks[::-1])


def _publish_before_compute(
    pool: BlockPool, block: int, chain: HashChain, index: int, step: int, producer: int = 0
) -> None:
    """What is announced is taken for computed."""
    del step, producer
    BlockPool.publish(pool, block, chain, index)


def _forget_free_hits(draft: BlockDraft, blocks: Sequence[int]) -> int:
    """Cached blocks that nobody holds cost nothing in the fit test."""
    del draft, blocks
    return 0


def _find_the_first(pool: BlockPool, chain: HashChain) -> list[int]:
    """A lookup ends after one block."""
    return [block for name in chain.names[:1] if (block := pool.lookup(name)) is not None]


def _drop_late(*_: object) -> None:
    """Tokens of those preempted in flight are lost."""


def _everybody_alive(entry: LedgerEntry, slots: SlotTable) -> BoolArray:
    """A result is given to whoever has the row now."""
    return np.asarray(slots.length[entry.rows] > 0, dtype=np.bool_)


def _oldest_first(slots: SlotTable, rows: IntArray) -> list[int]:
    """Nobody is protected, and the class does not count."""
    oldest: list[int] = rows[np.argsort(slots.order[rows])].tolist()
    return oldest


def _anybody_gives_way(state: SchedulerState, highest: int) -> BoolArray:
    """Whoever waits first takes the blocks of any class."""
    del highest
    return np.asarray(state.slots.length > 0, dtype=np.bool_)


def _anybody_fits(*_: object, **__: object) -> bool:
    """The fit test counts nothing."""
    return True


def _all_hits(sequence: SequenceState, block_size: int) -> int:
    """Nothing is left to compute of a prompt that is cached as a whole."""
    return -(-sequence.num_tokens // block_size)


def _keep_what_was_lifted(*_: object) -> None:
    """What a pass over the queue lifted out of it is not put back."""


def _no_copy(draft: BlockDraft, blocks: list[int], num_tokens: int, block_size: int, own: int) -> list[int]:
    """A forked sequence finds nothing in its partial block."""
    full = num_tokens // block_size
    draft.share(blocks[:full])
    return [*blocks[:full], own]


def _share_all(draft: BlockDraft, blocks: list[int], num_tokens: int, block_size: int, own: int) -> list[int]:
    """A forked sequence writes into the block of another; its own is lost."""
    draft.share(blocks[: num_tokens // block_size + 1])
    return [*blocks[: num_tokens // block_size], blocks[num_tokens // block_size] if own else own]


def _keep_rows(state: SchedulerState, leader: SequenceState) -> None:
    """What is kept for parked sequences is lost with their leader."""
    del state, leader


def _keep_nothing(sequence: SequenceState, now: float) -> None:
    """A sequence that loses its KV does not say that it waits."""
    del now
    sequence.leave_row()


def _keep_rejected(entry: LedgerEntry, result: StepResult) -> IntArray:
    """Rejected drafts count as computed."""
    del result
    return np.zeros_like(entry.num_tokens)


def _publish_drafts(state: SchedulerState, entry: LedgerEntry, going: BoolArray, result: StepResult) -> IntArray:
    """What was drafted counts as computed, and is published, before it is known to be right."""
    del state, going, result
    return entry.num_tokens


def _hold_nothing_more(num_tokens: int, block_size: int) -> int:
    """Drafts get no blocks."""
    del num_tokens, block_size
    return 0


@pytest.mark.parametrize(
    ("where", "name", "bug"),
    [
        (BlockPool, "release", _free_twice),
        (BlockPool, "release", _free_parents_first),
        (BlockPool, "announce", _publish_before_compute),
        (BlockPool, "find", _find_the_first),
        (BlockDraft, "num_free_among", _forget_free_hits),
        (LedgerEntry, "rejected", _keep_rejected),
        (committer, "subtract_rejected", _publish_drafts),
        (draft_grants, "blocks_for", _hold_nothing_more),
        (committer, "deliver_late", _drop_late),
        (LedgerEntry, "alive", _everybody_alive),
        (planner, "victims_in_order", _oldest_first),
        (priority, "_may_give_way", _anybody_gives_way),
        (Room, "fits", _anybody_fits),
        (starts, "_max_hits", _all_hits),
        (Cursor, "__exit__", _keep_what_was_lifted),
        (SequenceState, "lose_kv", _keep_nothing),
        (BlockDraft, "fork", _no_copy),
        (BlockDraft, "fork", _share_all),
        (SchedulerState, "give_up_kept", _keep_rows),
    ],
)
def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch, where: object, name: str, bug: object) -> None:
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, InvariantError, PoolError, StaleResultError, LookupError, ValueError)):
        run_traces()
