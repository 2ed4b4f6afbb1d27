"""A scheduler over a shadow KV cache, driven step by step: what the property tests of the scheduler stand on."""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque
from dataclasses import replace
from typing import cast

import msgspec
import numpy as np

from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.budget import StepLoad
from pawl_server.scheduler.committer import Committed, commit, launch, void
from pawl_server.scheduler.endings import Ended
from pawl_server.scheduler.guess import Guess
from pawl_server.scheduler.invariants import check_invariants
from pawl_server.scheduler.plan import Plan
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest, SequenceState, Sibling
from pawl_server.scheduler.speculation import Speculation
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import PromptLogprobs, SamplingSpec, StepResult
from tests.fakes.shadow_worker import ShadowWorker, isolated_output

__all__ = ["Bench", "Prophet", "limits", "make_limits", "random_request"]

_NOBODY = -1


class Prophet:
    """Drafts of one sequence: what it will be, often with a wrong token, sometimes nothing."""

    def __init__(self, sequence: SequenceState) -> None:
        self._namespace = sequence.request.sampling.seed
        self._draw = random.Random(sequence.order)

    def propose(self, tokens: array[int], most: int) -> Guess:
        """At most `most` tokens."""
        drafts = isolated_output(tokens, self._namespace, self._draw.randint(0, most))
        if drafts and self._draw.random() < 0.5:
            place = self._draw.randrange(len(drafts))
            drafts[place] = (drafts[place] + 1) % 32
        return Guess(drafts)


class Bench:
    """A scheduler, a shadow worker, and what each sequence has given so far. `depth` steps may be in flight."""

    def __init__(self, limits: SchedulerLimits, depth: int = 1) -> None:
        self.limits = limits
        self.depth = depth
        self.in_flight: deque[tuple[Plan, StepResult]] = deque()
        self.owners: deque[dict[int, int]] = deque()  # handle by row, of each step in flight
        self.state = SchedulerState(limits, CacheRoot("model", "float32", limits.block_size))
        if limits.max_drafts:
            self.state.speculation = drafter = Speculation(limits.max_drafts, Prophet)
            for num_tokens in range(1, 9):  # as if tokens cost nothing, so that all that is found is computed
                drafter.observe(StepLoad(num_tokens, num_tokens, num_tokens), 1.0)
        self.worker = ShadowWorker(limits.block_size)
        self.num_drafts = self.num_accepted = self.num_mixed = 0
        self.num_late = self.num_requeued = self.num_shared_pending = 0
        self.requests: dict[int, SequenceRequest] = {}
        self.output: dict[int, list[int]] = {}
        self.scored: dict[int, int] = {}
        self.ended: dict[int, Ended] = {}
        self.now = 0.0
        self.log: list[object] = []

    def request(
        self,
        prompt: list[int],
        max_output: int,
        tenant: int = 0,
        *,
        eos: bool = False,
        bypass: bool = False,
        priority: int = 0,
        prompt_logprobs: int = -1,
        num_samples: int = 1,
    ) -> SequenceRequest:
        handle = len(self.requests)
        return SequenceRequest(
            handle=handle,
            request_id=f"r{handle}",
            prompt_ids=prompt,
            sampling=SamplingSpec(seed=tenant),
            max_output_tokens=max_output,
            cache_key=bytes([tenant]),
            eos_token_ids=frozenset({5}) if eos else frozenset(),
            bypass_prefix_cache=bypass,
            priority=priority,
            prompt_logprobs=prompt_logprobs,
            siblings=[Sibling(handle + index, tenant + 256 * index) for index in range(1, num_samples)],
        )

    def submit(self, request: SequenceRequest) -> bool:
        refused = self.state.submit(request, self.now) is not None
        if not refused:
            seeds = [request.sampling.seed, *(sibling.seed for sibling in request.siblings)]
            for handle, seed in zip(cast("tuple[int, ...]", request.handles), seeds, strict=True):
                sampling = msgspec.structs.replace(request.sampling, seed=seed)
                scored = request.prompt_logprobs if handle == request.handle else -1
                self.requests[handle] = replace(request, handle=handle, sampling=sampling, prompt_logprobs=scored)
                self.output[handle] = []
        return not refused

    def step(self) -> bool:
        """One tick of the loop; False when there was nothing to do."""
        self.now += 1.0
        launched = self.launch()
        if not launched and not self.in_flight:
            return False
        if not launched or len(self.in_flight) >= self.depth:
            self.commit()
        return True

    def launch(self) -> bool:
        """Plan and launch the next step; the worker computes it at once, its result waits."""
        plan = plan_step(self.state, self.limits, self.now)
        if plan is None:
            return False
        assert 1 <= plan.num_tokens <= self.limits.max_batch_tokens
        self.num_drafts += plan.num_drafts
        self.num_mixed += plan.num_drafts > 0 and plan.kind == "mixed"
        if plan.victims:
            self.check_victims(plan)
        self.check_groups(plan)
        self.check_nobody_is_idle(plan)
        wire = plan.wire()
        launch(self.state, plan)
        check_invariants(self.state)
        hits = [block for admission in plan.admissions for block in admission.hits]
        self.num_shared_pending += sum(map(self.state.pool.is_pending, hits))
        self.log.append(wire)
        self.in_flight.append((plan, self.worker.execute(wire)))
        members = [cast("int", one.request.handle) for one in self.state.ledger[-1].members(self.state.slots)]
        self.owners.append(dict(zip(wire.rows, members, strict=True)))
        return True

    def check_groups(self, plan: Plan) -> None:
        """All samples of a request start together, or none does."""
        for admission in plan.admissions:
            assert len(admission.kept_rows) == len(admission.kept_blocks) == len(admission.sequence.followers)
        forked = {fork.leader.order: fork.leader for fork in plan.forks}
        for leader in forked.values():
            started = [fork.sequence for fork in plan.forks if fork.leader is leader]
            assert started == list(leader.followers)

    def check_nobody_is_idle(self, plan: Plan) -> None:
        """Whoever decodes gets a token in every step; and who waits beside budget and a row does so for a reason."""
        if plan.victims:
            return
        slots, granted = self.state.slots, np.zeros_like(self.state.slots.planned)
        granted[plan.rows] = plan.grants
        left = np.where(slots.expected >= slots.stop_at, 0, slots.expected - slots.planned)
        assert (granted[left == 1] >= 1).all(), "one that decodes was passed over"
        waiting = [sequence for sequence in self.state.queue.in_order() if not sequence.num_stale]
        started = [admission.sequence for admission in plan.admissions]
        partial = int(np.count_nonzero((left > 1) & (granted < left)))
        partial += sum(one.num_computed + one.num_tokens < one.sequence.num_tokens for one in plan.admissions)
        if plan.budget > 0 and plan.free_rows and len(waiting) > len(started):
            assert plan.bypassed or partial >= self.limits.max_partial_prefills, "somebody could have started"

    def check_victims(self, plan: Plan) -> None:
        """The oldest of the top class is none of them, and for priority nobody who is not low enough."""
        started = [admission.sequence for admission in plan.admissions]
        best = min([*self.state.running.values(), *started], key=lambda s: (-s.level, s.order))
        assert best not in [victim.sequence for victim in plan.victims], "the oldest of the top class lost its KV"
        gave_way = [victim.sequence for victim in plan.victims if victim.reason == "priority"]
        if gave_way:
            (beneficiary,) = started
            highest = beneficiary.request.priority - self.limits.preempt_below
            assert all(victim.level <= highest for victim in gave_way), "one that is not low enough gave way"
            assert all(victim.preemptions + 1 < self.limits.max_preemptions for victim in gave_way)

    def commit(self) -> Committed:
        """Settle the oldest step: every token sampled for a sequence that lives is delivered."""
        plan, result = self.in_flight.popleft()
        owners = self.owners.popleft()
        ended = set(self.ended)
        late = {sequence.request.handle for sequence in self.state.ledger[0].stale.values()}
        committed = commit(self.state, plan, result, self.now)
        if self.state.speculation is not None:
            self.state.speculation.observe(plan.load, 1.0)
        dropped = cast("set[int]", set(committed.requeued))
        live = Counter(owners[row] for row in result.rows if owners[row] not in ended | dropped | {_NOBODY})
        given = Counter(cast("list[int]", committed.handles))
        stopped = {cast("int", one.handle) for one in committed.ended}  # at one of several tokens: the rest is cut
        assert live.keys() == given.keys()
        assert all(
            given[handle] == count or (handle in stopped and given[handle] < count) for handle, count in live.items()
        )
        self.num_accepted += committed.num_accepted
        self.num_late += sum(handle in late for handle in committed.handles)
        self.num_requeued += len(committed.requeued)
        for later in self.owners:  # what they rely on failed, so that nothing more comes of these steps for them
            for row in [row for row, handle in later.items() if handle in dropped]:
                later[row] = _NOBODY
        self.apply(committed)
        return committed

    def lose_worker(self) -> None:
        """Every step in flight fails, and the worker's KV is gone."""
        while self.in_flight:
            void(self.state, self.in_flight.pop()[0])
        self.owners.clear()
        epoch = self.state.epoch + 1
        self.state.reset_worker(epoch, self.now)
        self.worker.reset(epoch)

    def apply(self, committed: Committed) -> None:
        triples = zip(cast("list[int]", committed.handles), committed.indices, committed.token_ids, strict=True)
        for handle, index, token_id in triples:
            assert handle not in self.ended, "a token after the end"
            assert index == len(self.output[handle]), "a gap or a repeat"
            self.output[handle].append(token_id)
        for handle, scored in cast("list[tuple[int, PromptLogprobs]]", committed.prompt_logprobs):
            assert scored.first_position == self.scored.get(handle, 1)
            self.scored[handle] = scored.first_position + len(scored.positions)
        for ended in committed.ended:
            self.finish(ended)

    def finish(self, ended: Ended) -> None:
        handle = cast("int", ended.handle)
        assert handle not in self.ended, "ended twice"
        assert ended.preemption_count <= self.limits.max_preemptions
        self.ended[handle] = ended

    def run(self, max_steps: int = 5_000) -> None:
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError("no end in sight: livelock")

    def check_output(self, handle: int) -> None:
        request = self.requests[handle]
        expected = isolated_output(request.prompt_ids, request.sampling.seed, len(self.output[handle]))
        assert self.output[handle] == expected


def make_limits(draw: random.Random) -> SchedulerLimits:
    block_size = draw.choice([1, 2, 4])
    max_running = draw.randint(1, 6)
    return SchedulerLimits(
        num_blocks=draw.randint(4, 40),
        block_size=block_size,
        max_running=max_running,
        max_batch_tokens=max_running + draw.randint(0, 20),
        max_context=64,
        max_partial_prefills=draw.randint(1, 3),
        max_prefill_chunk=draw.randint(1, 16),
        prefix_cache=draw.random() < 0.7,
        watermark=draw.choice([0.0, 0.1]),
        max_bypass=draw.randint(0, 3),
        max_preemptions=draw.randint(1, 4),
        output_quantile=draw.choice([0.0, 0.5, 0.9]),
        ageing_s=draw.choice([0.0, 3.0]),
        preempt_below=draw.choice([0, 1]),
        max_drafts=draw.choice([0, 0, 1, 3, 6]),
    )


def random_request(bench: Bench, draw: random.Random) -> SequenceRequest:
    prefix = [7] * draw.randint(0, 12)  # shared beginnings, so that the cache is hit
    prompt = prefix + [draw.randint(0, 31) for _ in range(draw.randint(1, 16))]
    kind = draw.random()
    max_output = 0 if kind < 0.1 else -1 if kind < 0.2 else draw.randint(1, 20)
    scored = 0 if kind < 0.15 else -1
    samples = draw.randint(2, 5) if kind >= 0.1 and draw.random() < 0.3 else 1
    return bench.request(
        prompt, max_output, draw.randint(0, 1), prompt_logprobs=scored, priority=draw.choice([0, 0, 1]),
        eos=draw.random() < 0.5, bypass=draw.random() < 0.1,
        num_samples=samples,
    )  # fmt: skip


def limits(**changes: int | float | bool) -> SchedulerLimits:
    """A small replica, but for what is said."""
    base: dict[str, int | float | bool] = {
        "num_blocks": 8, "block_size": 4, "max_running": 4, "max_batch_tokens": 16, "max_context": 64,
        "max_prefill_chunk": 8, "watermark": 0.0,
    }  # fmt: skip
    return SchedulerLimits(**{**base, **changes})  # type: ignore[arg-type]
