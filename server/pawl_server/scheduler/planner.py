"""One step: who computes how many tokens, with which blocks. Reads the state, writes nothing.

There is no prefill phase and no decode phase: a sequence has computed tokens that chase its tokens, and a step is a
map from sequence to number of tokens, under one token budget: those that want one token first (decodes), then
partial prefills, then admissions (Orca, OSDI 2022; Sarathi-Serve, OSDI 2024). Decodes are planned as arrays; an
object is touched only where a block is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pawl_server.kv.draft import BlockDraft
from pawl_server.scheduler.admission import SchedulerLimits, blocks_for
from pawl_server.scheduler.budget import StepBudget
from pawl_server.scheduler.draft_grants import grant_drafts
from pawl_server.scheduler.plan import Plan, Victim
from pawl_server.scheduler.preemption import victims_in_order
from pawl_server.scheduler.priority import make_way
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.slots import BoolArray, IntArray, SlotTable
from pawl_server.scheduler.starts import admit, fork
from pawl_server.scheduler.state import SchedulerState

__all__ = ["plan_step"]


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
        order = victims_in_order(state.slots, plan.left(state.slots))
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
    chosen = other if started == [way.to] else plan
    chosen.attempts = [one.proposals for one in (plan, other) if one.proposals is not None]
    return chosen


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
    behind = (want > 1).nonzero()[0]
    if limits.max_drafts and state.speculation is not None and plan.num_decodes:
        grant_drafts(plan, state, limits, len(behind))
    if len(behind) > 1:
        behind = behind[np.lexsort((slots.order[behind], -slots.level[behind]))]
    num_partial = _grant_prefills(plan, slots, limits, behind, budget)
    may_admit = not plan.victims or (only is not None and len(plan.victims) == len(forced))
    if may_admit and len(state.queue) and plan.budget > 0 and plan.free_rows:
        with state.queue.cursor() as cursor:
            admit(plan, state, limits, cursor, num_partial, budget, only)
    if state.leaders or any(admission.kept_rows for admission in plan.admissions):
        fork(plan, state)
    return plan


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
        for row in victims_in_order(slots, plan.left(slots)):
            if needed <= plan.draft.num_available:
                break
            victim = Victim(slots.owner(row), "decode", needed - plan.draft.num_available)
            needed -= bool(short[row])
            short[row] = decodes[row] = False
            _preempt(plan, victim, want)
    if needed:
        rows = short.nonzero()[0].tolist()
        blocks = plan.draft.take(min(needed, plan.draft.num_available)) or []
        plan.append_blocks += [(row, [block]) for row, block in zip(rows, blocks, strict=False)]
        decodes[rows[len(blocks) :]] = False
    plan.rows = decodes.nonzero()[0]
    plan.num_decodes = len(plan.rows)
    plan.grants = np.ones(plan.num_decodes, dtype=np.int64)
    plan.num_pairs = plan.num_read = int(slots.planned[plan.rows].sum()) + plan.num_decodes
    plan.budget -= plan.num_decodes


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
        chunk = min(want, room, plan.most_tokens(budget, planned))
        if num_partial >= limits.max_partial_prefills:
            chunk = 0
        blocks = plan.draft.take(max(0, blocks_for(planned + chunk - capacity, size))) if chunk > 0 else None
        if blocks is None:
            chunk, blocks = 0, []
        else:
            granted.append((row, chunk))
            plan.take(planned, chunk)
        if chunk and slots.shares[row]:
            plan.announce(slots.owner(row), row, slots.owner(row).blocks[planned // size :] + blocks, planned, chunk)
        if blocks:
            plan.append_blocks.append((row, blocks))
        num_partial += chunk < want
    if granted:
        plan.rows = np.concatenate([plan.rows, np.array([row for row, _ in granted], dtype=np.int64)])
        plan.grants = np.concatenate([plan.grants, np.array([chunk for _, chunk in granted], dtype=np.int64)])
    return num_partial
