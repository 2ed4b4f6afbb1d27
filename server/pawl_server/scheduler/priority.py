"""Who gives way to a waiting sequence of a much higher class that does not fit. Policy alone.

As in SGLang, a running sequence is taken only from a class that is lower by a threshold, and only if what is taken is
enough. Ageing moves a sequence up in the queue and protects it while it runs, but lets nobody take blocks: what counts
of the one that waits is the class it asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pawl_server.kv.draft import BlockDraft
from pawl_server.scheduler.admission import SchedulerLimits, blocks_for
from pawl_server.scheduler.fit import Room
from pawl_server.scheduler.preemption import by_cost
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.slots import BoolArray

if TYPE_CHECKING:
    from pawl_server.scheduler.state import SchedulerState

__all__ = ["Way", "make_way"]


@dataclass(frozen=True, slots=True)
class Way:
    """Who gives way to whom, and how many blocks are too few without (0: a row is)."""

    to: SequenceState
    victims: list[SequenceState]
    num_short: int


def make_way(state: SchedulerState, limits: SchedulerLimits, now: float) -> Way | None:
    """Those who must lose their KV so that the first of the queue can start; None when nobody must, or it is no use.

    Nobody is preempted for this as often as he may be at all: the last time is left to those who cannot go on.

    Args:
        state: read, not written.
        limits: what a step may hold.
        now: seconds.
    """
    if limits.preempt_below < 1 or state.queue.top_level - limits.preempt_below < int(state.slots.level.min()):
        return None  # as in nearly every step
    head = state.queue.head()
    if head is None or head.num_stale:
        return None
    rows = np.flatnonzero(_may_give_way(state, head.request.priority - limits.preempt_below))
    rows = rows[[_once_more(state.slots.owner(row), limits) for row in rows.tolist()]]
    if not len(rows):
        return None
    room = Room(state.slots, state.lengths, limits, 0, now, state.leaders.values())
    if room.settled or head.settled:
        return None
    draft = BlockDraft(state.pool)
    hits = [] if head.chain is None else draft.prefix_hits(head.chain, (head.num_tokens - 1) // limits.block_size)
    short = room.need(head).expected - (len(hits) - draft.num_free_among(hits)) - (draft.num_available - room.promised)
    num_rows = 1 + len(head.followers) - len(state.free_rows) - len(state.rows_to_free)
    if short <= 0 and num_rows <= 0:
        return None
    expected = dict(zip(room.rows.tolist(), room.total.tolist(), strict=True))
    victims: list[SequenceState] = []
    missing = short
    for row in by_cost(state.slots, rows):
        victim = state.slots.owner(row)
        before = draft.num_available
        draft.release(victim.blocks)
        kept = max(0, blocks_for(expected[row], limits.block_size) - len(victim.blocks))  # free, for its output
        missing -= draft.num_available - before + kept
        victims.append(victim)
        if missing <= 0 and len(victims) >= num_rows:
            return Way(head, victims, max(0, short))
    return None


def _once_more(sequence: SequenceState, limits: SchedulerLimits) -> bool:
    """Whether a sequence may be preempted and is not worn out by it. One that others are parked behind goes on."""
    return sequence.preemptions + 1 < limits.max_preemptions and not sequence.followers


def _may_give_way(state: SchedulerState, highest: int) -> BoolArray:
    """Rows of those whose class, ageing included, is no higher."""
    slots = state.slots
    return np.asarray((slots.length > 0) & (slots.level <= highest), dtype=np.bool_)
