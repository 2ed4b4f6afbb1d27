"""Drawn schedules of scheduler and worker together, with all that can happen to a request, against each of them alone.

What is drawn: chunks, pools that preempt, cached prefixes, a second tier in host memory, samples of one prompt, drafts,
masks, up to three steps in flight, threads, classes, aborts, rows that fail, resets of the worker, resumed outputs.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random

import numpy as np
import torch

from pawl_server.kv.block_hash import CacheRoot
from pawl_server.kv.host_tier import RestoreCost
from pawl_server.scheduler.admission import SchedulerLimits, refuse
from pawl_server.scheduler.budget import StepLoad
from pawl_server.scheduler.committer import Committed, commit, launch, void
from pawl_server.scheduler.endings import EndReason
from pawl_server.scheduler.guess import NOTHING, Guess
from pawl_server.scheduler.invariants import check_invariants
from pawl_server.scheduler.plan import Plan
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest, SequenceState
from pawl_server.scheduler.speculation import Speculation
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.pending import PendingStep
from pawl_workers.plan import StepPlan
from pawl_workers.row_masks import RowMasks
from pawl_workers.worker import Worker
from tests.fakes.drawn_requests import samples_of
from tests.fakes.told import Told, mask_after

__all__ = ["REACHED", "ServedSchedule"]

REACHED = (
    "preempted", "hits", "restored", "forks", "copies", "drafts", "accepted", "rejected", "masked", "overlap",
    "aborted", "failed", "resets", "resumed",
)  # fmt: skip
"""What a schedule counts."""


class _Prophet:
    """Drafts of what comes, often with a wrong token, sometimes nothing."""

    def __init__(self, expected: Sequence[int], num_prompt: int, vocab_size: int, draw: Random) -> None:
        self._expected, self._num_prompt, self._vocab_size, self._draw = expected, num_prompt, vocab_size, draw
        self._rate = draw.choice([0.2, 0.4, 1.0])

    def propose(self, tokens: array[int], most: int) -> Guess:
        """At most `most` tokens."""
        if self._draw.random() > self._rate:
            return NOTHING
        done = len(tokens) - self._num_prompt
        found = list(self._expected[done : done + self._draw.randint(0, most)])
        if found and self._draw.random() < 0.5:
            place = self._draw.randrange(len(found))
            found[place] = (found[place] + self._draw.randrange(1, self._vocab_size)) % self._vocab_size
        return Guess(found)


class ServedSchedule:
    """Serves requests on a worker by the scheduler.

    Args:
        worker: is reset.
        draw: decides.
        epoch: of the worker, higher than any before.
        depth: steps in flight at most; with drafts one.

    Attributes:
        limits: drawn.
        alone: what each sample gives alone, by handle, to be set before `run`: drafts are made of it.
        told: what was heard of each.
        reached: how often each of `REACHED` occurred.
    """

    def __init__(self, worker: Worker, draw: Random, epoch: int, depth: int) -> None:
        self.limits = self._draw_limits(worker, draw)
        self._worker, self._draw, self._depth = worker, draw, depth
        self._state = SchedulerState(self.limits, CacheRoot("m", "float32", self.limits.block_size), epoch=epoch)
        self.alone: Mapping[Hashable, Told] = {}
        if self.limits.max_drafts:
            self._state.speculation = drafter = Speculation(self.limits.max_drafts, self._prophet)
            for num_tokens in range(1, 9):  # as if tokens cost nothing, so that all that is found is computed
                drafter.observe(StepLoad(num_tokens, num_tokens, num_tokens), 1.0)
            self._depth = 1
        self._in_flight: deque[tuple[Plan, PendingStep]] = deque()
        self._requests: dict[Hashable, SequenceRequest] = {}
        self.told: dict[Hashable, Told] = {}
        self.reached: Counter[str] = Counter()
        self.epoch = epoch
        worker.reset(epoch)

    @staticmethod
    def _draw_limits(worker: Worker, draw: Random) -> SchedulerLimits:
        facts = worker.facts
        per_sequence = -(-facts.max_context // facts.block_size)
        num_blocks = draw.choice([facts.num_blocks, 2 * per_sequence, per_sequence + 2, per_sequence, per_sequence])
        swaps = facts.num_host_blocks > 0 and draw.random() < 0.6
        return SchedulerLimits(
            num_blocks=min(num_blocks, facts.num_blocks),
            block_size=facts.block_size,
            max_running=draw.choice([2, facts.max_running, facts.max_running]),
            max_batch_tokens=draw.choice([facts.max_running, 40, facts.max_batch_tokens]),
            max_context=facts.max_context,
            max_partial_prefills=draw.choice([1, 4]),
            max_prefill_chunk=draw.choice([1, 7, 31, 32, 33, 300] if facts.max_context < 300 else [64, 250, 700]),
            prefix_cache=draw.random() < 0.8,
            num_host_blocks=draw.randint(1, facts.num_host_blocks) if swaps else 0,
            restore_cost=RestoreCost(0.0, 0.0, 1.0, facts.block_size) if swaps else None,
            watermark=draw.choice([0.0, 0.1]),
            max_bypass=draw.choice([0, 8]),
            max_preemptions=draw.choice([1, 4]),
            preempt_below=draw.choice([0, 1]),
            output_quantile=draw.choice([0.0, 0.0, 0.5]),
            max_drafts=draw.choice([0, 0, 3, 6]),
        )

    def _prophet(self, sequence: SequenceState) -> _Prophet:
        request = sequence.request
        expected = self.alone[request.handle].tokens
        return _Prophet(expected, len(request.prompt_ids), self._worker.facts.vocab_size, self._draw)

    def accepts(self, request: SequenceRequest) -> bool:
        """Whether it fits into the drawn pool."""
        return refuse(request, self.limits, 0) is None

    @property
    def end(self) -> int:
        """Most tokens of prompt and output."""
        return min(self.limits.max_context, self.limits.pool_tokens + 1)

    def run(self, requests: Sequence[SequenceRequest], *, resets: bool) -> None:
        """Serve them all."""
        waiting, now = list(requests), 0.0
        rate, aborts = self._draw.choice([0.05, 0.4, 1.0]), self._draw.choice([0.0, 0.02])
        threads = self._draw.choice([[1], [2], [1, 2]])
        lost = 0.01 if resets and self._draw.random() < 0.3 else 0.0
        while waiting or self._in_flight or self._state.has_work():
            now += 1.0
            assert now < 20_000, "no end in sight"
            while waiting and (self._draw.random() < rate or not (self._in_flight or self._state.has_work())):
                self._submit(waiting.pop(0), now)
            if self._requests and self._draw.random() < aborts:
                self._abort(self._draw.choice(list(self._requests)), now)
            if self._draw.random() < lost:
                self._lose_worker(now)
            if self._draw.random() < 0.002:
                self._state.flush_prefix_cache()
            torch.set_num_threads(self._draw.choice(threads))
            self._tick(now)
        check_invariants(self._state)
        counts = self._state.counts()
        assert counts.free_blocks + counts.cached_blocks == self.limits.num_blocks
        assert (counts.running, counts.waiting, counts.used_blocks) == (0, 0, 0)
        assert not self._state.live

    def _submit(self, request: SequenceRequest, now: float) -> None:
        if request.max_output_tokens > 1 and not request.siblings and request.prompt_logprobs < 0:
            begun = self.alone[request.handle].tokens[: self._draw.choice([0, 0, 0, 0, 0, 1, 5])]
            if len(begun) < len(self.alone[request.handle].tokens):
                request = replace(request, resume_ids=begun)
                self.reached["resumed"] += bool(begun)
        if (refused := self._state.submit(request, now)) is not None:
            raise AssertionError(refused.message)
        for one in samples_of(request):
            self._requests[one.handle] = one
            begun = list(one.resume_ids)
            self.told[one.handle] = Told(begun, list(self.alone[one.handle].logprobs[: len(begun)]))

    def _abort(self, handle: Hashable, now: float) -> None:
        if (ended := self._state.abort(handle, "cancelled", now)) is not None:
            assert self.told[handle].reason is None
            self.told[handle].reason = ended.reason
            self.reached["aborted"] += 1

    def _lose_worker(self, now: float) -> None:
        self.reached["resets"] += 1
        while self._in_flight:
            void(self._state, self._in_flight.pop()[0])
        self.epoch += 1
        self._state.reset_worker(self.epoch, now)
        self._worker.reset(self.epoch)

    def _tick(self, now: float) -> None:
        plan = plan_step(self._state, self.limits, now) if len(self._in_flight) < self._depth else None
        if plan is not None:
            wire = plan.wire()
            launch(self._state, plan)
            self._note(plan, wire)
            members = [one.request for one in self._state.ledger[-1].members(self._state.slots)]
            masked = any(one.constraint is not None for one in members)
            drafts = {} if plan.proposals is None else plan.proposals.drafts
            masks = partial(self._masks, wire.rows, members, drafts, now) if masked else None
            self._in_flight.append((plan, self._worker.launch(wire, masks)))
        full = plan is None or len(self._in_flight) >= self._depth
        if self._in_flight and (full or self._draw.random() < 0.2):
            self._commit_oldest(now)

    def _note(self, plan: Plan, wire: StepPlan) -> None:
        self.reached["overlap"] += bool(self._in_flight)
        self.reached["hits"] += sum(bool(one.hits) for one in plan.admissions)
        self.reached["forks"] += len(plan.forks)
        self.reached["copies"] += len(wire.copies)
        self.reached["restored"] += len(wire.swap_in)
        self.reached["drafts"] += plan.num_drafts

    def _masks(
        self, rows: list[int], members: Sequence[SequenceRequest], drafts: Mapping[int, Sequence[int]], now: float
    ) -> RowMasks:
        """Asked for when the steps before are settled: they are committed first."""
        while self._in_flight:
            assert self._in_flight[0][1].future.done()
            self._commit_oldest(now)
        num_words = -(-self._worker.facts.vocab_size // 32)
        named, words = list[int](), [np.zeros((0, num_words), dtype=np.uint32)]
        for row, member in zip(rows, members, strict=True):
            if member.constraint is None:
                continue
            drafted, output = drafts.get(row, ()), self.told[member.handle].tokens
            for place in range(1 + len(drafted)):
                named.append(row)
                words.append(mask_after([*output, *drafted[:place]], num_words)[None, :])
        self.reached["masked"] += len(named)
        return RowMasks(named, np.concatenate(words))

    def _commit_oldest(self, now: float) -> None:
        plan, step = self._in_flight.popleft()
        committed = commit(self._state, plan, step.result(), now)
        if self._state.speculation is not None:
            self._state.speculation.observe(plan.load, 1.0)
        self.reached["preempted"] += committed.num_preempted
        self.reached["accepted"] += committed.num_accepted
        self.reached["rejected"] += plan.num_drafts - committed.num_accepted
        if int(now) % 16 == 0:
            check_invariants(self._state)
        self._hear(committed)

    def _hear(self, committed: Committed) -> None:
        logprobs = committed.logprobs or [None] * len(committed.handles)
        told = zip(committed.handles, committed.indices, committed.token_ids, logprobs, strict=True)
        for handle, index, token_id, entry in told:
            one = self.told[handle]
            assert one.reason is None, "a token after the end"
            assert index == len(one.tokens), "a gap or a repeat"
            one.tokens.append(token_id)
            one.logprobs.append(entry)
        for handle, scored in committed.prompt_logprobs:
            assert scored.first_position == 1 + len(self.told[handle].prompt)
            self.told[handle].prompt += scored.positions
        for ended in committed.ended:
            assert self.told[ended.handle].reason is None
            self.told[ended.handle].reason = ended.reason
            self.reached["failed"] += ended.reason is EndReason.FAILED
