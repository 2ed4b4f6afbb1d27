"""Backfill: whoever starts before those for whom blocks are kept delays none of them, where predictions are exact."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.backfill import Backfill
from pawl_server.scheduler.output_lengths import OutputLengths
from pawl_server.scheduler.planner import plan_step
from tests.fakes.scheduler_bench import Bench, limits


class _AsDeclared(OutputLengths):
    """Predicts that every output is as long as its request allows, which in these traces is true."""

    def observe(self, num_output: int) -> None:
        """Learn nothing."""


@dataclass(slots=True)
class _Run:
    """A trace that was run.

    Attributes:
        started: by handle, the step in which it first ran.
        overtaken: by handle, the first step in which somebody was backfilled before it while blocks were kept for it.
    """

    started: dict[int, int] = field(default_factory=dict)
    overtaken: dict[int, int] = field(default_factory=dict)


def _run(seed: int, backfill_until: int, needed: int = -1) -> _Run:
    """Run the trace of a seed, and backfill only in steps before `backfill_until`; stop when `needed` has started."""
    draw = random.Random(seed)
    bench = Bench(_limits(draw), depth=draw.randint(1, 3))
    bench.state.lengths = _AsDeclared(bench.limits.output_quantile)
    without = dataclasses.replace(bench.limits, backfill=False)
    arrivals = deque(_arrivals(draw, bench.limits.pool_tokens))
    run, going = _Run(), True
    for step in count():
        while arrivals and arrivals[0][0] <= step:
            _, prompt, num_output, num_samples = arrivals.popleft()
            num_samples = min(num_samples, bench.limits.max_running)
            bench.submit(bench.request(prompt, num_output, num_samples=num_samples))
        if step == backfill_until:
            bench.limits = without
        for handle in _kept_for(bench):
            run.overtaken.setdefault(handle, step)
        going = bench.step()
        for sequence in bench.state.running.values():
            run.started.setdefault(cast("int", sequence.request.handle), step)
        if needed in run.started or not (going or arrivals):
            return run
    raise AssertionError


def _kept_for(bench: Bench) -> list[int]:
    """For whom blocks are kept while somebody else would be backfilled now."""
    if len(bench.in_flight) >= bench.depth:
        return []
    plan = plan_step(bench.state, bench.limits, bench.now + 1.0)
    if plan is None or not any(one.backfilled for one in plan.admissions):
        return []
    return [
        cast("int", sequence.request.handle)
        for sequence, before in plan.bypassed
        if sequence.bypassed + plan.num_overtaking - before >= bench.limits.max_bypass
    ]


def _limits(draw: random.Random) -> SchedulerLimits:
    size, max_running = draw.choice([1, 2, 4]), draw.randint(2, 8)
    return limits(
        num_blocks=draw.randint(60 // size, 160 // size), block_size=size, max_running=max_running,
        max_batch_tokens=max_running + draw.randint(1, 30), max_context=200, max_prefill_chunk=draw.randint(2, 24),
        max_partial_prefills=draw.randint(1, 3), prefix_cache=draw.random() < 0.6, max_bypass=draw.randint(1, 3),
        watermark=draw.choice([0.0, 0.1]),
    )  # fmt: skip


def _arrivals(draw: random.Random, most: int) -> list[tuple[int, list[int], int, int]]:
    """Step, prompt, output, samples: many that are small and some that take much of the pool.

    In one of two traces prompts begin alike, in another some want several samples.
    """
    kind, arrivals = draw.choice(["alike", "samples", "neither", "both"]), []
    for number in range(draw.randint(6, 30)):
        big = draw.random() < 0.3
        num_prompt = draw.randint(most // 3, 2 * most // 3) if big else draw.randint(1, 12)
        prompt = [number] + [draw.randint(0, 31) for _ in range(num_prompt - 1)]
        if kind in ("alike", "both") and draw.random() < 0.4:
            num_alike = draw.randint(0, num_prompt - 1)
            prompt[:num_alike] = [77] * num_alike
        num_samples = draw.randint(2, 4) if kind in ("samples", "both") and draw.random() < 0.2 else 1
        num_output = draw.randint(1, 25 if draw.random() < 0.3 else 8)
        arrivals.append((draw.randint(0, 30), prompt, num_output, num_samples))
    return sorted(arrivals, key=lambda arrival: arrival[0])


def delayed(seed: int) -> tuple[int, int]:
    """Run a trace, and again with nobody backfilled from the moment on in which somebody is overtaken so.

    Returns:
        How many sequences were overtaken, and how many of them started later for it.
    """
    run = _run(seed, backfill_until=-1)
    late = 0
    for handle, step in run.overtaken.items():
        late += run.started[handle] > _run(seed, step, needed=handle).started[handle]
    return len(run.overtaken), late


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_nobody_starts_later_for_those_who_are_backfilled(seed: int) -> None:
    assert delayed(seed)[1] == 0


def test_the_traces_backfill() -> None:
    """The property above would hold of a scheduler that never backfills."""
    assert sum(delayed(seed)[0] for seed in range(20)) > 10


def test_the_traces_find_a_backfill_that_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backfill, "_harmless", lambda *_, **__: True)
    assert any(delayed(seed)[1] for seed in range(60))
