"""The only writers of a step: `launch` puts it into the ledger, `commit` settles it, `void` takes it back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np

from pawl_server.scheduler.groups import Fork
from pawl_server.scheduler.ledger import LedgerEntry, StaleResultError
from pawl_server.scheduler.plan import Admission, Plan, Victim
from pawl_server.scheduler.sequence import Ended, EndReason, Preemption, SequenceState, Status
from pawl_server.scheduler.slots import BoolArray, IntArray
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import PromptLogprobs, StepResult, TokenLogprobs

__all__ = ["Committed", "StaleResultError", "commit", "launch", "void"]


@dataclass(slots=True)
class Committed:
    """What a step gave: parallel lists of tokens, and the ends. `indices` count the output of each sequence.

    `logprobs` is empty when nobody asked, else parallel to the tokens.
    """

    handles: list[Hashable] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: Sequence[TokenLogprobs | None] = ()
    prompt_logprobs: list[tuple[Hashable, PromptLogprobs]] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    num_prompt_computed: int = 0
    num_prompt_cached: int = 0
    num_recomputed: int = 0
    num_accepted: int = 0  # drafts that were what was sampled
    num_preempted: int = 0
    num_gave_way: int = 0  # of those preempted, the ones that a higher class took the blocks of
    num_lost: int = 0  # tokens of those preempted that were computed and are not cached
    requeued: list[Hashable] = field(default_factory=list)  # their step is dropped: a prefix they shared failed


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


def commit(state: SchedulerState, plan: Plan, result: StepResult, now: float) -> Committed:
    """Settle the oldest ledger entry and apply what its step gave.

    Raises:
        StaleResultError: the result is not that of this plan, or the plan is not the oldest in flight.
    """
    entry = state.ledger[0] if state.ledger else None
    expected = (plan.step, plan.epoch)
    if entry is None or (entry.step, entry.epoch) != expected or (result.step, result.epoch) != expected:
        in_flight = "nothing" if entry is None else f"step {entry.step} epoch {entry.epoch}"
        raise StaleResultError(
            f"a result of step {result.step} epoch {result.epoch} for the plan of step {plan.step} epoch {plan.epoch};"
            f" the oldest in flight is {in_flight}"
        )
    state.ledger.popleft()
    num_gave_way = sum(victim.reason == "priority" for victim in plan.victims)
    committed = Committed(num_preempted=len(plan.victims), num_gave_way=num_gave_way)
    records = [victim.sequence.last_preemption for victim in plan.victims]
    committed.num_lost = sum(record.num_lost for record in records if record is not None)
    committed.num_prompt_cached = sum(admission.num_computed for admission in plan.admissions)
    owned: BoolArray = np.zeros(len(state.slots.length), dtype=np.bool_)  # rows whose results still count, [rows]
    owned[entry.rows] = entry.alive(state.slots)
    if result.failures:
        for failure in result.failures:
            _retract(state, committed, entry, failure.row, now)
        owned[entry.rows] = entry.alive(state.slots)
    state.pool.settle(plan.step)
    _fail(state, committed, entry, owned, result, now)
    going = owned[entry.rows]
    num_tokens = _subtract_rejected(state, entry, going, result) if entry.drafts else entry.num_tokens
    _advance(state, committed, entry.rows[going], num_tokens[going])
    for scored in result.prompt_logprobs:
        sequence = state.slots.owner(scored.row) if owned[scored.row] else entry.stale.get(scored.row)
        if sequence is not None and sequence.status is not Status.ENDED:
            committed.prompt_logprobs.append((sequence.request.handle, scored))
            sequence.prompt_logprobs_next = scored.first_position + len(scored.positions)
    if entry.drafts:
        _click_several(state, committed, entry, owned, result, now)
    else:
        _click(state, committed, owned, result, now)
    if entry.stale:
        _deliver_late(state, committed, entry, result, now)
    _end_scored(state, committed, entry.rows[owned[entry.rows]], now)
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
    for sequence in list(state.running.values()) if broken or forked else ():
        if sequence.row != row and (sequence.order in forked or not broken.isdisjoint(sequence.blocks)):
            committed.requeued.append(sequence.request.handle)
            state.start_again(sequence, now)
    for unsure in (entry, *state.ledger):  # who lost his KV since may have shared it, too: he samples again
        committed.requeued += [s.request.handle for s in unsure.stale.values() if s.status is not Status.ENDED]
        unsure.drain()


def _advance(state: SchedulerState, committed: Committed, rows: IntArray, num_tokens: IntArray) -> None:
    """The KV of these tokens is there now; blocks that became full are offered to others."""
    slots = state.slots
    before = slots.computed[rows]
    after = before + num_tokens
    slots.computed[rows] = after
    recompute_until, num_prompt = slots.recompute_until[rows], slots.num_prompt[rows]
    if (before < recompute_until).any() or (before < num_prompt).any():  # not where everybody decodes
        again = np.minimum(recompute_until - before, num_tokens).clip(0)
        prompt = np.minimum(num_prompt - before, num_tokens) - again
        committed.num_recomputed += int(again.sum())
        committed.num_prompt_computed += int(prompt.clip(0).sum())
    full = after // slots.block_size
    fuller = (full > slots.published[rows]) & slots.shares[rows]
    for row, num_full in zip(rows[fuller].tolist(), full[fuller].tolist(), strict=True):
        _publish(state, slots.owner(row), num_full)


def _publish(state: SchedulerState, sequence: SequenceState, num_full: int) -> None:
    """Offer the blocks that the step completed to others. Only full blocks of computed, known tokens."""
    chain = sequence.chain
    if chain is None:
        return
    chain.extend(sequence.tokens, num_full)
    if state.journal is not None:
        state.journal.named(sequence)
    for index in range(int(state.slots.published[sequence.row]), num_full):
        state.pool.publish(sequence.blocks[index], chain, index)
    state.slots.published[sequence.row] = num_full


def _fail(
    state: SchedulerState, committed: Committed, entry: LedgerEntry, owned: BoolArray, result: StepResult, now: float
) -> None:
    """Rows that the worker gave up end alone."""
    for failure in result.failures:
        sequence = state.slots.owner(failure.row) if owned[failure.row] else entry.stale.get(failure.row)
        owned[failure.row] = False
        if sequence is not None and sequence.status is not Status.ENDED:
            _end(state, committed, sequence, EndReason.FAILED, now, detail=failure.message, field=failure.field)


def _click(state: SchedulerState, committed: Committed, owned: BoolArray, result: StepResult, now: float) -> None:
    """Append the sampled tokens, one of each row."""
    rows = np.array(result.rows, dtype=np.int64)
    token_ids = np.array(result.token_ids, dtype=np.int64)
    counts = owned[rows]
    committed.logprobs = result.logprobs
    if not counts.all():
        committed.logprobs = list(compress(result.logprobs, counts.tolist()))
        rows, token_ids = rows[counts], token_ids[counts]
    _append(state, committed, rows, token_ids, now)


def _subtract_rejected(state: SchedulerState, entry: LedgerEntry, going: BoolArray, result: StepResult) -> IntArray:
    """Take rejected drafts out of what is planned; the tokens that count, [S], of accepted drafts none yet."""
    slots, rejected = state.slots, entry.rejected(result)
    slots.planned[entry.rows[going]] -= rejected[going]
    drafts = np.array([entry.drafts.get(row, 0) for row in entry.rows.tolist()], dtype=np.int64)
    void = rejected > drafts  # the step came to nothing for them
    slots.expected[entry.rows[going & void]] -= entry.num_samples[going & void]
    return entry.num_tokens - np.where(void, rejected, drafts)


def _click_several(
    state: SchedulerState, committed: Committed, entry: LedgerEntry, owned: BoolArray, result: StepResult, now: float
) -> None:
    """Append tokens, of some rows several, in rounds: an accepted draft is a step that need not be made.

    Who stops at a token leaves the rest of his tokens behind.
    """
    slots = state.slots
    given = Counter(result.rows)
    drafted = [(slots.owner(row), given[row] - 1) for row in entry.drafts if owned[row]]
    rows, token_ids = np.array(result.rows, dtype=np.int64), np.array(result.token_ids, dtype=np.int64)
    places = np.arange(len(rows))
    first = np.concatenate([[True], rows[1:] != rows[:-1]])[: len(rows)]
    offsets = places - np.maximum.accumulate(np.where(first, places, 0))
    logprobs: list[TokenLogprobs | None] = []
    for offset in range(int(offsets.max(initial=-1)) + 1):
        at = np.flatnonzero((offsets == offset) & owned[rows])
        if offset:
            slots.expected[rows[at]] += 1
        _append(state, committed, rows[at], token_ids[at], now)
        if result.logprobs:
            logprobs += [result.logprobs[place] for place in at.tolist()]
        owned[entry.rows] &= entry.alive(slots)
        later = np.flatnonzero((offsets == offset + 1) & owned[rows])
        _advance(state, committed, rows[later], np.ones(len(later), dtype=np.int64))
    committed.logprobs = logprobs
    for sequence, num_accepted in drafted:
        committed.num_accepted += max(0, num_accepted)
        if num_accepted < 0 and state.speculation is not None:
            state.speculation.broke(sequence)


def _append(state: SchedulerState, committed: Committed, rows: IntArray, token_ids: IntArray, now: float) -> None:
    """Append a token to each of these rows, and stop where it says so."""
    slots = state.slots
    committed.handles += [slots.handles[row] for row in rows.tolist()]
    committed.indices += (slots.length[rows] - slots.num_prompt[rows]).tolist()
    committed.token_ids += token_ids.tolist()
    slots.append(rows, token_ids)
    slots.last_token_at[rows] = now
    state.accounts.charge_output(slots.tenant[rows])
    for row in rows[slots.watched[rows]].tolist():
        slots.owner(row).caught_up(now)
        slots.watched[row] = False
    stopping = slots.hits_stop(rows, token_ids) | (slots.length[rows] >= slots.stop_at[rows])
    for row, token_id in zip(rows[stopping].tolist(), token_ids[stopping].tolist(), strict=True):
        _stop(state, committed, slots.owner(row), token_id, now)


def _stop(state: SchedulerState, committed: Committed, sequence: SequenceState, token_id: int, now: float) -> None:
    """End a sequence if its last token, this one, says so."""
    request = sequence.request
    if sequence.num_output > request.min_output_tokens or request.min_output_tokens == 0:
        if token_id in request.eos_token_ids:
            _end(state, committed, sequence, EndReason.EOS, now, stop_token_id=token_id)
            return
        if token_id in request.stop_token_ids:
            _end(state, committed, sequence, EndReason.STOP_TOKEN, now, stop_token_id=token_id)
            return
    if 0 < request.max_output_tokens <= sequence.num_output:
        _end(state, committed, sequence, EndReason.MAX_TOKENS, now)
    elif sequence.num_tokens >= sequence.limit:
        _end(state, committed, sequence, EndReason.CONTEXT_LENGTH, now)


def _deliver_late(
    state: SchedulerState, committed: Committed, entry: LedgerEntry, result: StepResult, now: float
) -> None:
    """Tokens of sequences that lost their KV after the launch: they are delivered and change nothing else."""
    logprobs = result.logprobs or [None] * len(result.rows)
    for row, token_id, token_logprobs in zip(result.rows, result.token_ids, logprobs, strict=True):
        sequence = entry.stale.get(row)
        if sequence is None or sequence.status is Status.ENDED:
            continue
        committed.handles.append(sequence.request.handle)
        committed.indices.append(sequence.num_output)
        committed.token_ids.append(token_id)
        if result.logprobs:
            committed.logprobs = [*committed.logprobs, token_logprobs]
        state.queue.lengthen(sequence, token_id)
        sequence.token_came(now)
        state.accounts.charge_output(np.array([sequence.tenant], dtype=np.int64))
        _stop(state, committed, sequence, token_id, now)
    entry.drain()


def _end_scored(state: SchedulerState, committed: Committed, rows: IntArray, now: float) -> None:
    """Sequences that wanted nothing but log-probabilities of their prompt end when it is computed."""
    slots = state.slots
    samples = slots.samples[rows]
    if samples.all():
        return
    rows = rows[~samples]
    for row in rows[(slots.length[rows] > 0) & (slots.computed[rows] == slots.length[rows])].tolist():
        _end(state, committed, slots.owner(row), EndReason.MAX_TOKENS, now)


def _end(
    state: SchedulerState,
    committed: Committed,
    sequence: SequenceState,
    reason: EndReason,
    now: float,
    *,
    detail: str = "",
    field: str = "",
    stop_token_id: int = -1,
) -> None:
    committed.ended.append(sequence.ended(reason, now, detail=detail, field=field, stop_token_id=stop_token_id))
    state.remove(sequence, now)


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
