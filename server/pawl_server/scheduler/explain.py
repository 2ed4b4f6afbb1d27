"""Why a sequence waits: a closed word and a sentence with the numbers. Read when asked, never per step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pawl_server.scheduler.admission import blocks_for
from pawl_server.scheduler.sequence import SequenceState, Status

if TYPE_CHECKING:
    from pawl_server.scheduler.state import SchedulerState

__all__ = ["SequenceView", "WaitReason", "count_reasons", "describe", "wait_reasons"]


@dataclass(frozen=True, slots=True)
class WaitReason:
    """`reason` is one of the closed words of `pawl_server.metrics.WAIT_REASONS`."""

    reason: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    """A copy of what an operator may see of a live sequence."""

    request_id: str
    phase: str  # "waiting", "prefill", "decode" or "preempted"
    prompt_tokens: int
    output_tokens: int
    num_blocks: int
    age_s: float
    preemption_count: int
    wait_reason: str
    user: str
    priority: int
    tenant: str


def wait_reasons(state: SchedulerState) -> Iterator[tuple[SequenceState, WaitReason]]:
    """Each waiting sequence, in the order in which they are considered, with what keeps it out.

    A cached prefix is not looked up: the number of blocks is the most that it may need.
    """
    limits = state.limits
    num_rows = len(state.free_rows) + len(state.rows_to_free)
    spare = limits.watermark_blocks if state.running else 0
    promised = sum(
        blocks_for(running.num_tokens, limits.block_size) - len(running.blocks) for running in state.running.values()
    )
    available = max(0, state.pool.num_available - promised - spare)
    head: SequenceState | None = None
    head_fits = True
    for position, sequence in enumerate(state.queue.in_order()):
        needed = blocks_for(sequence.num_tokens, limits.block_size)
        fits = needed <= available
        if head is None:
            head, head_fits = sequence, fits
        place = f"position {position + 1} of {state.num_waiting}"
        if not num_rows:
            yield sequence, WaitReason("slots", f"all {limits.max_running} slots are taken, {place}")
        elif sequence is not head and head.request.priority > sequence.request.priority:
            yield sequence, WaitReason("priority", f"a higher class waits (priority {head.request.priority}), {place}")
        elif sequence is not head and not head_fits and head.bypassed >= limits.max_bypass:
            text = f"blocks are kept for the head of the queue, overtaken {head.bypassed} times, {place}"
            yield sequence, WaitReason("reservation", text)
        elif not fits:
            yield sequence, WaitReason("blocks", f"needs up to {needed} KV blocks, {available} are available, {place}")
        else:
            text = f"the step's {limits.max_batch_tokens} tokens go to others, {place}"
            yield sequence, WaitReason("slots", text)


def count_reasons(state: SchedulerState) -> dict[str, int]:
    """Waiting sequences by reason; they sum to all that wait."""
    return dict(Counter(reason.reason for _, reason in wait_reasons(state)))


def _phase(sequence: SequenceState) -> str:
    if sequence.status is Status.WAITING:
        return "preempted" if sequence.preemptions else "waiting"
    return "decode" if sequence.num_output else "prefill"


def describe(state: SchedulerState, now: float) -> list[SequenceView]:
    """Every live sequence, oldest first."""
    reasons = {sequence.order: reason for sequence, reason in wait_reasons(state)}
    return [
        SequenceView(
            request_id=sequence.request.request_id,
            phase=_phase(sequence),
            prompt_tokens=sequence.num_prompt,
            output_tokens=sequence.num_output,
            num_blocks=len(sequence.blocks),
            age_s=now - sequence.arrived_at,
            preemption_count=sequence.preemptions,
            wait_reason=reasons[sequence.order].text if sequence.order in reasons else "",
            user=sequence.request.user,
            priority=sequence.request.priority,
            tenant=sequence.request.tenant,
        )
        for sequence in sorted(state.live.values(), key=lambda sequence: sequence.order)
    ]
