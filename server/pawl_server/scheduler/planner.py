"""One step: who computes how many tokens, with which blocks. Reads the state, writes nothing.

There is no prefill phase and no decode phase: a sequence has computed tokens that chase its tokens, and a step is a
map from sequence to number of tokens, under one token budget: those that want one token first (decodes), then
partial prefills, then admissions (Orca, OSDI 2022; Sarathi-Serve, OSDI 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pawl_server.kv.draft import BlockDraft
from pawl_server.scheduler.admission import SchedulerLimits, blocks_for
from pawl_server.scheduler.preemption import choose_victim
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import NewSequence, StepPlan

__all__ = ["Admission", "Grant", "Plan", "plan_step"]


@dataclass(frozen=True, slots=True)
class Grant:
    """Tokens of a running sequence, and the blocks it gets for them."""

    sequence: SequenceState
    num_tokens: int
    new_blocks: list[int]


@dataclass(frozen=True, slots=True)
class Admission:
    """A waiting sequence that starts: its row, the cached blocks it shares, the blocks it gets, its first chunk."""

    sequence: SequenceState
    row: int
    hits: list[int]
    new_blocks: list[int]
    num_tokens: int


@dataclass(slots=True)
class Plan:
    """A step that may be launched once, while the state is as it was planned from."""

    step: int
    epoch: int
    now: float
    draft: BlockDraft
    budget: int
    victims: list[SequenceState] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    bypassed: list[SequenceState] = field(default_factory=list)
    free_rows: list[int] = field(default_factory=list)
    freed_rows: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(g.num_tokens for g in self.grants) + sum(a.num_tokens for a in self.admissions)

    @property
    def kind(self) -> str:
        """What the step does: "prefill", "decode" or "mixed"."""
        decodes = sum(grant.num_tokens == 1 for grant in self.grants)
        others = len(self.grants) - decodes + len(self.admissions)
        return "mixed" if decodes and others else "prefill" if others else "decode"

    def wire(self) -> StepPlan:
        """The step as the worker is told it."""
        return StepPlan(
            step=self.step,
            epoch=self.epoch,
            freed_rows=self.freed_rows,
            new=[_new_sequence(admission) for admission in self.admissions],
            append_blocks=[(g.sequence.row, g.new_blocks) for g in self.grants if g.new_blocks],
            rows=[g.sequence.row for g in self.grants] + [a.row for a in self.admissions],
            num_tokens=[g.num_tokens for g in self.grants] + [a.num_tokens for a in self.admissions],
        )


def _new_sequence(admission: Admission) -> NewSequence:
    sequence, request = admission.sequence, admission.sequence.request
    wants_logprobs = sequence.prompt_logprobs_next < sequence.num_prompt
    return NewSequence(
        row=admission.row,
        token_ids=sequence.tokens.tolist(),
        num_prompt_tokens=sequence.num_prompt,
        num_computed=len(admission.hits) * (sequence.chain.block_size if sequence.chain else 0),
        block_ids=admission.hits + admission.new_blocks,
        sampling=request.sampling,
        prompt_logprobs=request.prompt_logprobs if wants_logprobs else -1,
        prompt_logprobs_from=sequence.prompt_logprobs_next,
        samples=sequence.samples,
    )


def plan_step(state: SchedulerState, limits: SchedulerLimits, now: float) -> Plan | None:
    """Plan the next step; None when there is nothing to compute.

    Preempts only what it must: first for decodes; and when nobody at all could go on, until the oldest of the
    highest class can.
    """
    forced: list[SequenceState] = []
    while True:
        plan = _attempt(state, limits, now, forced)
        if plan.grants or plan.admissions:
            return plan
        left = [sequence for sequence in state.running.values() if sequence not in plan.victims]
        victim = choose_victim(left, state.pool)
        if victim is None:
            return None
        forced = [*plan.victims, victim]


def _attempt(state: SchedulerState, limits: SchedulerLimits, now: float, forced: list[SequenceState]) -> Plan:
    freed = list(state.rows_to_free)
    plan = Plan(
        step=state.step + 1,
        epoch=state.epoch,
        now=now,
        draft=BlockDraft(state.pool),
        budget=limits.max_batch_tokens,
        free_rows=state.free_rows + freed,
        freed_rows=freed,
    )
    for victim in forced:
        _preempt(plan, victim)
    going = [s for s in state.running.values() if not s.ledger and s not in forced]
    _grant_decodes(plan, state, limits, going)
    partial = _grant_prefills(plan, limits, [s for s in going if s.want > 1 and s not in plan.victims])
    if not plan.victims:
        _admit(plan, state, limits, partial)
    return plan


def _preempt(plan: Plan, victim: SequenceState) -> None:
    plan.victims.append(victim)
    plan.draft.release(victim.blocks)
    plan.free_rows.append(victim.row)
    plan.freed_rows.append(victim.row)


def _missing_blocks(sequence: SequenceState, num_tokens: int, block_size: int) -> int:
    return blocks_for(sequence.num_computed + num_tokens, block_size) - len(sequence.blocks)


def _grant_decodes(plan: Plan, state: SchedulerState, limits: SchedulerLimits, going: list[SequenceState]) -> None:
    """One token for each that wants one. Victims are chosen before any block is taken, so nothing is undone."""
    missing = {s.order: _missing_blocks(s, 1, limits.block_size) for s in going if s.want == 1}
    needed = sum(missing.values())
    left = list(going)
    while needed > plan.draft.num_available:
        victim = choose_victim(left, state.pool)
        if victim is None:
            break
        left.remove(victim)
        needed -= missing.pop(victim.order, 0)
        _preempt(plan, victim)
    for sequence in left:
        if sequence.order in missing:
            blocks = plan.draft.take(missing[sequence.order])
            if blocks is not None:
                plan.grants.append(Grant(sequence, 1, blocks))
                plan.budget -= 1


def _grant_prefills(plan: Plan, limits: SchedulerLimits, partial: list[SequenceState]) -> list[SequenceState]:
    """A chunk for each that is in mid-prompt, as far as budget and blocks go; returns those still partial."""
    still: list[SequenceState] = []
    for sequence in partial:
        room = (len(sequence.blocks) + plan.draft.num_available) * limits.block_size - sequence.num_computed
        chunk = min(sequence.want, limits.max_prefill_chunk, plan.budget, room)
        if len(still) >= limits.max_partial_prefills or chunk < 1:
            still.append(sequence)
            continue
        blocks = plan.draft.take(_missing_blocks(sequence, chunk, limits.block_size))
        if blocks is None:
            still.append(sequence)
            continue
        plan.grants.append(Grant(sequence, chunk, blocks))
        plan.budget -= chunk
        if chunk < sequence.want:
            still.append(sequence)
    return still


def _max_hits(sequence: SequenceState, block_size: int) -> int:
    """Most blocks that may come from the cache: one token must be computed, and every log-probability wanted."""
    below = len(sequence.tokens) - 1
    if sequence.request.prompt_logprobs >= 0 and sequence.prompt_logprobs_next < sequence.num_prompt:
        below = min(below, sequence.prompt_logprobs_next - 1)
    return below // block_size


def _admit(plan: Plan, state: SchedulerState, limits: SchedulerLimits, partial: list[SequenceState]) -> None:
    """Start waiting sequences in order. One that does not fit may be overtaken a bounded number of times."""
    reserved = sum(_missing_blocks(s, len(s.tokens) - s.num_computed, limits.block_size) for s in partial) - sum(
        len(g.new_blocks) for g in plan.grants if g.sequence in partial
    )
    num_partial = len(partial)
    for sequence in state.waiting_in_order():
        if plan.budget < 1 or not plan.free_rows:
            return
        hits: list[int] = []
        if sequence.chain is not None:
            hits = plan.draft.prefix_hits(sequence.chain, _max_hits(sequence, limits.block_size))
        computed = len(hits) * limits.block_size
        want = len(sequence.tokens) - computed
        chunk = min(want, limits.max_prefill_chunk, plan.budget)
        whole = blocks_for(len(sequence.tokens), limits.block_size) - len(hits)
        busy = bool(state.running or plan.admissions)
        spare = limits.watermark_blocks if busy else 0
        cost = whole + plan.draft.num_free_among(hits)
        if cost > plan.draft.num_available - reserved - spare:
            if sequence.bypassed >= limits.max_bypass or len(plan.bypassed) >= limits.max_bypass:
                return
            plan.bypassed.append(sequence)
            continue
        if chunk < want and num_partial >= limits.max_partial_prefills:
            return
        plan.draft.share(hits)
        blocks = plan.draft.take(blocks_for(computed + chunk, limits.block_size) - len(hits))
        if blocks is None:
            return
        reserved += whole - len(blocks)
        num_partial += chunk < want
        plan.admissions.append(Admission(sequence, plan.free_rows.pop(), hits, blocks, chunk))
        plan.budget -= chunk
