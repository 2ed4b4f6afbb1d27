"""Tenants that wait get service in proportion to their weights, whatever they ask for and whenever they come.

The service is counted here from what was computed and delivered, not read from the scheduler's own accounts.
"""

from __future__ import annotations

import random
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.fairness import Prices
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import SamplingSpec
from tests.fakes.shadow_worker import ShadowWorker

MOST_PROMPT = 40
MOST_OUTPUT = 24
PRICES = Prices()


class Market:
    """Tenants by name, each with a queue that is kept full, on one replica."""

    def __init__(self, limits: SchedulerLimits, seed: int) -> None:
        self.limits = limits
        self.state = SchedulerState(limits, CacheRoot("m", "f", limits.block_size))
        self.worker = ShadowWorker(limits.block_size)
        self.draw = random.Random(seed)
        self.service: dict[str, float] = {}
        self.tenants: dict[int, str] = {}
        self.seen: set[int] = set()
        self.now = 0.0

    def backlog(
        self, tenant: str, *, weight: float = 1.0, at_least: int = 12, prompt: int = 0, output: int = 0
    ) -> None:
        """Fill the tenant's queue."""
        waiting = sum(s.request.tenant == tenant for s in self.state.queue.in_order())
        for _ in range(at_least - waiting):
            handle = len(self.tenants)
            self.tenants[handle] = tenant
            shared = [3] * self.draw.choice([0, 8, 16])
            own = prompt or self.draw.randint(1, MOST_PROMPT - 16)
            request = SequenceRequest(
                handle=handle, request_id=str(handle), tenant=tenant, weight=weight, cache_key=tenant.encode(),
                prompt_ids=shared + [self.draw.randrange(32) for _ in range(own)],
                sampling=SamplingSpec(seed=len(tenant)), max_output_tokens=output or self.draw.randint(1, MOST_OUTPUT),
            )  # fmt: skip
            assert self.state.submit(request, self.now) is None

    def step(self) -> None:
        """One step; what it gives is added to the tenants' service."""
        self.now += 1.0
        plan = plan_step(self.state, self.limits, self.now)
        assert plan is not None
        for admission in plan.admissions:
            handle = cast("int", admission.sequence.request.handle)
            if handle not in self.seen:
                self.seen.add(handle)
                total = len(admission.sequence.request.prompt_ids)
                price = PRICES.cached * admission.num_computed + PRICES.prompt * (total - admission.num_computed)
                self._serve(handle, price)
        wire = plan.wire()
        launch(self.state, plan)
        committed = commit(self.state, plan, self.worker.execute(wire), self.now)
        for handle in cast("list[int]", committed.handles):
            self._serve(handle, PRICES.output)

    def _serve(self, handle: int, amount: float) -> None:
        tenant = self.tenants[handle]
        self.service[tenant] = self.service.get(tenant, 0.0) + amount

    @property
    def bound(self) -> float:
        """Most that one tenant may be ahead: a prompt, and the outputs of all that run (theorem 4.3 of the paper)."""
        return 2 * (PRICES.prompt * MOST_PROMPT + PRICES.output * self.limits.max_running * MOST_OUTPUT)


def make_market(seed: int) -> Market:
    draw = random.Random(seed)
    limits = SchedulerLimits(
        num_blocks=draw.choice([16, 40, 200]), block_size=8, max_running=draw.randint(2, 8), max_batch_tokens=64,
        max_context=128, max_prefill_chunk=16, max_bypass=0, output_quantile=draw.choice([0.0, 0.5]),
    )  # fmt: skip
    return Market(limits, seed)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from([1.0, 2.0, 3.0]))
def test_the_service_gap_of_two_backlogged_tenants_is_bounded(seed: int, weight: float) -> None:
    """One asks for much and often, the other for little; the pool is sometimes so small that there are preemptions."""
    market = make_market(seed)
    for _ in range(120):
        market.backlog("greedy", prompt=24, output=MOST_OUTPUT)
        market.backlog("modest", weight=weight, at_least=6)
        market.step()
        gap = market.service.get("greedy", 0.0) - market.service.get("modest", 0.0) / weight
        assert abs(gap) <= market.bound


@settings(max_examples=15)
@given(st.integers(0, 2**32))
def test_a_tenant_that_comes_back_gets_no_credit_for_idle_time(seed: int) -> None:
    market = make_market(seed)
    for _ in range(80):
        market.backlog("steady")
        market.step()
    before = market.service["steady"]
    for _ in range(80):
        market.backlog("steady")
        market.backlog("late")
        market.step()
        assert abs(market.service["steady"] - before - market.service.get("late", 0.0)) <= market.bound


def test_what_is_computed_again_is_not_charged_again_and_a_cached_prompt_costs_less() -> None:
    market = make_market(0)
    market.limits = market.state.limits
    market.backlog("a", at_least=1, prompt=9, output=3)
    while market.state.has_work():
        market.step()
        for sequence in market.state.live.values():
            assert market.state.accounts.service(sequence.tenant) == market.service["a"]
        if len(market.seen) and market.state.running and market.state.step == 2:
            market.state.reset_worker(market.state.epoch + 1, market.now)
            market.worker.reset(market.state.epoch)
    assert len(market.state.accounts) == 0


def test_a_flood_does_not_keep_another_tenant_waiting() -> None:
    """A hundred requests stand before the first of the other tenant; it is among the next that start."""
    market = make_market(1)
    market.backlog("flood", at_least=100, prompt=8, output=8)
    for _ in range(20):
        market.step()
    market.backlog("other", at_least=1, prompt=8, output=8)
    handle = len(market.tenants) - 1
    before = len(market.seen)
    while handle not in market.seen:
        market.step()
    assert len(market.seen) - before <= market.limits.max_running
