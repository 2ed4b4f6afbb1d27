"""Why a sequence waits: a closed word and a sentence with the numbers. Read when asked, never per step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from pawl_server.scheduler.fit import Room
from pawl_server.scheduler.sequence import SequenceState, Status

if TYPE_CHECKING:
    from pawl_server.scheduler.state import SchedulerState

__all__ = ["SequenceView", "WaitReason", "count_reasons", "describe", "wait_reasons"]


_MOST_ASKED = 256  # waiting sequences that are asked for their reason when these are counted


@dataclass(frozen=True, slots=True)
class WaitReason:
    """`reason` is one of the closed words of `pawl_server.metrics.WAIT_REASONS`; `position` is 1 for the first."""

    reason: str
    text: str
    position: int


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
    preemption_reason: str
    lost_tokens: int
    queue_position: int = 0  # among those that wait, 1 = next; 0 = it is not in the queue


def wait_reasons(state: SchedulerState, most: int | None = None) -> Iterator[tuple[SequenceState, WaitReason]]:
    """Each waiting sequence, in the order in which they are considered, with what keeps it out; at most `most`.

    A cached prefix is not looked up: the number of blocks is the most that it may need.
    """
    limits = state.limits
    num_rows = len(state.free_rows) + len(state.rows_to_free)
    room = Room(state.slots, state.lengths, limits, 0, state.pool.now, state.leaders.values())
    head: SequenceState | None = None
    head_fits = True
    for position, sequence in enumerate(islice(state.queue.in_order(), most), start=1):
        need = room.need(sequence)
        fits = room.fits(need, state.pool.num_available, 0, settled=sequence.settled)
        if head is None:
            head, head_fits = sequence, fits
        place = f"position {position} of {len(state.queue)}"
        number = 1 + len(sequence.followers)
        if not num_rows:
            yield sequence, WaitReason("slots", f"all {limits.max_running} slots are taken, {place}", position)
        elif number > num_rows:
            text = f"its {number} samples start together and {num_rows} of {limits.max_running} slots are free, {place}"
            yield sequence, WaitReason("slots", text, position)
        elif head.level > sequence.level:
            yield sequence, WaitReason("priority", f"a higher class waits (priority {head.level}), {place}", position)
        elif sequence is not head and not head_fits and head.bypassed >= limits.max_bypass:
            text = f"blocks are kept for the head, overtaken {head.bypassed} times, and it might delay it, {place}"
            yield sequence, WaitReason("reservation", text, position)
        elif not fits:
            available = max(0, state.pool.num_available - room.promised)
            text = (
                f"needs up to {need.expected} KV blocks, {need.now} for its {sequence.num_tokens} tokens and the others"
                f" for its output; {available} are available and {room.promised} kept for those who run, {place}"
            )
            yield sequence, WaitReason("blocks", text, position)
        elif sequence.tenant != head.tenant:
            mine, theirs = state.accounts.service(sequence.tenant), state.accounts.service(head.tenant)
            text = f"its tenant has had {mine:.0f} weighted tokens, the next one's {theirs:.0f}, {place}"
            yield sequence, WaitReason("fairness", text, position)
        else:
            text = f"the step's {limits.max_batch_tokens} tokens go to others, {place}"
            yield sequence, WaitReason("slots", text, position)


def count_reasons(state: SchedulerState) -> dict[str, int]:
    """Waiting sequences by reason; they sum to all that wait.

    Only the first are asked; the others wait behind the last of these, for its reason. Those that are parked wait for
    the reason of their leader, or for the prompt that it computes.
    """
    counts: Counter[str] = Counter()
    num_asked, last = 0, ""
    for sequence, reason in wait_reasons(state, _MOST_ASKED):
        number, last = 1 + len(sequence.followers), reason.reason
        counts[last] += number
        num_asked += number
    num_prompt = sum(len(leader.followers) for leader in state.leaders.values())
    if num_prompt:
        counts["prompt"] += num_prompt
    if last:
        counts[last] += state.num_waiting - num_asked - num_prompt
    return dict(counts)


def _phase(sequence: SequenceState) -> str:
    if sequence.status is Status.PARKED:
        return "waiting"
    if sequence.status is Status.WAITING:
        return "preempted" if sequence.preemptions else "waiting"
    return "decode" if sequence.num_output else "prefill"


def _why_preempted(sequence: SequenceState) -> str:
    last = sequence.last_preemption
    if last is None:
        return ""
    lost = f"{last.num_computed} tokens were computed, {last.num_lost} of them are not cached"
    if last.reason == "priority":
        lacked = f"was short of {last.num_short} KV blocks" if last.num_short else "had no slot"
        return f"step {last.step}: priority: a request of a much higher class {lacked}; {lost}"
    need = {"decode": "those who decode", "progress": "the oldest of the highest class"}[last.reason]
    return f"step {last.step}: {last.reason}: {need} were short of {last.num_short} KV blocks; {lost}"


def describe(state: SchedulerState, now: float) -> list[SequenceView]:
    """Every live sequence, oldest first."""
    reasons, places = dict[int, str](), dict[int, int]()
    for sequence, reason in wait_reasons(state):
        reasons[sequence.order], places[sequence.order] = f"{reason.reason}: {reason.text}", reason.position
    for leader in state.live.values():
        text = reasons.get(leader.order, "prompt: it is computed once, for all samples of the request")
        reasons.update((follower.order, text) for follower in leader.followers)
    return [
        SequenceView(
            request_id=sequence.request.request_id,
            phase=_phase(sequence),
            prompt_tokens=sequence.num_prompt,
            output_tokens=sequence.num_output,
            num_blocks=len(sequence.blocks),
            age_s=now - sequence.arrived_at,
            preemption_count=sequence.preemptions,
            wait_reason=reasons.get(sequence.order, ""),
            user=sequence.request.user,
            priority=sequence.request.priority,
            tenant=sequence.request.tenant,
            preemption_reason=_why_preempted(sequence),
            lost_tokens=sequence.tokens_lost,
            queue_position=places.get(sequence.order, 0),
        )
        for sequence in sorted(state.live.values(), key=lambda sequence: sequence.order)
    ]
