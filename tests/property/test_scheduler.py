"""The scheduler over a shadow KV cache: whatever the schedule, each sequence gives what it gives alone."""

from __future__ import annotations

import random
from collections import deque
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.committer import Committed, StaleResultError, commit, launch, void
from pawl_server.scheduler.decisions import decode
from pawl_server.scheduler.invariants import check_invariants
from pawl_server.scheduler.planner import Plan, plan_step
from pawl_server.scheduler.sequence import Ended, EndReason, SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import PromptLogprobs, SamplingSpec, StepPlan, StepResult
from tests.fakes.shadow_worker import ShadowWorker, isolated_output

_NOBODY = -1


class Bench:
    """A scheduler, a shadow worker, and what each sequence has given so far. `depth` steps may be in flight."""

    def __init__(self, limits: SchedulerLimits, depth: int = 1) -> None:
        self.limits = limits
        self.depth = depth
        self.in_flight: deque[tuple[Plan, StepResult]] = deque()
        self.owners: deque[dict[int, int]] = deque()  # handle by row, of each step in flight
        self.state = SchedulerState(limits, CacheRoot("model", "float32", limits.block_size))
        self.worker = ShadowWorker(limits.block_size)
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
        )

    def submit(self, request: SequenceRequest) -> bool:
        refused = self.state.submit(request, self.now) is not None
        if not refused:
            self.requests[cast("int", request.handle)] = request
            self.output[cast("int", request.handle)] = []
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
        if plan.victims:
            best = min(self.state.running.values(), key=lambda s: (-s.level, s.order))
            assert best not in [victim.sequence for victim in plan.victims], "the oldest of the top class lost its KV"
        wire = plan.wire()
        launch(self.state, plan)
        check_invariants(self.state)
        self.log.append(wire)
        self.in_flight.append((plan, self.worker.execute(wire)))
        members = [cast("int", request.handle) for request in plan.members(self.state.slots)]
        self.owners.append(dict(zip(wire.rows, members, strict=True)))
        return True

    def commit(self) -> Committed:
        """Settle the oldest step: every token sampled for a sequence that lives is delivered."""
        plan, result = self.in_flight.popleft()
        owners = self.owners.popleft()
        ended = set(self.ended)
        committed = commit(self.state, plan, result, self.now)
        dropped = cast("set[int]", set(committed.requeued))
        live = [owners[row] for row in result.rows if owners[row] not in ended | dropped | {_NOBODY}]
        assert sorted(cast("list[int]", committed.handles)) == sorted(live)
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
    )


def random_request(bench: Bench, draw: random.Random) -> SequenceRequest:
    prefix = [7] * draw.randint(0, 12)  # shared beginnings, so that the cache is hit
    prompt = prefix + [draw.randint(0, 31) for _ in range(draw.randint(1, 16))]
    kind = draw.random()
    max_output = 0 if kind < 0.1 else -1 if kind < 0.2 else draw.randint(1, 20)
    scored = 0 if kind < 0.15 else -1
    return bench.request(
        prompt, max_output, draw.randint(0, 1), prompt_logprobs=scored, priority=draw.choice([0, 0, 1]),
        eos=draw.random() < 0.5, bypass=draw.random() < 0.1,
    )  # fmt: skip


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_batching_changes_nothing_and_nothing_leaks(seed: int) -> None:
    """Random arrivals, chunks, pools, depths, cache on or off, 30 % aborted: equal to the run alone, and all ends."""
    draw = random.Random(seed)
    bench = Bench(make_limits(draw), depth=draw.randint(1, 3))
    for _ in range(draw.randint(1, 20)):
        bench.submit(random_request(bench, draw))
        for _ in range(draw.randint(0, 3)):
            bench.step()
        if bench.requests and draw.random() < 0.3:
            ended = bench.state.abort(draw.choice(list(bench.requests)), "cancelled", bench.now)
            if ended is not None:
                bench.finish(ended)
        check_invariants(bench.state)
    bench.run()
    assert set(bench.ended) == set(bench.requests)
    for handle, request in bench.requests.items():
        bench.check_output(handle)
        ended = bench.ended[handle]
        if ended.reason is EndReason.MAX_TOKENS:
            assert ended.output_tokens == request.max_output_tokens == len(bench.output[handle])
        elif ended.reason is EndReason.EOS:
            assert bench.output[handle][-1] == 5
            assert 5 not in bench.output[handle][:-1]
        if request.prompt_logprobs >= 0 and ended.reason is not EndReason.ABORTED:
            assert bench.scored.get(handle, 1) == len(request.prompt_ids)
        assert min(ended.prefill_s, ended.decode_s, ended.stalled_s) >= 0
    counts = bench.state.counts()
    assert counts.free_blocks + counts.cached_blocks == bench.limits.num_blocks
    assert (counts.running, counts.waiting, counts.used_blocks) == (0, 0, 0)
    assert not bench.state.live


@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_same_trace_same_decisions(seed: int) -> None:
    logs = []
    for _ in range(2):
        draw = random.Random(seed)
        bench = Bench(make_limits(draw))
        for _ in range(8):
            bench.submit(random_request(bench, draw))
            bench.step()
        bench.run()
        logs.append((bench.log, bench.state.decisions.records()))
    assert logs[0] == logs[1]
    decided = [decode(record) for record in logs[0][1]]
    plans = [plan for plan in logs[0][0] if isinstance(plan, StepPlan)]
    assert sum(decision.num_steps for decision in decided) == len(plans)
    assert sum(len(decision.started) for decision in decided) == sum(len(plan.new) for plan in plans)


class SchedulerMachine(RuleBasedStateMachine):
    """Every operation in any order, with up to three steps in flight."""

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed: int) -> None:
        """A small replica."""
        self.draw = random.Random(seed)
        self.bench = Bench(make_limits(self.draw), depth=3)

    @rule()
    def submit(self) -> None:
        """Arrival, also while a step runs."""
        self.bench.submit(random_request(self.bench, self.draw))

    @rule()
    def abort(self) -> None:
        """At any point: waiting, running, in flight, ended."""
        if self.bench.requests:
            ended = self.bench.state.abort(self.draw.choice(list(self.bench.requests)), "cancelled", self.bench.now)
            if ended is not None:
                self.bench.finish(ended)

    @precondition(lambda self: len(self.bench.in_flight) < self.bench.depth)
    @rule()
    def launch(self) -> None:
        """Plan and launch, also while other steps run."""
        self.bench.now += 1.0
        self.bench.launch()

    @precondition(lambda self: self.bench.in_flight)
    @rule()
    def commit(self) -> None:
        """The oldest result arrives."""
        self.bench.commit()

    @precondition(lambda self: self.bench.in_flight)
    @rule()
    def lose_worker(self) -> None:
        """What runs fails and the worker's KV is gone."""
        self.bench.lose_worker()

    @rule()
    def flush(self) -> None:
        """Empty the cache at any time."""
        self.bench.state.flush_prefix_cache()
        assert self.bench.state.counts().cached_blocks == 0

    @invariant()
    def holds(self) -> None:
        """All tables agree."""
        if hasattr(self, "bench"):
            check_invariants(self.bench.state)

    def teardown(self) -> None:
        """What is left finishes, and is right."""
        if not hasattr(self, "bench"):
            return
        self.bench.run()
        assert set(self.bench.ended) == set(self.bench.requests)
        for handle in self.bench.requests:
            self.bench.check_output(handle)


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase


def limits(**changes: int | float | bool) -> SchedulerLimits:
    base: dict[str, int | float | bool] = {
        "num_blocks": 8, "block_size": 4, "max_running": 4, "max_batch_tokens": 16, "max_context": 64,
        "max_prefill_chunk": 8, "watermark": 0.0,
    }  # fmt: skip
    return SchedulerLimits(**{**base, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "max_output", "field"),
    [(0, 1, "prompt"), (33, 1, "prompt"), (32, 2, "stop.max_output_tokens"), (10, 55, "stop.max_output_tokens")],
)
def test_what_can_never_fit_is_refused_with_the_numbers(prompt: int, max_output: int, field: str) -> None:
    bench = Bench(limits())
    refusal = bench.state.submit(bench.request([1] * prompt, max_output), 0.0)
    assert refusal is not None
    assert (refusal.code, refusal.field) == ("invalid_request", field)
    assert refusal.metadata["kv_pool_tokens"] == "32"
    assert not bench.state.has_work()


def test_the_largest_request_that_fits_runs() -> None:
    bench = Bench(limits())
    for prompt, output in ((32, 1), (1, 32), (31, -1)):
        assert bench.submit(bench.request([1] * prompt, output))
        bench.run()
    assert bench.ended[0].output_tokens == 1
    assert bench.ended[1].output_tokens == 32
    assert bench.ended[2].reason is EndReason.CONTEXT_LENGTH


def test_a_full_queue_is_refused_and_a_handle_is_unique() -> None:
    bench = Bench(limits(max_waiting=1))
    request = bench.request([1], 1)
    assert bench.submit(request)
    twice = bench.state.submit(request, 0.0)
    assert twice is not None
    assert twice.code == "already_exists"
    full = bench.state.submit(bench.request([1], 1), 0.0)
    assert full is not None
    assert full.code == "overloaded"


def test_decodes_go_on_while_a_long_prompt_is_computed() -> None:
    bench = Bench(limits(num_blocks=32, max_batch_tokens=9))
    bench.submit(bench.request([1, 2], 40))
    bench.step()
    bench.submit(bench.request(list(range(31)), 1))
    for _ in range(4):
        before = len(bench.output[0])
        bench.step()
        assert len(bench.output[0]) == before + 1


def test_prefixes_are_shared_within_a_tenant_alone() -> None:
    bench = Bench(limits(num_blocks=32))
    prompt = list(range(13))
    for tenant in (0, 0, 1):
        bench.submit(bench.request(prompt, 2, tenant))
        bench.run()
    assert [bench.ended[n].cached_prompt_tokens for n in range(3)] == [0, 12, 0]


def test_a_whole_cached_prompt_leaves_one_token_to_compute() -> None:
    bench = Bench(limits(num_blocks=32))
    for _ in range(2):
        bench.submit(bench.request(list(range(12)), 1))
        bench.run()
    assert bench.ended[1].cached_prompt_tokens == 8


def test_preemption_takes_the_lowest_class_and_loses_no_token() -> None:
    bench = Bench(limits(num_blocks=6, prefix_cache=False, output_quantile=0.0))
    bench.submit(bench.request([1] * 4, 14, priority=1))
    bench.submit(bench.request([2] * 4, 14))
    bench.submit(bench.request([3] * 4, 14))
    bench.run()
    counts = [bench.ended[n].preemption_count for n in range(3)]
    assert counts[0] == 0
    assert sum(counts) >= 1
    for handle in range(3):
        bench.check_output(handle)
        assert len(bench.output[handle]) == 14
    assert bench.ended[2].stalled_s > 0


def test_a_head_that_does_not_fit_is_overtaken_a_bounded_number_of_times() -> None:
    bench = Bench(limits(num_blocks=8, max_bypass=2, max_running=8))
    bench.submit(bench.request([1] * 4, 24))
    bench.step()
    bench.submit(bench.request(list(range(28)), 2))
    for _ in range(6):
        bench.submit(bench.request([2, 3], 1))
        bench.step()
    overtook = [handle for handle in bench.ended if handle >= 2]
    assert len(overtook) == 2
    bench.run()
    assert set(bench.ended) == set(bench.requests)


def test_a_row_that_fails_fails_alone() -> None:
    bench = Bench(limits(num_blocks=32))
    bench.submit(bench.request([1, 2], 6))
    bench.submit(bench.request([3, 4], 6))
    bench.step()
    victim = bench.state.live[0].row
    bench.worker.fault = lambda plan: [victim] if plan.step == 3 else []
    bench.run()
    assert bench.ended[0].reason is EndReason.FAILED
    assert bench.ended[1].reason is EndReason.MAX_TOKENS
    bench.check_output(1)


def test_resumed_output_is_counted_and_not_sent_again() -> None:
    bench = Bench(limits(num_blocks=32))
    prompt = [1, 2, 3]
    whole = isolated_output(prompt, 0, 6)
    request = bench.request(prompt, 6)
    resumed = SequenceRequest(
        handle=0, request_id="r0", prompt_ids=prompt, resume_ids=whole[:4], sampling=request.sampling,
        max_output_tokens=6, cache_key=request.cache_key,
    )  # fmt: skip
    assert bench.state.submit(resumed, 0.0) is None
    bench.requests[0] = resumed
    bench.output[0] = whole[:4]
    bench.run()
    assert bench.output[0] == whole


def test_every_waiting_sequence_says_why() -> None:
    bench = Bench(limits(num_blocks=8, max_running=2, max_bypass=1))
    bench.submit(bench.request([1] * 20, 4))
    bench.step()
    bench.submit(bench.request([2] * 24, 4, priority=1))
    bench.submit(bench.request([3] * 24, 4))
    reasons = bench.state.counts().waiting_by_reason
    assert reasons == {"blocks": 1, "priority": 1}
    views = bench.state.describe(bench.now + 2.0)
    assert [view.phase for view in views] == ["prefill", "waiting", "waiting"]
    assert "needs up to 7 KV blocks, 6 for its 24 tokens" in views[1].wait_reason
    assert "position 2 of 2" in views[2].wait_reason
    assert views[0].wait_reason == ""
    assert views[1].age_s == 2.0
    for _ in range(2):
        bench.submit(bench.request([4], 3, priority=1))
        bench.step()
    assert bench.state.counts().waiting_by_reason["slots"] == bench.state.counts().waiting
    bench.run()
    assert bench.state.counts().waiting_by_reason == {}


def test_a_stale_result_is_refused() -> None:
    bench = Bench(limits())
    bench.submit(bench.request([1], 2))
    plan = plan_step(bench.state, bench.limits, 0.0)
    assert plan is not None
    launch(bench.state, plan)
    result = bench.worker.execute(plan.wire())
    bench.state.epoch += 1
    plan.epoch += 1
    with pytest.raises(StaleResultError):
        commit(bench.state, plan, result, 0.0)
