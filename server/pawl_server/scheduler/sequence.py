"""One sequence: its tokens, its blocks, and what of it is in flight. State and its transitions, no policy."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum

from pawl_server.kv.block_hash import HashChain
from pawl_workers.plan import SamplingSpec

__all__ = ["EndReason", "Ended", "LedgerEntry", "SequenceRequest", "SequenceState", "Status"]


class Status(Enum):
    """Where a sequence is. It is in exactly one place."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class EndReason(Enum):
    """Why a sequence ended."""

    EOS = "eos"
    STOP_TOKEN = "stop_token"  # noqa: S105 (a reason, not a secret)
    MAX_TOKENS = "max_tokens"
    CONTEXT_LENGTH = "context_length"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """What the engine asks for. `handle` is opaque here and unique among live sequences.

    `max_output_tokens`: -1 = up to the context limit, 0 = prompt log-probabilities only.
    `resume_ids`: output that another engine emitted already; counted as output, not emitted again.
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
    priority: int = 0
    user: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Tokens of a sequence that a launched step computes."""

    step: int
    epoch: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The one terminal event of a sequence. Times in seconds."""

    handle: Hashable
    request_id: str
    reason: EndReason
    detail: str
    stop_token_id: int
    cached_prompt_tokens: int
    output_tokens: int
    prefill_s: float
    decode_s: float
    stalled_s: float
    preemption_count: int


class SequenceState:
    """A live sequence. Written by launch, commit and the events between steps alone."""

    __slots__ = (
        "arrived_at", "blocks", "bypassed", "cached_prompt_tokens", "chain", "discarded", "epoch", "first_granted_at",
        "first_token_at", "last_token_at", "ledger", "limit", "num_computed", "num_prompt", "num_published", "order",
        "preempted_at", "preemptions", "prompt_logprobs_next", "recompute_until", "request", "row",
        "stalled_before_first_token", "stalled_s", "status", "tokens",
    )  # fmt: skip

    def __init__(
        self, request: SequenceRequest, *, order: int, limit: int, chain: HashChain | None, now: float
    ) -> None:
        self.request = request
        self.order = order  # of arrival: the older, the smaller
        self.limit = limit  # most tokens, prompt included
        self.chain = chain  # None when the prefix cache is not used
        self.tokens = array("i", [*request.prompt_ids, *request.resume_ids])
        self.num_prompt = len(request.prompt_ids)
        self.num_computed = 0  # tokens whose KV is there, by committed steps
        self.num_published = 0  # blocks of `blocks` that are published or shared
        self.ledger: deque[LedgerEntry] = deque()
        self.blocks: list[int] = []
        self.row = -1
        self.epoch = 1  # counts up when its KV is lost
        self.status = Status.WAITING
        self.discarded = False  # aborted while in flight: the result is dropped at commit
        self.bypassed = 0  # how often it was overtaken because it did not fit
        self.cached_prompt_tokens = -1  # hits of the first admission; -1 before
        self.recompute_until = 0  # tokens that had been computed before a preemption
        self.prompt_logprobs_next = request.prompt_logprobs_from
        self.preemptions = 0
        self.arrived_at = now
        self.first_granted_at = -1.0
        self.first_token_at = -1.0
        self.last_token_at = -1.0
        self.preempted_at = -1.0
        self.stalled_s = 0.0
        self.stalled_before_first_token = 0.0

    @property
    def num_output(self) -> int:
        """Tokens of output, resumed ones included."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_in_flight(self) -> int:
        """Tokens that launched steps compute."""
        return sum(entry.num_tokens for entry in self.ledger)

    @property
    def want(self) -> int:
        """Tokens that are neither computed nor in flight."""
        return len(self.tokens) - self.num_computed - self.num_in_flight

    @property
    def samples(self) -> bool:
        """Whether it generates; False for prompt log-probabilities only."""
        return self.request.max_output_tokens != 0

    def lose_kv(self, now: float) -> None:
        """Forget everything computed; tokens and output stay."""
        self.recompute_until = max(self.recompute_until, self.num_computed)
        self.num_computed = self.num_published = 0
        self.blocks = []
        self.row = -1
        self.epoch += 1
        self.ledger.clear()
        self.status = Status.WAITING
        if self.preempted_at < 0:
            self.preempted_at = now

    def caught_up(self, now: float) -> None:
        """A token came: a stall, if there was one, is over."""
        if self.preempted_at >= 0:
            self.stalled_s += now - self.preempted_at
            self.preempted_at = -1.0
        if self.first_token_at < 0:
            self.first_token_at = now
            self.stalled_before_first_token = self.stalled_s
        self.last_token_at = now

    def ended(self, reason: EndReason, now: float, *, detail: str = "", stop_token_id: int = -1) -> Ended:
        """The terminal event, with the times added up."""
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
            stop_token_id=stop_token_id,
            cached_prompt_tokens=max(0, self.cached_prompt_tokens),
            output_tokens=self.num_output,
            prefill_s=prefill_s,
            decode_s=decode_s,
            stalled_s=self.stalled_s,
            preemption_count=self.preemptions,
        )
