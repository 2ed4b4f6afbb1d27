"""All that the scheduler knows of one replica: queues, running sequences, rows, blocks.

Events between steps (`submit`, `abort`, `reset_worker`, `flush_prefix_cache`) are here; steps are written by
`committer.launch` and `committer.commit` alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, replace

import msgspec

from pawl_server.kv.block_hash import CacheRoot, HashChain, root_hash
from pawl_server.kv.block_pool import BlockPool
from pawl_server.kv.host_tier import HostTier
from pawl_server.scheduler.admission import Refusal, SchedulerLimits, refuse, token_limit
from pawl_server.scheduler.decisions import DecisionRing
from pawl_server.scheduler.endings import Ended, EndReason
from pawl_server.scheduler.explain import SequenceView, count_reasons, describe
from pawl_server.scheduler.fairness import Prices, TenantAccounts
from pawl_server.scheduler.groups import SampleGroup
from pawl_server.scheduler.journal import Journal
from pawl_server.scheduler.ledger import LedgerEntry
from pawl_server.scheduler.output_lengths import OutputLengths
from pawl_server.scheduler.queues import WaitingQueue
from pawl_server.scheduler.sequence import SequenceRequest, SequenceState, Status
from pawl_server.scheduler.slots import SlotTable
from pawl_server.scheduler.speculation import Drafter, Speculation

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
        self.journal: Journal | None = None  # is told of everything that happens
        self.lengths = OutputLengths(limits.output_quantile)
        self.queue = WaitingQueue(self.accounts, limits.ageing_s)
        self.speculation: Drafter | None = Speculation(limits.max_drafts) if limits.max_drafts else None
        self.ledger: deque[LedgerEntry] = deque()  # launched steps, oldest first
        self.live: dict[Hashable, SequenceState] = {}
        self.running: dict[int, SequenceState] = {}  # by order of arrival, in the order of admission
        self.leaders: dict[int, SequenceState] = {}  # of the running ones, those with others parked behind them
        self.num_parked = 0
        self.free_rows = list(range(limits.max_running - 1, -1, -1))
        self.rows_to_free: list[int] = []  # rows whose sequence is gone, not yet told to the worker
        self._next_order = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, those that are parked behind another included."""
        return len(self.queue) + self.num_parked

    def submit(self, request: SequenceRequest, now: float) -> Refusal | None:
        """Take a sequence, or say why not."""
        handles = request.handles
        if len({*handles}) < len(handles) or any(handle in self.live for handle in handles):
            return Refusal("already_exists", "REQUEST_ID_IN_USE", "", "the handle is in use", {})
        refusal = refuse(request, self.limits, self.num_waiting)
        if refusal is not None:
            return refusal
        chain = None
        if self.limits.prefix_cache and not request.bypass_prefix_cache:
            chain = HashChain(root_hash(self.root, request.cache_key), self.limits.block_size, request.tenant)
        sequence = self._enter(request, chain, now)
        if chain is not None:
            chain.extend(sequence.tokens, sequence.num_tokens // self.limits.block_size)
        if request.siblings:
            self._park(sequence, now)
        self.queue.push(sequence, now)
        if self.journal is not None:
            self.journal.submitted(sequence, now)
        return None

    def _enter(self, request: SequenceRequest, chain: HashChain | None, now: float) -> SequenceState:
        sequence = self.live[request.handle] = SequenceState(
            request,
            self.slots,
            order=self._next_order,
            tenant=self.accounts.enter(request.tenant, request.weight),
            limit=token_limit(request, self.limits),
            chain=chain,
            now=now,
        )
        self._next_order += 1
        return sequence

    def _park(self, leader: SequenceState, now: float) -> None:
        """Park the further samples of a request behind its first."""
        request = leader.request
        group = leader.group = SampleGroup(leader, request.handles)
        for sibling in request.siblings:
            sampling = msgspec.structs.replace(request.sampling, seed=sibling.seed)
            alike = replace(
                request, handle=sibling.handle, sampling=sampling, siblings=(), resume_ids=(), prompt_logprobs=-1
            )
            follower = self._enter(alike, None, now)
            follower.group, follower.status = group, Status.PARKED
            group.parked.append(follower)
        self.num_parked += len(group.parked)

    def abort(self, handle: Hashable, detail: str, now: float) -> Ended | None:
        """End a sequence at any point; None when it is not live. What is in flight is dropped at commit.

        The other samples of its request go on.
        """
        sequence = self.live.get(handle)
        if sequence is None:
            return None
        if self.journal is not None:
            self.journal.aborted(sequence, now)
        ended = sequence.ended(EndReason.ABORTED, now, detail=detail)
        self.remove(sequence, now)
        return ended

    def siblings(self, handle: Hashable) -> list[Hashable]:
        """The live samples of the request that a sequence belongs to, this one included; none when it has ended."""
        sequence = self.live.get(handle)
        if sequence is None or sequence.group is None:
            return [] if sequence is None else [handle]
        return [other for other in sequence.group.handles if other in self.live]

    def remove(self, sequence: SequenceState, now: float) -> None:
        """Take a sequence out of every table and give its blocks back. Whoever is parked behind it gets another leader.

        A launched step may still write them: steps run in order, so whoever gets the blocks writes after it.
        """
        if sequence.status is Status.PARKED:
            self._unpark(sequence)
        elif sequence.status is Status.WAITING:
            self.queue.take(sequence)
        else:
            self.give_up_kept(sequence)
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
        if sequence.followers:
            self._succeed(sequence, now)
        self.accounts.leave(sequence.tenant)

    def _unpark(self, sequence: SequenceState) -> None:
        """A parked sequence ends: what was kept for it is free."""
        group = sequence.group
        if group is None:
            return
        place = group.parked.index(sequence)
        del group.parked[place]
        self.num_parked -= 1
        if group.rows:
            self.free_rows.append(group.rows.pop(place))
            self.pool.release([group.blocks.pop(place)])
            if not group.parked:
                del self.leaders[group.leader.order]

    def _succeed(self, leader: SequenceState, now: float) -> None:
        """The first of those parked behind a sequence that ended computes the prompt in its place."""
        group = leader.group
        if group is None:
            return
        heir = group.leader = group.parked.pop(0)
        self.num_parked -= 1
        heir.status = Status.WAITING
        heir.inherit(leader, self.limits.block_size)
        self.queue.push(heir, now)

    def give_up_kept(self, leader: SequenceState) -> None:
        """A running sequence runs no more: what is kept for those parked behind it is free."""
        group = leader.group
        if group is not None and leader.followers:
            self.pool.release(group.blocks)
            self.free_rows += group.rows
            group.forget_kept()
            del self.leaders[leader.order]

    def requeue(self, sequence: SequenceState, now: float, *, owed: bool = True) -> None:
        """Put a sequence in front of its class. The caller gives back its blocks, and what is kept for its followers.

        Tokens that launched steps sample for it are still `owed` to it, unless they are not right.
        """
        del self.running[sequence.order]
        if self.leaders.pop(sequence.order, None) is not None and sequence.group is not None:
            sequence.group.forget_kept()
        for entry in self.ledger if owed else ():
            if entry.holds(sequence.row, self.slots):
                entry.stale[sequence.row] = sequence
                sequence.num_stale += 1
        sequence.lose_kv(now)
        if sequence.chain is not None:
            sequence.chain.extend(sequence.tokens, sequence.num_tokens // self.limits.block_size)
            if self.journal is not None:
                self.journal.named(sequence)
        self.queue.push(sequence, now)

    def start_again(self, sequence: SequenceState, now: float) -> None:
        """Queue a running sequence whose KV is not right; what is in flight of it is dropped."""
        self.give_up_kept(sequence)
        self.pool.release(sequence.blocks)
        self.rows_to_free.append(sequence.row)
        self.requeue(sequence, now, owed=False)

    def reset_worker(self, epoch: int, now: float) -> None:
        """The worker lost its KV: every running sequence starts again, in its old order.

        Nothing may be in flight: void the steps first.
        """
        if self.journal is not None:
            self.journal.reset(epoch, now)
        self.epoch = epoch
        self.step = 0
        for sequence in list(self.running.values()):
            self.give_up_kept(sequence)
            self.pool.release(sequence.blocks)
            self.requeue(sequence, now)
        self.pool.flush()
        self.free_rows = list(range(self.limits.max_running - 1, -1, -1))
        self.rows_to_free = []

    def flush_prefix_cache(self) -> int:
        """Forget cached prefixes that nobody uses; returns how many blocks that were."""
        if self.journal is not None:
            self.journal.flushed()
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
