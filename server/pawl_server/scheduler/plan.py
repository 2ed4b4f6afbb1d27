"""What a planned step holds, and how the worker is told it. No policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pawl_server.kv.draft import BlockDraft
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.budget import StepBudget, StepLoad
from pawl_server.scheduler.groups import Fork
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.slots import IntArray, SlotTable
from pawl_server.scheduler.speculation import Proposals
from pawl_workers.plan import NewSequence, StepPlan

__all__ = ["Admission", "Plan", "Victim"]

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
        attempts: what was proposed in each attempt at a step, of which this one was chosen; empty = in this one alone.
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
    attempts: list[Proposals] = field(default_factory=list)
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
        return StepLoad(self.num_tokens, self.num_pairs, self.num_read, self.num_drafts > 0)

    @property
    def kind(self) -> str:
        """What the step does: "prefill", "decode" or "mixed"."""
        others = self.num_sequences - self.num_decodes
        return "mixed" if self.num_decodes and others else "prefill" if others else "decode"

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

    def left(self, slots: SlotTable) -> IntArray:
        """Rows that run and are not preempted by the plan so far."""
        return np.setdiff1d(slots.running(), [victim.sequence.row for victim in self.victims])

    def most_tokens(self, budget: StepBudget | None, context: int) -> int:
        """Tokens that the next chunk may have at most, if it stands after `context` others."""
        most = self.limits.max_prefill_chunk
        if budget is None:
            return min(most, self.budget)
        load = StepLoad(self.limits.max_batch_tokens - self.budget, self.num_pairs, self.num_read)
        return min(most, budget.chunk(load, self.num_decodes + self.num_drafts, context, self.budget))

    def take(self, context: int, num_tokens: int) -> None:
        """A chunk after `context` tokens is part of the step."""
        self.budget -= num_tokens
        self.num_pairs += num_tokens * context + num_tokens * (num_tokens + 1) // 2
        self.num_read += context + num_tokens

    def announce(self, sequence: SequenceState, row: int, blocks: Sequence[int], num_before: int, chunk: int) -> None:
        """Let those planned after share the blocks, from that of token `num_before` on, which this chunk fills."""
        if sequence.chain is not None:
            size = sequence.chain.block_size
            begin = num_before // size
            self.draft.announce(sequence.chain, begin, blocks[: (num_before + chunk) // size - begin], row)


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
