"""The only writers of a step: `launch` puts it into the ledger, `commit` settles it, `void` takes it back."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from pawl_server.scheduler.planner import Plan
from pawl_server.scheduler.sequence import Ended, EndReason, LedgerEntry, SequenceState, Status
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import PromptLogprobs, StepResult, TokenLogprobs

__all__ = ["Committed", "StaleResultError", "commit", "launch", "void"]


class StaleResultError(RuntimeError):
    """A result of another step or epoch than the one in flight. A defect of the executor, never of a request."""


@dataclass(slots=True)
class Committed:
    """What a step gave: parallel arrays of tokens, and the ends. `indices` count the output of each sequence."""

    handles: list[Hashable] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: list[tuple[Hashable, PromptLogprobs]] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    num_prompt_computed: int = 0
    num_prompt_cached: int = 0
    num_recomputed: int = 0
    num_preempted: int = 0


def launch(state: SchedulerState, plan: Plan) -> None:
    """Write a plan into the ledger: victims out, admissions in, blocks held, tokens in flight."""
    plan.draft.apply()
    for victim in plan.victims:
        victim.preemptions += 1
        state.requeue(victim, plan.now)
    for sequence in plan.bypassed:
        if plan.admissions:
            sequence.bypassed += 1
    state.free_rows = plan.free_rows
    state.rows_to_free = []
    state.step = plan.step
    for grant in plan.grants:
        grant.sequence.blocks += grant.new_blocks
        grant.sequence.ledger.append(LedgerEntry(plan.step, grant.sequence.epoch, grant.num_tokens))
    for admission in plan.admissions:
        sequence = admission.sequence
        _leave_queue(state, sequence)
        sequence.row = admission.row
        sequence.blocks = admission.hits + admission.new_blocks
        sequence.num_computed = len(admission.hits) * state.limits.block_size
        sequence.num_published = len(admission.hits)
        if sequence.cached_prompt_tokens < 0:
            sequence.cached_prompt_tokens = min(sequence.num_computed, sequence.num_prompt)
            sequence.first_granted_at = plan.now
        sequence.ledger.append(LedgerEntry(plan.step, sequence.epoch, admission.num_tokens))
        state.running[sequence.order] = sequence


def _leave_queue(state: SchedulerState, sequence: SequenceState) -> None:
    state.num_waiting -= 1
    queue = state.waiting[sequence.request.priority]
    queue.remove(sequence)  # near the front: at most `max_bypass` and the aborted stand before it
    sequence.status = Status.RUNNING
    while queue and queue[0].status is not Status.WAITING:
        queue.popleft()


def commit(state: SchedulerState, plan: Plan, result: StepResult, now: float) -> Committed:
    """Settle the ledger entries of a step and apply its tokens.

    Raises:
        StaleResultError: the result is not that of this plan.
    """
    if (result.step, result.epoch) != (plan.step, plan.epoch):
        raise StaleResultError(
            f"result of step {result.step} epoch {result.epoch}, in flight is {plan.step} epoch {plan.epoch}"
        )
    committed = Committed(num_preempted=len(plan.victims))
    for admission in plan.admissions:
        committed.num_prompt_cached += len(admission.hits) * state.limits.block_size
    going: dict[int, SequenceState] = {}
    for sequence, num_tokens in _in_flight(plan):
        sequence.ledger.popleft()
        if sequence.discarded:
            state.remove(sequence)
            continue
        again = max(0, min(sequence.recompute_until - sequence.num_computed, num_tokens))
        committed.num_recomputed += again
        committed.num_prompt_computed += max(0, min(sequence.num_prompt - sequence.num_computed, num_tokens) - again)
        sequence.num_computed += num_tokens
        _publish(state, sequence)
        going[sequence.row] = sequence
    for failure in result.failures:
        if failure.row in going:
            _end(state, committed, going.pop(failure.row), EndReason.FAILED, now, detail=failure.message)
    for scored in result.prompt_logprobs:
        if scored.row in going:
            sequence = going[scored.row]
            committed.prompt_logprobs.append((sequence.request.handle, scored))
            sequence.prompt_logprobs_next = scored.first_position + len(scored.positions)
    logprobs = result.logprobs or [None] * len(result.rows)
    for row, token_id, token_logprobs in zip(result.rows, result.token_ids, logprobs, strict=True):
        if row in going:
            _click(state, committed, going[row], token_id, token_logprobs, now)
    for sequence in going.values():
        if not sequence.samples and sequence.num_computed == len(sequence.tokens):
            _end(state, committed, sequence, EndReason.MAX_TOKENS, now)
    return committed


def _in_flight(plan: Plan) -> list[tuple[SequenceState, int]]:
    granted = [(grant.sequence, grant.num_tokens) for grant in plan.grants]
    return granted + [(admission.sequence, admission.num_tokens) for admission in plan.admissions]


def _publish(state: SchedulerState, sequence: SequenceState) -> None:
    """Offer the blocks that the step completed to others. Only full blocks of computed, known tokens."""
    if sequence.chain is None:
        return
    full = sequence.num_computed // state.limits.block_size
    sequence.chain.extend(sequence.tokens, full)
    for index in range(sequence.num_published, full):
        state.pool.publish(sequence.blocks[index], sequence.chain[index])
    sequence.num_published = full


def _click(
    state: SchedulerState,
    committed: Committed,
    sequence: SequenceState,
    token_id: int,
    logprobs: TokenLogprobs | None,
    now: float,
) -> None:
    """Append one sampled token and stop where it says so."""
    committed.handles.append(sequence.request.handle)
    committed.indices.append(sequence.num_output)
    committed.token_ids.append(token_id)
    committed.logprobs.append(logprobs)
    sequence.tokens.append(token_id)
    sequence.caught_up(now)
    request = sequence.request
    stop_token_id = -1
    reason: EndReason | None = None
    if sequence.num_output > request.min_output_tokens or request.min_output_tokens == 0:
        if token_id in request.eos_token_ids:
            reason, stop_token_id = EndReason.EOS, token_id
        elif token_id in request.stop_token_ids:
            reason, stop_token_id = EndReason.STOP_TOKEN, token_id
    if reason is None and 0 < request.max_output_tokens <= sequence.num_output:
        reason = EndReason.MAX_TOKENS
    if reason is None and len(sequence.tokens) >= sequence.limit:
        reason = EndReason.CONTEXT_LENGTH
    if reason is not None:
        _end(state, committed, sequence, reason, now, stop_token_id=stop_token_id)


def _end(
    state: SchedulerState,
    committed: Committed,
    sequence: SequenceState,
    reason: EndReason,
    now: float,
    *,
    detail: str = "",
    stop_token_id: int = -1,
) -> None:
    committed.ended.append(sequence.ended(reason, now, detail=detail, stop_token_id=stop_token_id))
    state.remove(sequence)


def void(state: SchedulerState, plan: Plan) -> None:
    """Take a failed step out of the ledger. Follow with `reset_worker`: what the worker holds is unknown."""
    for sequence, _ in _in_flight(plan):
        sequence.ledger.popleft()
        if sequence.discarded:
            state.remove(sequence)
