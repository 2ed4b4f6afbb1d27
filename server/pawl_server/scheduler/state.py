"""All that the scheduler knows of one replica: queues, running sequences, rows, blocks.

Events between steps (`submit`, `abort`, `reset_worker`, `flush_prefix_cache`) are here; steps are written by
`committer.launch` and `committer.commit` alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from pawl_server.kv.block_hash import CacheRoot, HashChain, root_hash
from pawl_server.kv.block_pool import BlockPool
from pawl_server.kv.host_tier import HostTier
from pawl_server.scheduler.admission import Refusal, SchedulerLimits, refuse, token_limit
from pawl_server.scheduler.decisions import DecisionRing
from pawl_server.scheduler.explain import SequenceView, count_reasons, describe
from pawl_server.scheduler.fairness import Prices, TenantAccounts
from pawl_server.scheduler.ledger import LedgerEntry
from pawl_server.scheduler.output_lengths import OutputLengths
from pawl_server.scheduler.queues import WaitingQueue
from pawl_server.scheduler.sequence import Ended, EndReason, SequenceRequest, SequenceState, Status
from pawl_server.scheduler.slots import SlotTable

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
        self.pool = BlockPool(
            limits.num_blocks,
            retained_share=limits.retained_share,
            max_events=limits.max_cache_events,
            host=None if limits.restore_cost is None else HostTier(limits.num_host_blocks, limits.restore_cost),
        )
        self.slots = SlotTable(limits.max_running, limits.block_size)
        self.accounts = TenantAccounts(Prices())
        self.decisions = DecisionRing()
        self.lengths = OutputLengths(limits.output_quantile)
        self.queue = WaitingQueue(self.accounts, limits.ageing_s)
        self.ledger: deque[LedgerEntry] = deque()  # launched steps, oldest first
        self.live: dict[Hashable, SequenceState] = {}
        self.running: dict[int, SequenceState] = {}  # by order of arrival, in the order of admission
        self.free_rows = list(range(limits.max_running - 1, -1, -1))
        self.rows_to_free: list[int] = []  # rows whose sequence is gone, not yet told to the worker
        self._next_order = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return len(self.queue)

    def submit(self, request: SequenceRequest, now: float) -> Refusal | None:
        """Take a sequence, or say why not."""
        if request.handle in self.live:
            return Refusal("already_exists", "REQUEST_ID_IN_USE", "", "the handle is in use", {})
        refusal = refuse(request, self.limits, self.num_waiting)
        if refusal is not None:
            return refusal
        chain = None
        if self.limits.prefix_cache and not request.bypass_prefix_cache:
            chain = HashChain(root_hash(self.root, request.cache_key), self.limits.block_size, request.tenant)
        sequence = SequenceState(
            request,
            self.slots,
            order=self._next_order,
            tenant=self.accounts.enter(request.tenant, request.weight),
            limit=token_limit(request, self.limits),
            chain=chain,
            now=now,
        )
        self._next_order += 1
        if chain is not None:
            chain.extend(sequence.tokens, sequence.num_tokens // self.limits.block_size)
        self.live[request.handle] = sequence
        self.queue.push(sequence, now)
        return None

    def abort(self, handle: Hashable, detail: str, now: float) -> Ended | None:
        """End a sequence at any point; None when it is not live. What is in flight is dropped at commit."""
        sequence = self.live.get(handle)
        if sequence is None:
            return None
        ended = sequence.ended(EndReason.ABORTED, now, detail=detail)
        self.remove(sequence)
        return ended

    def remove(self, sequence: SequenceState) -> None:
        """Take a sequence out of every table and give its blocks back.

        A launched step may still write them: steps run in order, so whoever gets the blocks writes after it.
        """
        if sequence.status is Status.WAITING:
            self.queue.take(sequence)
        else:
            if sequence.request.retain_prefix_s:
                self.pool.retain(sequence.blocks, self.pool.now + sequence.request.retain_prefix_s)
            self.pool.release(sequence.blocks)
            self.rows_to_free.append(sequence.row)
            del self.running[sequence.order]
            sequence.leave_row()
        if sequence.charged and sequence.num_output:
            self.lengths.observe(sequence.num_output)
        sequence.status = Status.ENDED
        del self.live[sequence.request.handle]
        self.accounts.leave(sequence.tenant)

    def requeue(self, sequence: SequenceState, now: float, *, owed: bool = True) -> None:
        """Put a sequence whose blocks are given back by the caller in front of its class.

        Tokens that launched steps sample for it are still `owed` to it, unless they are not right.
        """
        del self.running[sequence.order]
        for entry in self.ledger if owed else ():
            if entry.holds(sequence.row, self.slots):
                entry.stale[sequence.row] = sequence
                sequence.num_stale += 1
        sequence.lose_kv(now)
        if sequence.chain is not None:
            sequence.chain.extend(sequence.tokens, sequence.num_tokens // self.limits.block_size)
        self.queue.push(sequence, now)

    def start_again(self, sequence: SequenceState, now: float) -> None:
        """Queue a running sequence whose KV is not right; what is in flight of it is dropped."""
        self.pool.release(sequence.blocks)
        self.rows_to_free.append(sequence.row)
        self.requeue(sequence, now, owed=False)

    def reset_worker(self, epoch: int, now: float) -> None:
        """The worker lost its KV: every running sequence starts again, in its old order.

        Nothing may be in flight: void the steps first.
        """
        self.epoch = epoch
        self.step = 0
        for sequence in list(self.running.values()):
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
        return bool(self.running) or len(self.queue) > 0

    def counts(self) -> Counts:
        """A copy of the totals."""
        return Counts(
            step=self.step,
            running=len(self.running),
            waiting=self.num_waiting,
            waiting_by_reason=count_reasons(self),
            waiting_tokens=self.queue.num_tokens,
            free_blocks=self.pool.num_available - self.pool.num_cached,
            cached_blocks=self.pool.num_cached,
            used_blocks=self.pool.num_used,
        )

    def describe(self, now: float) -> list[SequenceView]:
        """Every live sequence, oldest first, with the reason why it waits."""
        return describe(self, now)
