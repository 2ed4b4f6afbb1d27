"""Bugs planted in the scheduler, one at a time: the traces of its property tests must fail over each."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pawl_server.kv.block_pool import PoolError
from pawl_server.kv.draft import BlockDraft
from pawl_server.scheduler import committer, draft_grants, planner, priority, starts
from pawl_server.scheduler.committer import StaleResultError
from pawl_server.scheduler.fit import Room
from pawl_server.scheduler.invariants import InvariantError, check_invariants
from pawl_server.scheduler.ledger import LedgerEntry
from pawl_server.scheduler.queues import Cursor
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.slots import BoolArray, IntArray, SlotTable
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import StepResult
from tests.fakes.scheduler_bench import Bench, make_limits, random_request

NUM_TRACES = 120


def run_trace(seed: int) -> Bench:
    """Arrivals, aborts and lost workers at any depth; what is left runs to its end and is compared."""
    draw = random.Random(seed)
    bench = Bench(make_limits(draw), depth=draw.randint(1, 3))
    for _ in range(draw.randint(5, 20)):
        bench.submit(random_request(bench, draw))
        for _ in range(draw.randint(0, 3)):
            bench.step()
        if draw.random() < 0.2 and bench.requests:
            ended = bench.state.abort(draw.choice(list(bench.requests)), "cancelled", bench.now)
            if ended is not None:
                bench.finish(ended)
        if draw.random() < 0.05:
            bench.lose_worker()
        check_invariants(bench.state)
    bench.run()
    assert set(bench.ended) == set(bench.requests)
    for handle in bench.requests:
        bench.check_output(handle)
    return bench


def run_traces() -> None:
    """All of them, from the first."""
    for seed in range(NUM_TRACES):
        run_trace(seed)


def test_the_traces_pass_without_a_bug() -> None:
    run_traces()


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
        (LedgerEntry, "rejected", _keep_rejected),
        (committer, "_subtract_rejected", _publish_drafts),
        (draft_grants, "blocks_for", _hold_nothing_more),
        (committer, "_deliver_late", _drop_late),
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


def test_the_traces_draft_at_every_depth() -> None:
    """And drafts are accepted and rejected, beside prompts, and of sequences that are preempted."""
    drafted, accepted, mixed = [0] * 4, 0, 0
    for seed in range(NUM_TRACES):
        bench = run_trace(seed)
        drafted[bench.depth] += bench.num_drafts
        accepted += bench.num_accepted
        mixed += bench.num_mixed
    assert min(drafted[1:]) > 10
    assert sum(drafted) > 1.2 * accepted > 100
    assert mixed > 10
