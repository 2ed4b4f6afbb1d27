"""The host tier: whatever goes to host memory and comes back, each sequence gives what it gives alone."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.kv.block_pool import PoolError
from pawl_server.kv.host_draft import HostDraft
from pawl_server.kv.host_tier import HostTier, RestoreCost
from pawl_server.scheduler.invariants import check_invariants
from pawl_workers.plan import StepPlan
from tests.fakes.scheduler_bench import Bench, limits, make_limits, random_request
from tests.fakes.shadow_worker import ShadowWorker

CHEAP = RestoreCost(fixed_s=0.0, block_s=1e-6, token_s=1.0, block_size=4)


def run_trace(seed: int, cost: RestoreCost = CHEAP) -> int:
    """Arrivals, preemptions, aborts, failing rows and lost workers; gives how many blocks were brought back."""
    draw = random.Random(seed)
    made = make_limits(draw)
    bench = Bench(
        dataclasses.replace(
            made,
            num_blocks=draw.randint(4, 16),
            prefix_cache=True,
            num_host_blocks=draw.randint(1, 12),
            restore_cost=dataclasses.replace(cost, block_size=made.block_size),
        ),
        depth=draw.randint(1, 3),
    )
    if draw.random() < 0.3:
        bench.worker.fault = lambda plan: [row for row in plan.rows if draw.random() < 0.02]
    for _ in range(draw.randint(5, 25)):
        bench.submit(random_request(bench, draw))
        for _ in range(draw.randint(0, 6)):
            bench.step()
            check_invariants(bench.state)
        kind = draw.random()
        if kind < 0.1 and bench.requests:
            ended = bench.state.abort(draw.choice(list(bench.requests)), "cancelled", bench.now)
            if ended is not None:
                bench.finish(ended)
        elif kind < 0.15:
            bench.lose_worker()
        elif kind < 0.2:
            bench.state.flush_prefix_cache()
    bench.run()
    assert set(bench.ended) == set(bench.requests)
    for handle in bench.requests:
        bench.check_output(handle)
    assert bench.state.counts().used_blocks == 0
    return sum(len(plan.swap_in) for plan in bench.log if isinstance(plan, StepPlan))


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_blocks_come_back_as_they_went(seed: int) -> None:
    run_trace(seed)


def test_the_traces_do_restore() -> None:
    restored = [run_trace(seed) for seed in range(60)]
    assert sum(count > 0 for count in restored) > 15
    assert sum(restored) > 50


def test_nothing_is_moved_when_computing_is_cheaper() -> None:
    dear = RestoreCost(fixed_s=0.0, block_s=100.0, token_s=1.0, block_size=4)
    assert [run_trace(seed, dear) for seed in range(10)] == [0] * 10


def test_an_evicted_conversation_comes_back() -> None:
    small = limits(num_blocks=8, max_batch_tokens=64, num_host_blocks=16)
    bench = Bench(dataclasses.replace(small, restore_cost=CHEAP))
    prompt = list(range(17))
    for ids in (prompt, [30] * 26, [31] * 26, prompt):
        bench.submit(bench.request(ids, 2))
        bench.run()
    assert bench.ended[3].cached_prompt_tokens == 16
    bench.check_output(3)
    assert sum(len(plan.swap_in) for plan in bench.log if isinstance(plan, StepPlan)) == 4


@pytest.mark.parametrize(
    ("num_blocks", "cost", "pays"),
    [
        (0, RestoreCost(0.0, 0.0, 1.0, 16), False),
        (1, RestoreCost(15.0, 0.5, 1.0, 16), True),
        (1, RestoreCost(15.5, 0.5, 1.0, 16), False),  # as long: computing needs no copy
        (1, RestoreCost(20.0, 0.5, 1.0, 16), False),
        (2, RestoreCost(20.0, 0.5, 1.0, 16), True),
        (1000, RestoreCost(0.0, 16.0, 1.0, 16), False),
    ],
)
def test_restoring_pays_when_it_takes_less_time(num_blocks: int, cost: RestoreCost, *, pays: bool) -> None:
    assert cost.pays(num_blocks) is pays


names = st.binary(min_size=1, max_size=1)


@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.lists(names, max_size=3, unique=True), st.lists(names, max_size=5, unique=True)), max_size=12
    ),
)
def test_the_tier_is_an_lru_of_names(num_blocks: int, steps: list[tuple[list[bytes], list[bytes]]]) -> None:
    """Each step brings some prefixes back and saves others, over whatever was not used for longest."""
    tier = HostTier(num_blocks, CHEAP)
    memory: dict[int, bytes] = {}  # what stands in each host block
    recent: list[bytes] = []  # names, the least recently used first
    for wanted, evicted in steps:
        draft = HostDraft(tier)
        found = wanted[: draft.num_found(wanted)]
        assert found == wanted[: next((n for n, name in enumerate(wanted) if name not in recent), len(wanted))]
        draft.hold(found)
        draft.bring(found, range(1, len(found) + 1))
        used, saved, lost = list(found), list[bytes](), 0
        for block, name in enumerate(evicted, start=100):
            draft.save(block, name)
            gone = [other for other in recent if other not in used][:lost]
            if name in recent and name not in gone:
                used += [name] if name not in used else []
            elif len(recent) + len(saved) - lost < num_blocks:
                saved.append(name)
            elif len([other for other in recent if other not in used]) > lost:
                saved.append(name)
                lost += 1
        for block, place in draft.swap_out:
            memory[place] = evicted[block - 100]
        for name, (place, _) in zip(found, draft.swap_in, strict=True):
            assert memory[place] == name, "a prefix was overwritten before it was brought back"
        draft.apply()
        unused = [name for name in recent if name not in used]
        recent = [*unused[lost:], *used, *saved]
        assert tier.check() is None
        assert [name for name, _ in tier.order() if name is not None] == recent
        assert {place: name for name, place in tier.order() if name is not None} == memory


@pytest.mark.parametrize(
    ("where", "name"),
    [(HostTier, "clear"), (HostDraft, "hold"), (HostDraft, "_swap_out_first")],
)
def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch, where: type, name: str) -> None:
    """A tier that outlives its worker, a prefix overwritten while it comes back, and one saved too late."""
    if name == "_swap_out_first":
        monkeypatch.setattr(ShadowWorker, "_move", _compute_first)
    else:
        monkeypatch.setattr(where, name, lambda *_: None)
    with pytest.raises((AssertionError, KeyError, PoolError)):
        run_many()


_move = ShadowWorker._move


def _compute_first(worker: ShadowWorker, plan: StepPlan) -> None:
    """What a worker would do that copies after it computes: the blocks hold other tokens by then."""
    for block, _ in plan.swap_out:
        for offset in range(worker.block_size):
            worker.slots[block, offset] = b"overwritten"
    _move(worker, plan)


def run_many() -> None:
    for seed in range(200):
        run_trace(seed)
