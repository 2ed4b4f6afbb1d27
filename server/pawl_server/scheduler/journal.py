"""All that happened to a scheduler, in the order in which it did, so that its decisions can be made again.

What is kept of a request is what decisions rest on: lengths, class, tenant and weight, and which of its full blocks
equal those of others. Tenants and blocks are numbered as they first appear, so that neither a name nor a token id is
in a journal, and so that the same events give the same bytes: the journal of a replay equals the one that is replayed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final

import msgspec

from pawl_server.scheduler.admission import SchedulerLimits

if TYPE_CHECKING:
    from pawl_server.scheduler.committer import Committed
    from pawl_server.scheduler.plan import Plan
    from pawl_server.scheduler.sequence import SequenceState
    from pawl_workers.plan import StepPlan, StepResult

__all__ = [
    "VERSION", "Aborted", "Began", "Event", "Flushed", "Journal", "Launched", "Measured", "Named", "Reset", "Settled",
    "Submitted", "Voided", "fingerprint", "read_events",
]  # fmt: skip

VERSION: Final = 2


class _Event(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Something that happened. Times in seconds of the engine's clock."""


class Began(_Event, frozen=True):
    """A scheduler began, with these limits and this target for its step budget (0: none)."""

    version: int
    epoch: int
    limits: SchedulerLimits
    target_gap_s: float


class Submitted(_Event, frozen=True):
    """A request was taken; its sequences are the next numbers in the order of arrival."""

    now: float
    num_prompt: int
    num_resumed: int
    max_output_tokens: int
    min_output_tokens: int
    prompt_logprobs: int
    prompt_logprobs_from: int
    caches: bool
    constrained: bool
    retain_prefix_s: float
    priority: int
    tenant: int
    weight: float
    namespace: int
    num_siblings: int


class Named(_Event, frozen=True):
    """Numbers of blocks of a sequence, from block `begin` on. Equal numbers, equal prefixes up to their end."""

    sequence: int
    begin: int
    names: list[int]


class Aborted(_Event, frozen=True):
    """A sequence was ended from outside."""

    now: float
    sequence: int


class Launched(_Event, frozen=True):
    """A step was planned and launched.

    Attributes:
        now: when it was planned.
        fingerprint: of the plan.
        drafts: (row, number) of the drafts that it was to have, in each attempt at the plan up to the last that had
            some, which rests on token ids.
        limits: that it was planned under, where they were not the replica's own.
    """

    now: float
    fingerprint: bytes
    drafts: list[list[tuple[int, int]]]
    limits: SchedulerLimits | None


class Settled(_Event, frozen=True):
    """The oldest step in flight gave its result.

    Attributes:
        now: when.
        rows: that sampled, in order.
        stopped: sequences that ended with a token that ends them, and how many tokens of output they had.
        failed: rows that could not be computed.
        scored: (row, first position, positions) of prompt log-probabilities.
    """

    now: float
    rows: list[int]
    stopped: list[tuple[int, int]]
    failed: list[int]
    scored: list[tuple[int, int, int]]


class Measured(_Event, frozen=True):
    """What the last settled step took: in the worker, and in all."""

    worker_s: float
    elapsed_s: float


class Voided(_Event, frozen=True):
    """The newest step in flight failed."""


class Reset(_Event, frozen=True):
    """The worker lost its KV."""

    now: float
    epoch: int


class Flushed(_Event, frozen=True):
    """The prefix cache was emptied."""


Event = Began | Submitted | Named | Aborted | Launched | Settled | Measured | Voided | Reset | Flushed

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Event)


def read_events(data: bytes) -> list[Event]:
    """The events of a journal.

    Raises:
        ValueError: the bytes are none, or are cut off.
    """
    events, place = list[Event](), 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "little")
        frame = data[place + 4 : place + 4 + size]
        if len(frame) < size:
            raise ValueError(f"the journal is cut off at byte {place} of {len(data)}")
        try:
            events.append(_decoder.decode(frame))
        except msgspec.DecodeError as error:
            raise ValueError(f"not a journal, at byte {place}: {error}") from error
        place += 4 + size
    return events


def fingerprint(plan: StepPlan) -> bytes:
    """Eight bytes of everything that a plan says, but for what tokens and how they are sampled."""
    new = [(one.row, one.num_prompt_tokens, len(one.token_ids), one.num_computed, one.block_ids) for one in plan.new]
    drafts = [(row, len(token_ids)) for row, token_ids in plan.drafts]
    said = (
        plan.step, plan.epoch, plan.freed_rows, new, plan.append_blocks, plan.rows, plan.num_tokens, plan.copies,
        plan.swap_out, plan.swap_in, drafts,
    )  # fmt: skip
    return hashlib.blake2b(_encoder.encode(said), digest_size=8).digest()


class Journal:
    """What happens to one scheduler. `drain` it now and then.

    Args:
        limits: of the replica.
        target_gap_s: of its step budget; 0 = it has none.
        epoch: of its worker.
        max_bytes: kept in all; what comes after is dropped.
    """

    def __init__(
        self, limits: SchedulerLimits, target_gap_s: float = 0.0, *, epoch: int = 1, max_bytes: int = 1 << 30
    ) -> None:
        self._frames: list[bytes] = []
        self._left = max_bytes
        self._limits = limits
        self._sequences: dict[Hashable, int] = {}  # by handle, of the live ones
        self._num_named: dict[int, int] = {}
        self._tenants: dict[str, int] = {}
        self._namespaces: dict[bytes, int] = {}
        self._names: dict[bytes, int] = {}
        self._write(Began(VERSION, epoch, limits, target_gap_s))

    @property
    def full(self) -> bool:
        """Whether it has reached its size and keeps nothing more."""
        return self._left <= 0

    def drain(self) -> bytes:
        """What happened since the last time."""
        frames, self._frames = self._frames, []
        return b"".join(frames)

    def submitted(self, sequence: SequenceState, now: float) -> None:
        """A request was taken; the sequence is its first sample."""
        request = sequence.request
        handles = enumerate(request.handles)
        self._sequences.update((handle, sequence.order + number) for number, handle in handles)
        event = Submitted(
            now,
            len(request.prompt_ids),
            len(request.resume_ids),
            request.max_output_tokens,
            request.min_output_tokens,
            request.prompt_logprobs,
            request.prompt_logprobs_from,
            sequence.chain is not None,
            request.constraint is not None,
            request.retain_prefix_s,
            request.priority,
            self._tenants.setdefault(request.tenant, len(self._tenants)),
            request.weight,
            self._namespaces.setdefault(request.cache_key, len(self._namespaces)),
            len(request.siblings),
        )
        self._write(event)
        self.named(sequence)

    def named(self, sequence: SequenceState) -> None:
        """More blocks of a sequence may have got names."""
        chain, begin = sequence.chain, self._num_named.get(sequence.order, 0)
        if chain is None or len(chain) <= begin:
            return
        numbers = self._names
        names = [numbers.setdefault(name, len(numbers)) for name in chain.names[begin:]]
        self._num_named[sequence.order] = len(chain)
        self._write(Named(sequence.order, begin, names))

    def aborted(self, sequence: SequenceState, now: float) -> None:
        """A sequence is ended from outside."""
        self._write(Aborted(now, sequence.order))
        self._forget(sequence.request.handle)

    def launched(self, plan: Plan) -> None:
        """A plan is launched."""
        attempts = plan.attempts or ([] if plan.proposals is None else [plan.proposals])
        drafts = [proposals.chosen for proposals in attempts]
        while drafts and not drafts[-1]:  # as if they had not been asked for, which a replay cannot know
            drafts.pop()
        limits = None if plan.limits == self._limits else plan.limits
        self._write(Launched(plan.now, fingerprint(plan.wire()), drafts, limits))

    def settled(self, result: StepResult, committed: Committed, now: float) -> None:
        """The oldest step gave this."""
        stopped = [
            (self._sequences[one.handle], one.output_tokens) for one in committed.ended if one.stop_token_id >= 0
        ]
        scored = [(one.row, one.first_position, len(one.positions)) for one in result.prompt_logprobs]
        failed = [failure.row for failure in result.failures]
        self._write(Settled(now, result.rows, stopped, failed, scored))
        for one in committed.ended:
            self._forget(one.handle)

    def measured(self, worker_s: float, elapsed_s: float) -> None:
        """The step that was settled last took so long."""
        self._write(Measured(worker_s, elapsed_s))

    def voided(self) -> None:
        """The newest step failed."""
        self._write(Voided())

    def reset(self, epoch: int, now: float) -> None:
        """The worker lost its KV."""
        self._write(Reset(now, epoch))

    def flushed(self) -> None:
        """The prefix cache was emptied."""
        self._write(Flushed())

    def _forget(self, handle: Hashable) -> None:
        self._num_named.pop(self._sequences.pop(handle), None)

    def _write(self, event: Event) -> None:
        if self._left > 0:
            frame = _encoder.encode(event)
            self._left -= 4 + len(frame)
            self._frames += (len(frame).to_bytes(4, "little"), frame)
