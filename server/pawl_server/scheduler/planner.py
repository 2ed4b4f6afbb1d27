"""One step: who computes how many tokens, with which blocks. Reads the state, writes nothing.

There is no prefill phase and no decode phase: a sequence has computed tokens that chase its tokens, and a step is a
map from sequence to number of tokens, under one token budget: those that want one token first (decodes), then
partial prefills, then admissions (Orca, OSDI 2022; Sarathi-Serve, OSDI 2024). Decodes are planned as arrays; an
object is touched only where a block is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pawl_server.kv.draft import BlockDraft
from pawl_server.scheduler.admission import SchedulerLimits, blocks_for
from pawl_server.scheduler.backfill import Backfill, Candidate, Unfit
from pawl_server.scheduler.budget import StepBudget, StepLoad
from pawl_server.scheduler.draft_grants import grant_drafts
from pawl_server.scheduler.fit import Room
from pawl_server.scheduler.groups import Fork, fork_group
from pawl_server.scheduler.preemption import victims_in_order
from pawl_server.scheduler.priority import make_way
from pawl_server.scheduler.queues import Cursor
from pawl_server.scheduler.sequence import SequenceRequest, SequenceState
from pawl_server.scheduler.slots import BoolArray, IntArray, SlotTable
from pawl_server.scheduler.speculation import Proposals
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import NewSequence, StepPlan

__all__ = ["Admission", "Plan", "Victim", "plan_step"]

_NO_ROWS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Admission:
    """A waiting sequence that starts: its row, the cached blocks it shares, the blocks it gets, its first chunk."""

    sequence: SequenceState
    row: int
    hits: list[int]
    new_blocks: list[int]
    num_tokens: int
    num_computed: int  # tokens in `hits`
    cost: float  # charged to its tenant
    backfilled: bool = False  # it starts before somebody for whom blocks are kept, whom it cannot delay
    kept_rows: list[int] = field(default_factory=list)  # for those that are parked behind it, one each
    kept_blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Victim:
    """A running sequence that loses its KV, and why (see `Preemption`)."""

    sequence: SequenceState
    reason: str
    num_short: int


@dataclass(slots=True)
class Plan:
    """A step that may be launched once, while the state is as it was planned from.

    Attributes:
        rows: running sequences that compute, [S].
        grants: how many tokens each of them, [S].
        append_blocks: blocks that running sequences get, by row.
        admissions: sequences that start.
        forks: sequences that start with what the step computes, and compute from the next step on.
        victims: sequences that lose their KV.
        bypassed: waiting sequences that did not fit, each with `num_overtaking` when it was considered.
        num_overtaking: admissions that count as overtaking those: all that are not backfilled.
        proposals: drafts that rows compute beside their token, and who was asked for some in vain; None = nobody was.
        num_decodes: of `rows`, the first so many want one token and sample.
        num_drafts: tokens of all drafts.
        num_draft_blocks: blocks that hold nothing but drafts.
        num_pairs: (query, key) pairs of the step's attention.
        num_read: tokens whose KV it reads.
        budget: tokens that the step may still take.
        limits: that it was planned under.
    """

    step: int
    epoch: int
    now: float
    draft: BlockDraft
    budget: int
    limits: SchedulerLimits
    rows: IntArray = field(default_factory=lambda: _NO_ROWS)
    grants: IntArray = field(default_factory=lambda: _NO_ROWS)
    proposals: Proposals | None = None
    num_decodes: int = 0
    num_drafts: int = 0
    num_draft_blocks: int = 0
    num_pairs: int = 0
    num_read: int = 0
    append_blocks: list[tuple[int, list[int]]] = field(default_factory=list)
    victims: list[Victim] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    bypassed: list[tuple[SequenceState, int]] = field(default_factory=list)
    num_overtaking: int = 0
    free_rows: list[int] = field(default_factory=list)
    freed_rows: list[int] = field(default_factory=list)

    @property
    def num_sequences(self) -> int:
        """Sequences in the step."""
        return len(self.rows) + len(self.admissions)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return int(self.grants.sum()) + sum(admission.num_tokens for admission in self.admissions)

    @property
    def load(self) -> StepLoad:
        """What the step computes, as far as its time depends on it."""
        return StepLoad(self.num_tokens, self.num_pairs, self.num_read)

    @property
    def kind(self) -> str:
        """What the step does: "prefill", "decode" or "mixed"."""
        others = self.num_sequences - self.num_decodes
        return "mixed" if self.num_decodes and others else "prefill" if others else "decode"

    def members(self, slots: SlotTable) -> list[SequenceRequest]:
        """The requests in the step. Valid until it is committed."""
        running = [slots.owner(row).request for row in self.rows.tolist()]
        return running + [admission.sequence.request for admission in self.admissions]

    def wire(self) -> StepPlan:
        """The step as the worker is told it."""
        return StepPlan(
            step=self.step,
            epoch=self.epoch,
            freed_rows=self.freed_rows,
            new=[_new_sequence(admission) for admission in self.admissions]
            + [_forked_sequence(fork) for fork in self.forks],
            append_blocks=self.append_blocks,
            rows=self.rows.tolist() + [admission.row for admission in self.admissions],
            num_tokens=self.grants.tolist() + [admission.num_tokens for admission in self.admissions],
            copies=self.draft.copies,
            swap_out=self.draft.swap_out,
            swap_in=self.draft.swap_in,
            drafts=list(self.proposals.drafts.items()) if self.num_drafts and self.proposals is not None else [],
        )


def _new_sequence(admission: Admission) -> NewSequence:
    sequence, request = admission.sequence, admission.sequence.request
    wants_logprobs = sequence.prompt_logprobs_next < sequence.num_prompt
    return NewSequence(
        row=admission.row,
        token_ids=sequence.tokens.tolist(),
        num_prompt_tokens=sequence.num_prompt,
        num_computed=admission.num_computed,
        block_ids=admission.hits + admission.new_blocks,
        sampling=request.sampling,
        prompt_logprobs=request.prompt_logprobs if wants_logprobs else -1,
        prompt_logprobs_from=sequence.prompt_logprobs_next,
        samples=sequence.samples,
    )


def _forked_sequence(fork: Fork) -> NewSequence:
    sequence = fork.sequence
    return NewSequence(
        row=fork.row,
        token_ids=sequence.tokens.tolist(),
        num_prompt_tokens=sequence.num_prompt,
        num_computed=sequence.num_prompt - 1,
        block_ids=fork.blocks,
        sampling=sequence.request.sampling,
    )


def plan_step(
    state: SchedulerState, limits: SchedulerLimits, now: float, budget: StepBudget | None = None
) -> Plan | None:
    """Plan the next step; None when there is nothing to compute, or nothing before the steps in flight are settled.

    Preempts only what it must: first for decodes; for the first of the queue, if those it takes the blocks of are of
    a much lower class; and when nobody at all could go on, until the oldest of the highest class can.

    Args:
        state: read, not written.
        limits: what the step may hold.
        now: seconds.
        budget: how many prompt tokens may stand beside decodes; None = as many as `limits` allow.
    """
    forced: list[Victim] = []
    while True:
        plan = _attempt(state, limits, now, budget, forced)
        if plan.num_sequences:
            return _with_way_made(plan, state, limits, now, budget)
        if state.ledger:
            return None
        order = victims_in_order(state.slots, _left(plan, state.slots))
        if not order:
            return None
        forced = [*plan.victims, Victim(state.slots.owner(order[0]), "progress", 1)]


def _with_way_made(
    plan: Plan, state: SchedulerState, limits: SchedulerLimits, now: float, budget: StepBudget | None
) -> Plan:
    """The plan; or one in which the first of the queue, which is not in it, starts at the cost of lower classes."""
    if plan.victims or not len(state.queue):
        return plan
    way = make_way(state, limits, now)
    if way is None or (plan.admissions and plan.admissions[0].sequence is way.to):
        return plan
    forced = [Victim(victim, "priority", way.num_short) for victim in way.victims]
    other = _attempt(state, limits, now, budget, forced, way.to)
    started = [admission.sequence for admission in other.admissions]
    return other if started == [way.to] else plan


def _attempt(
    state: SchedulerState,
    limits: SchedulerLimits,
    now: float,
    budget: StepBudget | None,
    forced: Sequence[Victim],
    only: SequenceState | None = None,
) -> Plan:
    """A step in which those `forced` lose their KV, and then nobody starts but `only`."""
    freed = list(state.rows_to_free)
    plan = Plan(
        step=state.step + 1,
        epoch=state.epoch,
        now=now,
        draft=BlockDraft(state.pool),
        budget=limits.max_batch_tokens,
        limits=limits,
        free_rows=state.free_rows + freed,
        freed_rows=freed,
    )
    slots = state.slots
    want = slots.expected - slots.planned
    want[slots.expected >= slots.stop_at] = 0  # its last token is being sampled
    for victim in forced:
        _preempt(plan, victim, want)
    decodes = want == 1
    _grant_decodes(plan, slots, want, decodes)
    behind = np.flatnonzero(want > 1)
    if limits.max_drafts and state.speculation is not None and plan.num_decodes:
        grant_drafts(plan, state, limits, len(behind))
    if len(behind) > 1:
        behind = behind[np.lexsort((slots.order[behind], -slots.level[behind]))]
    num_partial = _grant_prefills(plan, slots, limits, behind, budget)
    may_admit = not plan.victims or (only is not None and len(plan.victims) == len(forced))
    if may_admit and len(state.queue) and plan.budget > 0 and plan.free_rows:
        with state.queue.cursor() as cursor:
            _admit(plan, state, limits, cursor, num_partial, budget, only)
    if state.leaders or any(admission.kept_rows for admission in plan.admissions):
        _fork(plan, state)
    return plan


def _left(plan: Plan, slots: SlotTable) -> IntArray:
    """Rows that run and are not preempted by the plan so far."""
    return np.setdiff1d(slots.running(), [victim.sequence.row for victim in plan.victims])


def _preempt(plan: Plan, victim: Victim, want: IntArray) -> None:
    row = victim.sequence.row
    plan.victims.append(victim)
    plan.draft.release(victim.sequence.blocks)
    plan.free_rows.append(row)
    plan.freed_rows.append(row)
    want[row] = 0
    group = victim.sequence.group
    if group is not None and victim.sequence.followers:
        plan.draft.release(group.blocks)
        plan.free_rows += group.rows


def _grant_decodes(plan: Plan, slots: SlotTable, want: IntArray, decodes: BoolArray) -> None:
    """One token for each that wants one. Victims are chosen before any block is taken, so nothing is undone."""
    short = decodes & (slots.planned >= slots.capacity)
    needed = int(np.count_nonzero(short))
    if needed > plan.draft.num_available:
        for row in victims_in_order(slots, _left(plan, slots)):
            if needed <= plan.draft.num_available:
                break
            victim = Victim(slots.owner(row), "decode", needed - plan.draft.num_available)
            needed -= bool(short[row])
            short[row] = decodes[row] = False
            _preempt(plan, victim, want)
    if needed:
        rows = np.flatnonzero(short).tolist()
        blocks = plan.draft.take(min(needed, plan.draft.num_available)) or []
        plan.append_blocks += [(row, [block]) for row, block in zip(rows, blocks, strict=False)]
        decodes[rows[len(blocks) :]] = False
    plan.rows = np.flatnonzero(decodes)
    plan.num_decodes = len(plan.rows)
    plan.grants = np.ones(plan.num_decodes, dtype=np.int64)
    plan.num_pairs = plan.num_read = int(slots.planned[plan.rows].sum()) + plan.num_decodes
    plan.budget -= plan.num_decodes


def _most_tokens(plan: Plan, limits: SchedulerLimits, budget: StepBudget | None, context: int) -> int:
    """Tokens that the next chunk may have at most, if it stands after `context` others."""
    if budget is None:
        return min(limits.max_prefill_chunk, plan.budget)
    load = StepLoad(limits.max_batch_tokens - plan.budget, plan.num_pairs, plan.num_read)
    return min(limits.max_prefill_chunk, budget.chunk(load, plan.num_decodes + plan.num_drafts, context, plan.budget))


def _take(plan: Plan, context: int, num_tokens: int) -> None:
    """A chunk after `context` tokens is part of the step."""
    plan.budget -= num_tokens
    plan.num_pairs += num_tokens * context + num_tokens * (num_tokens + 1) // 2
    plan.num_read += context + num_tokens


def _grant_prefills(
    plan: Plan, slots: SlotTable, limits: SchedulerLimits, rows: IntArray, budget: StepBudget | None
) -> int:
    """A chunk for each that is in mid-prompt, in the order given, as far as budget and blocks go.

    Returns:
        How many stay in mid-prompt.
    """
    num_partial = 0
    granted: list[tuple[int, int]] = []
    size = limits.block_size
    for row in rows.tolist():
        planned, capacity = int(slots.planned[row]), int(slots.capacity[row])
        want = int(slots.expected[row]) - planned
        room = capacity + plan.draft.num_available * size - planned
        chunk = min(want, room, _most_tokens(plan, limits, budget, planned))
        if num_partial >= limits.max_partial_prefills:
            chunk = 0
        blocks = plan.draft.take(max(0, blocks_for(planned + chunk - capacity, size))) if chunk > 0 else None
        if blocks is None:
            chunk, blocks = 0, []
        else:
            granted.append((row, chunk))
            _take(plan, planned, chunk)
        if chunk and slots.shares[row]:
            _announce(plan, slots.owner(row), row, slots.owner(row).blocks[planned // size :] + blocks, planned, chunk)
        if blocks:
            plan.append_blocks.append((row, blocks))
        num_partial += chunk < want
    if granted:
        plan.rows = np.concatenate([plan.rows, np.array([row for row, _ in granted], dtype=np.int64)])
        plan.grants = np.concatenate([plan.grants, np.array([chunk for _, chunk in granted], dtype=np.int64)])
    return num_partial


def _announce(
    plan: Plan, sequence: SequenceState, row: int, blocks: Sequence[int], num_before: int, chunk: int
) -> None:
    """Let those planned after share the blocks, from that of token `num_before` on, which this chunk fills."""
    if sequence.chain is not None:
        size = sequence.chain.block_size
        begin = num_before // size
        plan.draft.announce(sequence.chain, begin, blocks[: (num_before + chunk) // size - begin], row)


def _max_hits(sequence: SequenceState, block_size: int) -> int:
    """Most blocks that may come from the cache: one token must be computed, and every log-probability wanted."""
    below = sequence.num_tokens - 1
    if sequence.request.prompt_logprobs >= 0 and sequence.prompt_logprobs_next < sequence.num_prompt:
        below = min(below, sequence.prompt_logprobs_next - 1)
    return below // block_size


def _admit(
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
    left = _left(plan, state.slots) if plan.victims else None
    victims = {victim.sequence.order for victim in plan.victims}
    leaders = [leader for leader in state.leaders.values() if leader.order not in victims]
    room = Room(state.slots, state.lengths, limits, num_granted, plan.now, leaders, left)
    num_used = state.pool.num_used - sum(len(leader.followers) for leader in state.leaders.values())
    backfill = Backfill(state.slots, room, limits, state.lengths, plan.draft.num_available, num_used)
    for sequence in cursor:
        if plan.budget < 1 or not plan.free_rows:
            return
        if only is not None and sequence is not only:
            return
        kept = plan.num_overtaking >= may_overtake
        if kept and backfill.hopeless:
            return
        if sequence.num_stale:
            continue  # it lacks tokens that a launched step samples
        hits, num_stored, chain = list[int](), 0, sequence.chain
        if chain is not None:
            most = _max_hits(sequence, size)
            hits = plan.draft.prefix_hits(chain, most)
            num_stored = plan.draft.host_hits(chain, len(hits), most)
        need = room.need(sequence)
        num_shared = len(hits) - plan.draft.num_free_among(hits)
        num_kept = len(sequence.followers)
        fits = room.fits(need, plan.draft.num_available, num_shared, settled=sequence.settled)
        if not fits or num_kept >= len(plan.free_rows):
            may_overtake = min(may_overtake, plan.num_overtaking + limits.max_bypass - sequence.bypassed)
            plan.bypassed.append((sequence, plan.num_overtaking))
            if len(plan.bypassed) > limits.max_bypass:
                return
            backfill.keep_for(Unfit(sequence, need, num_shared, plan.num_overtaking))
            continue
        computed = (len(hits) + num_stored) * size
        want = sequence.num_tokens - computed
        chunk = min(want, _most_tokens(plan, limits, budget, computed))
        if chunk < 1 or (chunk < want and num_partial >= limits.max_partial_prefills):
            return
        candidate = Candidate(sequence, want, chunk)
        if kept and not backfill.allows(
            candidate, plan.num_overtaking, plan.draft.num_available, alone=not num_partial
        ):
            continue
        plan.draft.share(hits)
        restored = plan.draft.restore(chain, len(hits), num_stored) if chain is not None and num_stored else []
        blocks = plan.draft.take(blocks_for(computed + chunk, size) - len(hits) - num_stored + num_kept)
        if blocks is None or restored is None:
            return
        kept_blocks, blocks = blocks[len(blocks) - num_kept :], blocks[: len(blocks) - num_kept]
        hits += restored
        room.admit(need, len(hits) + len(blocks) + num_kept, settled=sequence.settled)
        backfill.admitted(num_shared)
        num_partial += chunk < want
        price = 0.0
        if not sequence.charged:
            price = state.accounts.prompt_cost(sequence.tenant, want, computed)
        row, *kept_rows = [plan.free_rows.pop() for _ in range(1 + num_kept)]
        _announce(plan, sequence, row, blocks, computed, chunk)
        plan.admissions.append(
            Admission(sequence, row, hits, blocks, chunk, computed, price, kept, kept_rows, kept_blocks)
        )
        plan.num_overtaking += not kept
        cursor.charge(sequence, price)
        _take(plan, computed, chunk)


def _fork(plan: Plan, state: SchedulerState) -> None:
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
