"""The choice of a replica against a model that keeps whole prompts, and never one that is not ready."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pawl.errors import Unavailable
from pawl_server.config import Config
from pawl_server.frontend.core import Core
from pawl_server.frontend.replicas import Replica, Replicas
from pawl_server.frontend.router import Candidate, Router
from pawl_server.internal.v1 import engine_pb2, fleet_pb2
from pawl_server.kv.block_hash import CacheRoot, HashChain, root_hash
from pawl_server.kv.block_pool import BlockPool
from pawl_server.kv.draft import BlockDraft
from pawl_server.kv.events import PrefixesUnknown, PrefixStored

BLOCK = 4
ROOT = CacheRoot("model", "float32", BLOCK)
MANY = 10_000
SALTS = (b"one", b"two")


@dataclass
class _Model:
    """A replica as the oracle has it: every prompt that was sent there, and its work."""

    load: int = 0
    prompts: list[tuple[bytes, tuple[int, ...]]] = field(default_factory=list)

    def num_cached(self, salt: bytes, prompt: tuple[int, ...]) -> int:
        """Tokens in whole blocks that some earlier prompt of the same salt begins with, without the last token."""
        best = 0
        for other_salt, other in self.prompts:
            common = next((n for n, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), None)
            shared = min(len(prompt), len(other)) if common is None else common
            if other_salt == salt:
                best = max(best, min(shared, len(other) - 1) // BLOCK, 0)
        return min(best, (len(prompt) - 1) // BLOCK) * BLOCK


def _candidate(key: int, load: int, num_blocks: int = MANY, foreign: int = 0) -> Candidate[int]:
    return Candidate(key, load, num_own=0, num_sequences=foreign, num_blocks=num_blocks, root=ROOT)


# Two letters and few lengths: prompts often begin alike.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=24).map(tuple)
requests = st.lists(st.tuples(prompts, st.sampled_from(SALTS), st.integers(0, 40)), min_size=1, max_size=25)


@given(requests, st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_picks_the_best_by_cached_prefix_and_load(
    sent: list[tuple[tuple[int, ...], bytes, int]], num_replicas: int, affinity: float
) -> None:
    router: Router[int] = Router(affinity)
    models = [_Model() for _ in range(num_replicas)]
    for prompt, salt, work in sent:
        candidates = [_candidate(key, model.load) for key, model in enumerate(models)]
        scores = [affinity * model.num_cached(salt, prompt) - model.load for model in models]
        picked = router.pick(candidates, prompt, salt).key
        assert picked == scores.index(max(scores))
        models[picked].prompts.append((salt, prompt))
        models[picked].load += work


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(2, 5))
def test_unrelated_prompts_are_balanced(sizes: list[int], num_replicas: int) -> None:
    router: Router[int] = Router(1.0)
    loads = [0] * num_replicas
    for number, size in enumerate(sizes):
        prompt = [number] * size
        loads[router.pick([_candidate(key, load) for key, load in enumerate(loads)], prompt, b"").key] += size
    # Each went to the least loaded, so that no two differ by more than one request.
    assert max(loads) - min(loads) <= max(sizes)


@given(st.lists(prompts, min_size=1, max_size=30), st.integers(1, 6))
def test_memory_is_bounded_and_a_replica_that_left_is_forgotten(sent: list[tuple[int, ...]], num_blocks: int) -> None:
    router: Router[int] = Router(1.0)
    for prompt in sent:
        router.pick([_candidate(7, 0, num_blocks)], prompt, b"")
        assert len(router._seen[7]) <= num_blocks
    router.keep([])
    assert not router._seen


@given(st.lists(st.tuples(prompts, st.sampled_from(SALTS)), min_size=1, max_size=30), st.integers(6, 12))
def test_events_tell_the_router_what_a_replica_has(sent: list[tuple[tuple[int, ...], bytes]], num_blocks: int) -> None:
    """Prompts of other front ends, and what was evicted since: an idle replica is chosen for its cache alone."""
    router: Router[int] = Router(1.0)
    pool = BlockPool(num_blocks, max_events=1000)
    for step, (prompt, salt) in enumerate(sent, start=1):
        chain = HashChain(root_hash(ROOT, salt), BLOCK)
        chain.extend(prompt, len(prompt) // BLOCK)
        num_hits = len(pool.find(chain)[: (len(prompt) - 1) // BLOCK])
        # One that is loaded with fewer tokens than the hit is worth is still the better choice, and no more.
        for load in (num_hits * BLOCK - 1, num_hits * BLOCK + 1):
            if load >= 0:
                known = [_candidate(1, load), _candidate(2, 0)]
                chosen = copy.deepcopy(router).pick(known[::-1], prompt, salt).key  # it remembers what it picked
                assert chosen == (1 if load < num_hits * BLOCK else 2)
        draft = BlockDraft(pool)
        hits = draft.prefix_hits(chain, (len(prompt) - 1) // BLOCK)
        draft.share(hits)
        blocks = draft.take(-(-len(prompt) // BLOCK) - len(hits))
        assert blocks is not None
        draft.announce(chain, len(hits), blocks)
        draft.apply(step)
        pool.settle(step)
        pool.release(hits + blocks)
        for event in pool.events.drain():
            assert not isinstance(event, PrefixesUnknown)
            router.learn(1, event.name, present=isinstance(event, PrefixStored))


def test_work_of_other_front_ends_counts() -> None:
    router: Router[int] = Router(1.0)
    assert router.pick([_candidate(0, 0, foreign=2), _candidate(1, 100)], [1, 2], b"").key == 1
    with pytest.raises(ValueError, match="no replica"):
        router.pick([], [1], b"")


class _Link:
    """What is looked at of a link."""

    def __init__(self, *, closed: bool, progressing: bool) -> None:
        self.closed = SimpleNamespace(done=lambda: closed)
        self.load = engine_pb2.EngineLoad(num_blocks=8, progressing=progressing)
        self.welcome = engine_pb2.Welcome(num_blocks=8, block_size=BLOCK)
        self.num_streams = 0


@st.composite
def replicas(draw: st.DrawFn) -> list[Replica]:
    """Replicas in every state, with and without a link that works."""
    found = []
    for index in range(draw(st.integers(0, 5))):
        state = draw(st.sampled_from(fleet_pb2.ReplicaState.values()))
        replica = Replica(fleet_pb2.Replica(index=index, incarnation=1, state=state))
        if draw(st.booleans()):
            link: Any = _Link(closed=draw(st.booleans()), progressing=draw(st.booleans()))
            replica.link = link
        found.append(replica)
    return found


@given(replicas())
def test_a_replica_that_is_not_ready_gets_nothing(found: list[Replica]) -> None:
    async def run() -> None:
        core = Core(Config(), "token")
        core.replicas = known = Replicas("token", "me", 1.0, lambda: None)
        known._replicas = {replica.key: replica for replica in found}
        good = [
            replica
            for replica in found
            if replica.link is not None
            and not replica.link.closed.done()
            and replica.listing.state == fleet_pb2.REPLICA_STATE_READY
        ]
        moving = [replica for replica in good if replica.link is not None and replica.link.load.progressing]
        assert known.serving() == bool(moving)
        if not good:
            with pytest.raises(Unavailable) as caught:
                core.pick([1, 2, 3], b"")
            assert caught.value.reason == "NOT_READY"
        else:
            assert core.pick([1, 2, 3], b"") in (moving or good)
        known._replicas = {}
        await core.close()

    asyncio.run(run())
