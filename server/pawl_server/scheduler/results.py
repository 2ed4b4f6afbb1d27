"""What a step's result does to its sequences: KV that is there now, tokens appended, late ones delivered, ends.

Called by `committer.commit` alone, which says in which order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np

from pawl_server.scheduler.endings import Ended, EndReason
from pawl_server.scheduler.ledger import LedgerEntry
from pawl_server.scheduler.sequence import SequenceState, Status
from pawl_server.scheduler.slots import BoolArray, IntArray
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import PromptLogprobs, StepResult, TokenLogprobs

__all__ = [
    "Committed", "advance", "click", "click_several", "deliver_late", "end_scored", "fail_rows", "subtract_rejected",
]  # fmt: skip


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


def subtract_rejected(state: SchedulerState, entry: LedgerEntry, going: BoolArray, result: StepResult) -> IntArray:
    """Take rejected drafts out of what is planned; the tokens that count, [S], of accepted drafts none yet."""
    slots, rejected = state.slots, entry.rejected(result)
    slots.planned[entry.rows[going]] -= rejected[going]
    drafts = np.array([entry.drafts.get(row, 0) for row in entry.rows.tolist()], dtype=np.int64)
    void = rejected > drafts  # the step came to nothing for them
    slots.expected[entry.rows[going & void]] -= entry.num_samples[going & void]
    return entry.num_tokens - np.where(void, rejected, drafts)


def advance(state: SchedulerState, committed: Committed, rows: IntArray, num_tokens: IntArray) -> None:
    """The KV of these tokens is there now; blocks that became full are offered to others."""
    slots = state.slots
    before = slots.computed[rows]
    after = before + num_tokens
    slots.computed[rows] = after
    if (before < slots.new_from[rows]).any():  # not where everybody decodes
        recompute_until, num_prompt = slots.recompute_until[rows], slots.num_prompt[rows]
        again = np.minimum(recompute_until - before, num_tokens).clip(0)
        prompt = np.minimum(num_prompt - before, num_tokens) - again
        committed.num_recomputed += int(again.sum())
        committed.num_prompt_computed += int(prompt.clip(0).sum())
    fuller = after >= slots.publish_at[rows]
    if fuller.any():
        for row, num_full in zip(rows[fuller].tolist(), (after[fuller] // slots.block_size).tolist(), strict=True):
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
    state.slots.set_published(sequence.row, num_full)


def fail_rows(
    state: SchedulerState, committed: Committed, entry: LedgerEntry, owned: BoolArray, result: StepResult, now: float
) -> None:
    """Rows that the worker gave up end alone."""
    for failure in result.failures:
        sequence = state.slots.owner(failure.row) if owned[failure.row] else entry.stale.get(failure.row)
        owned[failure.row] = False
        if sequence is not None and sequence.status is not Status.ENDED:
            _end(state, committed, sequence, EndReason.FAILED, now, detail=failure.message, field=failure.field)


def click(state: SchedulerState, committed: Committed, owned: BoolArray, result: StepResult, now: float) -> None:
    """Append the sampled tokens, one of each row."""
    rows = np.array(result.rows, dtype=np.int64)
    token_ids = np.array(result.token_ids, dtype=np.int64)
    counts = owned[rows]
    committed.logprobs = result.logprobs
    if not counts.all():
        committed.logprobs = list(compress(result.logprobs, counts.tolist()))
        rows, token_ids = rows[counts], token_ids[counts]
    _append(state, committed, rows, token_ids, now)


def click_several(
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
        advance(state, committed, rows[later], np.ones(len(later), dtype=np.int64))
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
    watched = slots.watched[rows]
    if watched.any():
        for row in rows[watched].tolist():
            slots.owner(row).caught_up(now)
            slots.watched[row] = False
    stopping = slots.hits_stop(rows, token_ids) | (slots.length[rows] >= slots.stop_at[rows])
    if stopping.any():
        for row, token_id in zip(rows[stopping].tolist(), token_ids[stopping].tolist(), strict=True):
            _stop(state, committed, slots.owner(row), token_id, now)


def deliver_late(
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


def end_scored(state: SchedulerState, committed: Committed, rows: IntArray, now: float) -> None:
    """Sequences that wanted nothing but log-probabilities of their prompt end when it is computed."""
    slots = state.slots
    rows = rows[~slots.samples[rows]]
    for row in rows[(slots.length[rows] > 0) & (slots.computed[rows] == slots.length[rows])].tolist():
        _end(state, committed, slots.owner(row), EndReason.MAX_TOKENS, now)


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
