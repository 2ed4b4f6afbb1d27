"""The only writers of a step: `launch` puts it into the ledger, `commit` settles it, `void` takes it back."""

from __future__ import annotations

import numpy as np

from pawl_server.scheduler.groups import Fork
from pawl_server.scheduler.ledger import LedgerEntry, StaleResultError
from pawl_server.scheduler.plan import Admission, Plan, Victim
from pawl_server.scheduler.results import (
    Committed,
    advance,
    click,
    click_several,
    deliver_late,
    end_scored,
    fail_rows,
    subtract_rejected,
)
from pawl_server.scheduler.sequence import Preemption, SequenceState, Status
from pawl_server.scheduler.slots import BoolArray
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import StepResult

__all__ = ["Committed", "StaleResultError", "commit", "launch", "void"]


def launch(state: SchedulerState, plan: Plan) -> None:
    """Write a plan into the ledger: victims out, admissions in, blocks held, tokens in flight."""
    state.decisions.note(plan)
    if state.journal is not None:
        state.journal.launched(plan)
    plan.draft.apply(plan.step, plan.now)
    for victim in plan.victims:
        _preempt(state, plan, victim)
    for sequence, num_before in plan.bypassed:
        sequence.bypassed += plan.num_overtaking - num_before
    state.free_rows = plan.free_rows
    state.rows_to_free = []
    state.step = plan.step
    slots = state.slots
    for row, blocks in plan.append_blocks:
        slots.owner(row).blocks += blocks
        slots.capacity[row] += len(blocks) * slots.block_size
    for admission in plan.admissions:
        _admit(state, admission, plan.now)
    forks = [(fork.leader.row, _fork(state, fork)) for fork in plan.forks]
    rows, num_tokens = plan.rows, plan.grants
    if plan.admissions:
        rows = np.concatenate([rows, np.array([a.row for a in plan.admissions], dtype=np.int64)])
        num_tokens = np.concatenate([num_tokens, np.array([a.num_tokens for a in plan.admissions], dtype=np.int64)])
    planned = slots.planned[rows] + num_tokens
    expected = slots.expected[rows]
    num_samples = ((planned >= expected) & slots.samples[rows]).astype(np.int64)
    slots.planned[rows] = planned
    slots.expected[rows] = expected + num_samples
    entry = LedgerEntry(plan.step, plan.epoch, rows, slots.generation[rows], num_tokens, num_samples, forks)
    if plan.proposals is not None and state.speculation is not None:
        entry.drafts = {row: len(ids) for row, ids in plan.proposals.drafts.items()}
        state.speculation.launched(slots, plan.proposals)
    state.ledger.append(entry)


def _preempt(state: SchedulerState, plan: Plan, victim: Victim) -> None:
    sequence, slots = victim.sequence, state.slots
    cached = int(slots.published[sequence.row]) * slots.block_size
    record = Preemption(
        plan.step, victim.reason, victim.num_short, sequence.num_computed, sequence.num_computed - cached
    )
    sequence.last_preemption = record
    sequence.tokens_lost += record.num_lost
    sequence.preemptions += 1
    sequence.settled = sequence.preemptions >= state.limits.max_preemptions
    if victim.reason != "priority":  # which does not show that too little was kept free
        state.lengths.raise_quantile(plan.now)
    state.requeue(sequence, plan.now)


def _admit(state: SchedulerState, admission: Admission, now: float) -> None:
    sequence, request = admission.sequence, admission.sequence.request
    state.queue.take(sequence)
    sequence.status = Status.RUNNING
    sequence.blocks = admission.hits + admission.new_blocks
    state.slots.enter(admission.row, sequence, admission.num_computed, request.eos_token_ids | request.stop_token_ids)
    sequence.row = admission.row
    state.running[sequence.order] = sequence
    if sequence.cached_prompt_tokens < 0:
        sequence.cached_prompt_tokens = min(admission.num_computed, sequence.num_prompt)
        sequence.first_granted_at = now
    state.accounts.charge(sequence.tenant, admission.cost)
    sequence.charged = True
    group = sequence.group
    if group is not None and sequence.followers:
        group.rows, group.blocks = admission.kept_rows, admission.kept_blocks
        state.leaders[sequence.order] = sequence


def _fork(state: SchedulerState, fork: Fork) -> SequenceState:
    """A parked sequence starts in the row kept for it; what it lacks of the prompt is its last token."""
    sequence, leader, request, group = fork.sequence, fork.leader, fork.sequence.request, fork.leader.group
    if group is not None and group.parked:
        group.parked, group.rows, group.blocks = [], [], []
        del state.leaders[leader.order]
    state.num_parked -= 1
    sequence.status = Status.RUNNING
    sequence.blocks = fork.blocks
    sequence.inherit(leader, state.slots.block_size)
    sequence.first_granted_at = leader.first_granted_at
    sequence.cached_prompt_tokens = leader.cached_prompt_tokens
    sequence.recompute_until = sequence.num_prompt
    stop_ids = request.eos_token_ids | request.stop_token_ids
    state.slots.enter(fork.row, sequence, sequence.num_prompt - 1, stop_ids)
    sequence.row = fork.row
    state.running[sequence.order] = sequence
    return sequence


def _oldest(state: SchedulerState, plan: Plan, result: StepResult) -> LedgerEntry:
    """The oldest ledger entry, if it is that of this plan and this result.

    Raises:
        StaleResultError: it is not.
    """
    entry = state.ledger[0] if state.ledger else None
    expected = (plan.step, plan.epoch)
    if entry is None or (entry.step, entry.epoch) != expected or (result.step, result.epoch) != expected:
        in_flight = "nothing" if entry is None else f"step {entry.step} epoch {entry.epoch}"
        raise StaleResultError(
            f"a result of step {result.step} epoch {result.epoch} for the plan of step {plan.step} epoch {plan.epoch};"
            f" the oldest in flight is {in_flight}"
        )
    return entry


def _came_of_launch(plan: Plan) -> Committed:
    """What is told of a step whatever its result: who was preempted for it, and what it found cached."""
    committed = Committed()
    if plan.victims:
        committed.num_preempted = len(plan.victims)
        committed.num_gave_way = sum(victim.reason == "priority" for victim in plan.victims)
        records = [victim.sequence.last_preemption for victim in plan.victims]
        committed.num_lost = sum(record.num_lost for record in records if record is not None)
    if plan.admissions:
        committed.num_prompt_cached = sum(admission.num_computed for admission in plan.admissions)
    return committed


def commit(state: SchedulerState, plan: Plan, result: StepResult, now: float) -> Committed:
    """Settle the oldest ledger entry and apply what its step gave.

    Raises:
        StaleResultError: the result is not that of this plan, or the plan is not the oldest in flight.
    """
    entry = _oldest(state, plan, result)
    state.ledger.popleft()
    committed = _came_of_launch(plan)
    owned: BoolArray = np.zeros(len(state.slots.length), dtype=np.bool_)  # rows whose results still count, [rows]
    owned[entry.rows] = entry.alive(state.slots)
    if result.failures:
        for failure in result.failures:
            _retract(state, committed, entry, failure.row, now)
        owned[entry.rows] = entry.alive(state.slots)
    state.pool.settle(plan.step)
    fail_rows(state, committed, entry, owned, result, now)
    going = owned[entry.rows]
    num_tokens = subtract_rejected(state, entry, going, result) if entry.drafts else entry.num_tokens
    all_go = bool(going.all())
    advance(state, committed, *((entry.rows, num_tokens) if all_go else (entry.rows[going], num_tokens[going])))
    for scored in result.prompt_logprobs:
        sequence = state.slots.owner(scored.row) if owned[scored.row] else entry.stale.get(scored.row)
        if sequence is not None and sequence.status is not Status.ENDED:
            committed.prompt_logprobs.append((sequence.request.handle, scored))
            sequence.prompt_logprobs_next = scored.first_position + len(scored.positions)
    if entry.drafts:
        click_several(state, committed, entry, owned, result, now)
    else:
        click(state, committed, owned, result, now)
    if entry.stale:
        deliver_late(state, committed, entry, result, now)
    if state.slots.num_scored:
        end_scored(state, committed, entry.rows[owned[entry.rows]], now)
    state.queue.promote(now)
    if state.journal is not None:
        state.journal.settled(result, committed, now)
    return committed


def _retract(state: SchedulerState, committed: Committed, entry: LedgerEntry, row: int, now: float) -> None:
    """A row failed: what it announced does not hold, and whoever relied on it starts again without a trace."""
    broken = set(state.pool.retract(entry.step, row))
    forked = {sequence.order for parent, sequence in entry.forks if parent == row}
    generation = entry.generations[entry.rows == row]
    for later in state.ledger:
        found = later.generations[later.rows == row]
        if len(found) and (found == generation).all():
            broken.update(state.pool.retract(later.step, row))
            forked.update(sequence.order for parent, sequence in later.forks if parent == row)
    failed = state.slots.owner(row) if entry.holds(row, state.slots) else None
    for sequence in list(state.running.values()) if broken or forked else ():
        if sequence is not failed and (sequence.order in forked or not broken.isdisjoint(sequence.blocks)):
            committed.requeued.append(sequence.request.handle)
            state.start_again(sequence, now)
    for unsure in (entry, *state.ledger):  # who lost his KV since may have shared it, too: he samples again
        committed.requeued += [s.request.handle for s in unsure.stale.values() if s.status is not Status.ENDED]
        unsure.drain()


def void(state: SchedulerState, plan: Plan) -> None:
    """Take the newest launched step, which failed, out of the ledger. Void older ones that failed with it after it.

    Follow with `reset_worker`: what the worker holds is unknown.

    Raises:
        StaleResultError: the plan is not the newest in flight.
    """
    if not state.ledger or (state.ledger[-1].step, state.ledger[-1].epoch) != (plan.step, plan.epoch):
        raise StaleResultError(f"step {plan.step} is voided but is not the newest in flight")
    if state.journal is not None:
        state.journal.voided()
    entry = state.ledger.pop()
    alive = entry.alive(state.slots)
    rows = entry.rows[alive]
    state.slots.planned[rows] -= entry.num_tokens[alive]
    state.slots.expected[rows] -= entry.num_samples[alive]
    entry.drain()
    state.pool.retract(plan.step)
