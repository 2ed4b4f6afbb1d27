"""How many drafts are asked for: by what they cost, by how often they are right, and when they are tried again."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from pawl_server.scheduler.budget import StepLoad
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.guess import Guess
from pawl_server.scheduler.plan import Plan
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.speculation import Speculation
from pawl_workers.plan import StepResult
from tests.fakes.scheduler_bench import Bench, limits

MOST = 4


class Says:
    """Proposes one thing for ever."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.num_asked = 0

    def propose(self, tokens: array[int], most: int) -> Guess:
        """The first `most`."""
        assert len(tokens)
        self.num_asked += 1
        return Guess(self.ids[:most], 2)


class Driven:
    """One sequence that decodes; the worker's answers are told, whether they are guessed or not."""

    def __init__(
        self,
        ids: list[int],
        *,
        token_cost: float,
        fixed_cost: float = 1.0,
        drafts_cost: float = 0.0,
        others: int = 0,
    ) -> None:
        self.limits = limits(
            num_blocks=4000, max_drafts=MOST, max_context=10_000, max_batch_tokens=256, max_running=128
        )
        self.bench = Bench(self.limits)
        self._costs = (fixed_cost, token_cost, drafts_cost)
        self.says = Says(ids)
        self.speculation = Speculation(MOST, lambda sequence: self.says if sequence.order == 0 else Says([]))
        self.bench.state.speculation = self.speculation
        for num_tokens in range(1, 33):
            for has_drafts in (False, True):
                load = StepLoad(num_tokens, 100, 100, has_drafts)
                self.speculation.observe(load, self._seconds(load))
        for _ in range(1 + others):
            self.bench.submit(self.bench.request([1, 2, 3], 9_000))
        self.accept = 0
        while any(not sequence.num_output for sequence in self.bench.state.live.values()):
            self.step()

    @property
    def sequence(self) -> SequenceState:
        return self.bench.state.live[0]

    def step(self) -> int:
        """One step, of a worker that goes on with the first `accept` guessed tokens; drafts that there were."""
        plan = plan_step(self.bench.state, self.limits, 0.0)
        assert plan is not None
        drafts = self._drafts(plan)
        launch(self.bench.state, plan)
        wire = plan.wire()
        rows, token_ids = list[int](), list[int]()
        for row, count in zip(wire.rows, wire.num_tokens, strict=True):
            owner = self.bench.state.slots.owner(row)
            if owner.num_computed + count < owner.num_tokens:
                continue
            accepted = drafts[: self.accept] if owner.order == 0 else []
            rows += [row] * (1 + len(accepted))
            token_ids += [*accepted, self._next(len(accepted))]
        commit(self.bench.state, plan, StepResult(wire.step, wire.epoch, rows, token_ids, [], [], [], 0, 0, 0), 0.0)
        self.num_asked = 0 if plan.proposals is None else plan.proposals.num_looks
        self.speculation.observe(plan.load, self._seconds(plan.load))
        return len(drafts)

    def _seconds(self, load: StepLoad) -> float:
        fixed_cost, token_cost, drafts_cost = self._costs
        return fixed_cost + token_cost * load.num_tokens + drafts_cost * load.has_drafts

    def _drafts(self, plan: Plan) -> list[int]:
        return plan.proposals.drafts.get(self.sequence.row, []) if plan.proposals is not None else []

    def _next(self, num_accepted: int) -> int:
        """The token after those: as guessed, while the guess goes on and is right."""
        return self.says.ids[num_accepted] if num_accepted < min(self.accept, len(self.says.ids)) else 9

    def steps(self, count: int, accept: int) -> list[int]:
        self.accept = accept
        return [self.step() for _ in range(count)]


def test_cheap_drafts_that_are_right_are_made_at_every_step_and_at_length() -> None:
    driven = Driven([5, 6, 7, 8], token_cost=0.01)
    assert driven.steps(30, accept=MOST)[10:] == [MOST] * 20


def test_before_some_steps_are_measured_guesses_are_only_compared() -> None:
    driven = Driven([5, 5, 5, 5], token_cost=0.01)
    speculation, slots, load = Speculation(MOST, lambda _: driven.says), driven.bench.state.slots, StepLoad(1, 10, 10)
    found = []
    for _ in range(4):
        found.append(speculation.propose(slots, np.array([driven.sequence.row]), load, 8))
        speculation.observe(load, 1.0)
    assert [len(proposals.guesses) for proposals in found] == [1, 1, 1, 1]
    assert [len(proposals.drafts) for proposals in found] == [0, 0, 0, 1]


def test_looks_that_save_nothing_take_a_hundredth_of_the_time() -> None:
    """Of sixty sequences none of which finds anything, in steps of a millisecond: a tenth of a step that asks takes."""
    driven = Driven([], token_cost=0.0, fixed_cost=1e-3, others=60)
    asked = []
    for _ in range(1200):
        driven.step()
        asked.append(driven.num_asked)
    steps = [count for count in asked[200:] if count]
    assert 0.005 < sum(1e-4 + 5e-5 * count for count in steps) < 0.0105
    assert len(steps) > 30


def test_what_is_never_right_is_not_computed_and_looked_up_ever_more_seldom() -> None:
    driven = Driven([5, 6, 7, 8], token_cost=0.3)
    assert sum(driven.steps(20, accept=0)) <= 4
    driven.says.num_asked = 0
    assert sum(driven.steps(320, accept=0)) == 0
    assert 15 <= driven.says.num_asked <= 30


def test_what_becomes_right_is_noticed_without_a_draft_and_then_computed() -> None:
    driven = Driven([5, 5, 5, 5], token_cost=0.2)
    driven.steps(300, accept=0)
    driven.accept = MOST
    drafts = [driven.step() for _ in range(60)]
    begun = next(place for place, count in enumerate(drafts) if count)
    assert begun <= 40
    assert sum(count > 0 for count in drafts[begun:]) > 10
    assert driven.steps(10, accept=MOST) == [MOST] * 10


def test_in_a_full_batch_where_tokens_cost_time_little_is_drafted() -> None:
    """Drafts of which one in two is right pay alone, and not where a step gives as many tokens for the same time."""
    totals = []
    for others in (0, 60):
        driven = Driven([5], token_cost=0.05, others=others)
        drafts = [driven.steps(1, accept=number % 2)[0] for number in range(200)]
        totals.append(sum(drafts[100:]))
    assert totals[0] > 90
    assert totals[1] < 20


def test_what_every_step_with_drafts_costs_is_weighed_against_all_of_them() -> None:
    """Right or not: a whole step's time for at most one token more pays in no step, for four of them it does."""
    assert sum(Driven([5], token_cost=0.01, drafts_cost=1.2).steps(100, accept=1)) == 0
    assert sum(Driven([5] * 4, token_cost=0.01, drafts_cost=1.2).steps(100, accept=MOST)[20:]) > 100


def test_where_nothing_is_found_it_is_asked_less_often() -> None:
    driven = Driven([], token_cost=0.0)
    driven.says.num_asked = 0
    driven.steps(100, accept=0)
    assert 20 <= driven.says.num_asked <= 40


def test_drafts_that_broke_the_step_are_not_made_again() -> None:
    driven = Driven([5, 6], token_cost=0.0)
    before = driven.sequence.num_output
    plan = plan_step(driven.bench.state, driven.limits, 0.0)
    assert plan is not None
    assert plan.num_drafts == 2
    launch(driven.bench.state, plan)
    commit(driven.bench.state, plan, StepResult(plan.step, plan.epoch, [], [], [], [], [], 0, 0, 0), 0.0)
    assert driven.sequence.num_output == before
    assert driven.steps(300, accept=0) == [0] * 300
    assert driven.sequence.num_output == before + 300


def test_most_drafts_is_checked() -> None:
    with pytest.raises(ValueError, match="most_drafts = 0"):
        Speculation(0)
