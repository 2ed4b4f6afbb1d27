"""The scheduler over a shadow KV cache: whatever the schedule, each sequence gives what it gives alone."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pawl_server.scheduler.decisions import decode
from pawl_server.scheduler.invariants import check_invariants
from pawl_workers.plan import StepPlan
from tests.fakes.scheduler_bench import Bench, make_limits, random_request
from tests.fakes.scheduler_traces import play


@settings(max_examples=100)
@given(st.integers(0, 2**32))
def test_batching_changes_nothing_and_nothing_leaks(seed: int) -> None:
    """Random seeds of the traces of which `test_traces` plays the first 2,000."""
    play(seed)


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
    started = sum(len(decision.started) + len(decision.forked) for decision in decided)
    assert started == sum(len(plan.new) for plan in plans)


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


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase
