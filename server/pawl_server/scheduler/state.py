"""All that the scheduler knows of one replica: queues, running sequences, rows, blocks.

Events between steps (`submit`, `abort`, `reset_worker`, `flush_prefix_cache`) are here; steps are written by
`committer.launch` and `committer.commit` alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from pawl_server.kv.block_hash import CacheRoot, HashChain, root_hash
from pawl_server.kv.block_pool import BlockPool
from pawl_server.scheduler.admission import Refusal, SchedulerLimits, refuse, token_limit
from pawl_server.scheduler.explain import SequenceView, count_reasons, describe
from pawl_server.scheduler.sequence import Ended, EndReason, SequenceRequest, SequenceState, Status

__all__ = ["Counts", "SchedulerState", "SequenceView"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """A copy of the totals, for metrics and load reports."""

    step: int
    running: int
    waiting: int
    waiting_by_reason: dict[str, int]
    waiting_tokens: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int


class SchedulerState:
    """Sequences and blocks of one replica."""

    def __init__(self, limits: SchedulerLimits, root: CacheRoot, *, epoch: int = 1) -> None:
        self.limits = limits
        self.root = root
        self.epoch = epoch
        self.step = 0  # last launched
        self.pool = BlockPool(limits.num_blocks)
        self.live: dict[Hashable, SequenceState] = {}
        self.running: dict[int, SequenceState] = {}  # by order of arrival number, in admission order
        self.waiting: dict[int, deque[SequenceState]] = {}  # by priority; entries not WAITING are tombstones
        self.num_waiting = 0
        self.free_rows = list(range(limits.max_running - 1, -1, -1))
        self.rows_to_free: list[int] = []  # rows whose sequence is gone, not yet told to the worker
        self._next_order = 0

    def submit(self, request: SequenceRequest, now: float) -> Refusal | None:
        """Take a sequence, or say why not."""
        if request.handle in self.live:
            return Refusal("already_exists", "REQUEST_ID_IN_USE", "", "the handle is in use", {})
        refusal = refuse(request, self.limits, self.num_waiting)
        if refusal is not None:
            return refusal
        chain = None
        if self.limits.prefix_cache and not request.bypass_prefix_cache:
            chain = HashChain(root_hash(self.root, request.cache_key), self.limits.block_size)
        sequence = SequenceState(
            request, order=self._next_order, limit=token_limit(request, self.limits), chain=chain, now=now
        )
        self._next_order += 1
        if chain is not None:
            chain.extend(sequence.tokens, len(sequence.tokens) // self.limits.block_size)
        self.live[request.handle] = sequence
        self.waiting.setdefault(request.priority, deque()).append(sequence)
        self.num_waiting += 1
        return None

    def abort(self, handle: Hashable, detail: str, now: float) -> Ended | None:
        """End a sequence at any point; None when it is not live. What is in flight is dropped at commit."""
        sequence = self.live.get(handle)
        if sequence is None:
            return None
        ended = sequence.ended(EndReason.ABORTED, now, detail=detail)
        if sequence.ledger:
            sequence.discarded = True
            del self.live[handle]
        else:
            self.remove(sequence)
        return ended

    def remove(self, sequence: SequenceState) -> None:
        """Take a sequence that is not in flight out of every table and give its blocks back."""
        if sequence.status is Status.WAITING:
            self.num_waiting -= 1
        else:
            self.pool.release(sequence.blocks)
            self.rows_to_free.append(sequence.row)
            del self.running[sequence.order]
        sequence.blocks = []
        sequence.status = Status.ENDED
        self.live.pop(sequence.request.handle, None)

    def requeue(self, sequence: SequenceState, now: float) -> None:
        """Put a sequence that lost its KV in front of its class."""
        del self.running[sequence.order]
        sequence.lose_kv(now)
        if sequence.chain is not None:
            sequence.chain.extend(sequence.tokens, len(sequence.tokens) // self.limits.block_size)
        self.waiting.setdefault(sequence.request.priority, deque()).appendleft(sequence)
        self.num_waiting += 1

    def reset_worker(self, epoch: int, now: float) -> None:
        """The worker lost its KV: every running sequence starts again, in its old order.

        Nothing may be in flight: void the step first.
        """
        self.epoch = epoch
        self.step = 0
        for sequence in reversed(list(self.running.values())):
            self.pool.release(sequence.blocks)
            self.requeue(sequence, now)
        self.pool.flush()
        self.free_rows = list(range(self.limits.max_running - 1, -1, -1))
        self.rows_to_free = []

    def flush_prefix_cache(self) -> int:
        """Forget cached prefixes that nobody uses; returns how many blocks that were."""
        return self.pool.flush()

    def has_work(self) -> bool:
        """Whether a step could be planned or is in flight."""
        return bool(self.running) or self.num_waiting > 0

    def waiting_in_order(self) -> Iterator[SequenceState]:
        """Waiting sequences, highest class first, each class in its order."""
        for priority in sorted(self.waiting, reverse=True):
            for sequence in self.waiting[priority]:
                if sequence.status is Status.WAITING:
                    yield sequence

    def counts(self) -> Counts:
        """A copy of the totals."""
        return Counts(
            step=self.step,
            running=len(self.running),
            waiting=self.num_waiting,
            waiting_by_reason=count_reasons(self),
            waiting_tokens=sum(len(s.tokens) for s in self.waiting_in_order()),
            free_blocks=self.pool.num_available - self.pool.num_cached,
            cached_blocks=self.pool.num_cached,
            used_blocks=self.pool.num_used,
        )

    def describe(self, now: float) -> list[SequenceView]:
        """Every live sequence, oldest first, with the reason why it waits."""
        return describe(self, now)
