"""Who starts in a step: the waiting, in their order, and those parked behind a prompt that the step completes.

Reads the state, writes the plan alone.
"""

from __future__ import annotations

from pawl_server.scheduler.admission import SchedulerLimits, blocks_for
from pawl_server.scheduler.backfill import Backfill, Candidate, Unfit
from pawl_server.scheduler.budget import StepBudget
from pawl_server.scheduler.fit import Room
from pawl_server.scheduler.groups import fork_group
from pawl_server.scheduler.plan import Admission, Plan
from pawl_server.scheduler.queues import Cursor
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.state import SchedulerState

__all__ = ["admit", "fork"]


def _max_hits(sequence: SequenceState, block_size: int) -> int:
    """Most blocks that may come from the cache: one token must be computed, and every log-probability wanted."""
    below = sequence.num_tokens - 1
    if sequence.request.prompt_logprobs >= 0 and sequence.prompt_logprobs_next < sequence.num_prompt:
        below = min(below, sequence.prompt_logprobs_next - 1)
    return below // block_size


def _cached_prefix(plan: Plan, sequence: SequenceState, block_size: int) -> tuple[list[int], int]:
    """Cached blocks that a sequence may begin with, and how many blocks after them the host tier holds."""
    if sequence.chain is None:
        return [], 0
    most = _max_hits(sequence, block_size)
    hits = plan.draft.prefix_hits(sequence.chain, most)
    return hits, plan.draft.host_hits(sequence.chain, len(hits), most)


def _hold(
    plan: Plan, sequence: SequenceState, hits: list[int], num_stored: int, num_new: int
) -> tuple[list[int], list[int]]:
    """Share the cached blocks, bring back the stored ones and take the rest of `num_new`, which are available.

    Returns:
        The blocks that the sequence begins with, and those that are to be computed.
    """
    chain = sequence.chain
    plan.draft.share(hits)
    restored = plan.draft.restore(chain, len(hits), num_stored) if chain is not None and num_stored else []
    blocks = plan.draft.take(num_new - num_stored)
    assert blocks is not None  # noqa: S101 - both narrow the type: as many are available
    assert restored is not None  # noqa: S101
    return hits + restored, blocks


def admit(
    plan: Plan,
    state: SchedulerState,
    limits: SchedulerLimits,
    cursor: Cursor,
    num_partial: int,
    budget: StepBudget | None,
    only: SequenceState | None,
) -> None:
    """Start waiting sequences in order, or `only` the first.

    One that does not fit may be overtaken a bounded number of times, and then only by those who cannot delay it.
    """
    size = limits.block_size
    may_overtake = limits.max_running  # starts of this step, until somebody has been overtaken as often as he may be
    num_granted = sum(len(blocks) for _, blocks in plan.append_blocks) - plan.num_draft_blocks
    left = plan.left(state.slots) if plan.victims else None
    victims = {victim.sequence.order for victim in plan.victims}
    leaders = [leader for leader in state.leaders.values() if leader.order not in victims]
    room = Room(state.slots, state.lengths, limits, num_granted, plan.now, leaders, left)
    num_used = state.pool.num_used - sum(len(leader.followers) for leader in state.leaders.values())
    backfill = Backfill(
        state.slots, room, limits, state.lengths, plan.draft.num_available, num_used, has_parked=bool(leaders)
    )
    for sequence in cursor:
        if plan.budget < 1 or not plan.free_rows or len(plan.admissions) == limits.max_starts:
            return
        if only is not None and sequence is not only:
            return
        kept = plan.num_overtaking >= may_overtake
        if kept and backfill.hopeless:
            return
        if sequence.num_stale:
            continue  # it lacks tokens that a launched step samples
        hits, num_stored = _cached_prefix(plan, sequence, size)
        need = room.need(sequence)
        num_shared = len(hits) - plan.draft.num_free_among(hits)
        num_kept = len(sequence.followers)
        fits = room.fits(need, plan.draft.num_available, num_shared, settled=sequence.settled)
        if not fits or num_kept >= len(plan.free_rows):
            may_overtake = min(may_overtake, plan.num_overtaking + limits.max_bypass - sequence.bypassed)
            plan.bypassed.append((sequence, plan.num_overtaking))
            if len(plan.bypassed) > limits.max_bypass:
                return
            backfill.keep_for(Unfit(sequence, need, num_shared, len(hits), plan.num_overtaking))
            continue
        computed = (len(hits) + num_stored) * size
        want = sequence.num_tokens - computed
        chunk = min(want, plan.most_tokens(budget, computed))
        if chunk < 1 or (chunk < want and num_partial >= limits.max_partial_prefills):
            return
        candidate = Candidate(sequence, want, chunk)
        if kept and not backfill.allows(
            candidate, plan.num_overtaking, plan.draft.num_available, alone=not num_partial
        ):
            continue
        num_new = blocks_for(computed + chunk, size) - len(hits) + num_kept
        if num_new + len(hits) - num_shared > plan.draft.num_available:
            return  # before anything is shared: a plan may go on without it
        hits, blocks = _hold(plan, sequence, hits, num_stored, num_new)
        kept_blocks, blocks = blocks[len(blocks) - num_kept :], blocks[: len(blocks) - num_kept]
        room.admit(need, len(hits) + len(blocks) + num_kept, settled=sequence.settled)
        backfill.admitted(candidate, num_shared)
        num_partial += chunk < want
        price = 0.0
        if not sequence.charged:
            price = state.accounts.prompt_cost(sequence.tenant, want, computed)
        row, *kept_rows = [plan.free_rows.pop() for _ in range(1 + num_kept)]
        plan.announce(sequence, row, blocks, computed, chunk)
        plan.admissions.append(
            Admission(sequence, row, hits, blocks, chunk, computed, price, kept, kept_rows, kept_blocks)
        )
        plan.num_overtaking += not kept
        cursor.charge(sequence, price)
        plan.take(computed, chunk)


def fork(plan: Plan, state: SchedulerState) -> None:
    """Those who are parked behind a sequence whose prompt this step completes take it over."""
    size = state.limits.block_size
    victims = {victim.sequence.order for victim in plan.victims}
    grants = dict(zip(plan.rows.tolist(), plan.grants.tolist(), strict=True))
    appended = dict(plan.append_blocks)
    for leader in state.leaders.values():
        group = leader.group
        if group is None or leader.order in victims:
            continue
        reach = int(state.slots.planned[leader.row]) + grants.get(leader.row, 0)
        if reach >= leader.num_prompt:
            blocks = leader.blocks + appended.get(leader.row, [])
            plan.forks += fork_group(plan.draft, leader, blocks, group.rows, group.blocks, size)
    for admission in plan.admissions:
        leader, reach = admission.sequence, admission.num_computed + admission.num_tokens
        if admission.kept_rows and reach >= leader.num_prompt:
            blocks = admission.hits + admission.new_blocks
            plan.forks += fork_group(plan.draft, leader, blocks, admission.kept_rows, admission.kept_blocks, size)
