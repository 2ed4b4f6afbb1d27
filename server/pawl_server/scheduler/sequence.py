"""One sequence: its tokens, its blocks, its times. State and its transitions, no policy.

While it runs, what changes with every token is in the arrays of `SlotTable`; the properties here read it there.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from pawl_server.kv.block_hash import HashChain
from pawl_server.scheduler.endings import Ended, EndReason
from pawl_server.scheduler.groups import SampleGroup
from pawl_server.scheduler.slots import SlotTable
from pawl_workers.plan import SamplingSpec

if TYPE_CHECKING:
    from pawl_server.scheduler.speculation import Drafting

__all__ = ["Preemption", "SequenceRequest", "SequenceState", "Sibling", "Status"]


class Status(Enum):
    """Where a sequence is. It is in exactly one place."""

    WAITING = "waiting"
    PARKED = "parked"  # until another sample of its request has computed the prompt
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Sibling:
    """A further sample of a request: like the first but for its handle and its seed."""

    handle: Hashable
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """What the engine asks for. `handle` is opaque here and unique among live sequences.

    `max_output_tokens`: -1 = up to the context limit, 0 = prompt log-probabilities only.
    `resume_ids`: output that another engine emitted already; counted as output, not emitted again.
    `constraint`: opaque here; what it may choose is decided by whoever made it.
    """

    handle: Hashable
    request_id: str
    prompt_ids: Sequence[int]
    sampling: SamplingSpec
    max_output_tokens: int
    cache_key: bytes
    resume_ids: Sequence[int] = ()
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    min_output_tokens: int = 0
    prompt_logprobs: int = -1
    prompt_logprobs_from: int = 1
    bypass_prefix_cache: bool = False
    retain_prefix_s: float = 0.0  # keep its cached prefix for so long after its end
    priority: int = 0
    user: str = ""
    tenant: str = ""
    weight: float = 1.0  # of the tenant: its share of the service against others
    constraint: object | None = None
    siblings: Sequence[Sibling] = ()  # further samples of the same prompt; all start together, or none does

    @property
    def handles(self) -> tuple[Hashable, ...]:
        """Of all samples."""
        return (self.handle, *(sibling.handle for sibling in self.siblings))


@dataclass(frozen=True, slots=True)
class Preemption:
    """Why a sequence lost its KV: who needed blocks, and how many there were too few.

    `reason`: "decode" = those who decode did; "progress" = nobody could go on; "priority" = one of a much higher class
    waited.
    """

    step: int
    reason: str
    num_short: int
    num_computed: int  # tokens it had computed
    num_lost: int  # of them, those that are not in the prefix cache


class SequenceState:
    """A live sequence. Written by launch, commit and the events between steps alone."""

    __slots__ = (
        "_slots", "_tokens", "arrived_at", "blocks", "bypassed", "cached_prompt_tokens", "chain", "charged",
        "drafting", "first_granted_at", "first_token_at", "group", "last_preemption", "last_token_at", "level", "limit",
        "num_prompt", "num_stale", "order", "preempted_at", "preemptions", "prompt_logprobs_next", "recompute_until",
        "request", "row", "settled", "stalled_before_first_token", "stalled_s", "status", "tenant", "ticket",
        "tokens_lost",
    )  # fmt: skip

    def __init__(
        self,
        request: SequenceRequest,
        slots: SlotTable,
        *,
        order: int,
        tenant: int,
        limit: int,
        chain: HashChain | None,
        now: float,
    ) -> None:
        self.request = request
        self._slots = slots
        self.order = order  # of arrival: the older, the smaller
        self.tenant = tenant  # its number in the tenants' accounts
        self.limit = limit  # most tokens, prompt included: it ends when it has as many
        self.level = request.priority  # class, raised with age
        self.ticket = -1  # its place in the queue; -1 = not queued
        self.charged = False  # whether its tenant was charged for the prompt
        self.chain = chain  # None when the prefix cache is not used
        self.group: SampleGroup | None = None  # None for the only sample of a request
        self._tokens = array("i", [*request.prompt_ids, *request.resume_ids])
        self.num_prompt = len(request.prompt_ids)
        self.blocks: list[int] = []
        self.row = -1  # while it runs
        self.status = Status.WAITING
        self.num_stale = 0  # launched steps that computed it before it lost its KV; their tokens are still to come
        self.bypassed = 0  # how often it was overtaken because it did not fit
        self.cached_prompt_tokens = -1  # hits of the first admission; -1 before
        self.recompute_until = 0  # tokens that had been computed before a preemption
        self.prompt_logprobs_next = request.prompt_logprobs_from
        self.drafting: Drafting | None = None  # once it was asked for drafts
        self.preemptions = 0
        self.last_preemption: Preemption | None = None
        self.tokens_lost = 0  # computed tokens that preemptions took, cached ones not counted
        self.settled = False  # whether it was preempted as often as may be
        self.arrived_at = now
        self.first_granted_at = -1.0
        self.first_token_at = -1.0
        self.last_token_at = -1.0
        self.preempted_at = -1.0
        self.stalled_s = 0.0
        self.stalled_before_first_token = 0.0

    @property
    def tokens(self) -> array[int]:
        """Prompt and output so far."""
        self.gather()
        return self._tokens

    @property
    def num_tokens(self) -> int:
        """Length of prompt and output so far."""
        return len(self._tokens) if self.row < 0 else int(self._slots.length[self.row])

    @property
    def num_output(self) -> int:
        """Tokens of output, resumed ones included."""
        return self.num_tokens - self.num_prompt

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is there, by committed steps."""
        return 0 if self.row < 0 else int(self._slots.computed[self.row])

    @property
    def num_in_flight(self) -> int:
        """Tokens that launched steps compute."""
        return 0 if self.row < 0 else int(self._slots.planned[self.row] - self._slots.computed[self.row])

    @property
    def want(self) -> int:
        """Tokens to compute that no launched step computes; those being sampled count, unless drafts are among them."""
        if self.row < 0:
            return len(self._tokens)
        return max(0, int(self._slots.expected[self.row] - self._slots.planned[self.row]))

    @property
    def constrained(self) -> bool:
        """Whether not every token may follow."""
        return self.request.constraint is not None

    @property
    def followers(self) -> Sequence[SequenceState]:
        """Those that are parked until this one has computed the prompt."""
        group = self.group
        return group.parked if group is not None and group.leader is self else ()

    @property
    def samples(self) -> bool:
        """Whether it generates; False for prompt log-probabilities only."""
        return self.request.max_output_tokens != 0

    def gather(self) -> None:
        """Take over the tokens that the slot table still holds."""
        if self.row >= 0 and len(self._tokens) < self._slots.length[self.row]:
            self._tokens.frombytes(self._slots.tokens_since(self.row, len(self._tokens)))

    def append_late(self, token_id: int) -> None:
        """A token of a step that was launched before the KV was lost."""
        self._tokens.append(token_id)

    def inherit(self, leader: SequenceState, block_size: int) -> None:
        """A parked sequence begins, with what is known of the prompt."""
        self.level, self.charged, self.bypassed = leader.level, leader.charged, leader.bypassed
        if leader.chain is not None:
            self.chain = leader.chain.fork(self.num_prompt // block_size)

    def leave_row(self) -> None:
        """Stop running; tokens and output stay."""
        self.gather()
        self._note_last_token()
        self._slots.leave(self.row)
        self.row = -1
        self.blocks = []

    def lose_kv(self, now: float) -> None:
        """Forget everything computed; tokens and output stay."""
        self.recompute_until = max(self.recompute_until, self.num_computed)
        self.leave_row()
        self.status = Status.WAITING
        if self.preempted_at < 0:
            self.preempted_at = now

    def caught_up(self, now: float) -> None:
        """A token came: a stall, if there was one, is over."""
        if self.preempted_at >= 0:
            self.stalled_s += now - self.preempted_at
            self.preempted_at = -1.0
        self.token_came(now)

    def token_came(self, now: float) -> None:
        """A token came, perhaps late."""
        if self.first_token_at < 0:
            self.first_token_at = now
            self.stalled_before_first_token = self.stalled_s
        self.last_token_at = now

    def _note_last_token(self) -> None:
        if self.row >= 0:
            self.last_token_at = max(self.last_token_at, float(self._slots.last_token_at[self.row]))

    def ended(
        self, reason: EndReason, now: float, *, detail: str = "", field: str = "", stop_token_id: int = -1
    ) -> Ended:
        """The terminal event, with the times added up."""
        self._note_last_token()
        if self.preempted_at >= 0:
            self.stalled_s += now - self.preempted_at
            self.preempted_at = -1.0
        prefill_s = decode_s = 0.0
        if self.first_granted_at >= 0:
            prefill_end = self.first_token_at if self.first_token_at >= 0 else now
            before = self.stalled_before_first_token if self.first_token_at >= 0 else self.stalled_s
            prefill_s = max(0.0, prefill_end - self.first_granted_at - before)
        if self.first_token_at >= 0:
            after = self.stalled_s - self.stalled_before_first_token
            decode_s = max(0.0, self.last_token_at - self.first_token_at - after)
        return Ended(
            handle=self.request.handle,
            request_id=self.request.request_id,
            reason=reason,
            detail=detail,
            field=field,
            stop_token_id=stop_token_id,
            cached_prompt_tokens=max(0, self.cached_prompt_tokens),
            output_tokens=self.num_output,
            prefill_s=prefill_s,
            decode_s=decode_s,
            stalled_s=self.stalled_s,
            preemption_count=self.preemptions,
        )
