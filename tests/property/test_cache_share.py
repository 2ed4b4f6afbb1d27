"""A tenant that floods the cache evicts itself: what it can take from the others is bounded."""

from __future__ import annotations

import dataclasses
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.kv.block_hash import CacheRoot, HashChain, root_hash
from pawl_server.kv.block_pool import BlockPool
from pawl_server.kv.draft import BlockDraft
from tests.fakes.scheduler_bench import Bench, limits

HALF_LIFE_S = 100.0


class Cache:
    """Runs one sequence at a time through a pool of blocks of one token."""

    def __init__(self, num_blocks: int, retained_share: float = 0.25) -> None:
        self.pool = BlockPool(num_blocks, half_life_s=HALF_LIFE_S, retained_share=retained_share)
        self.step = 0

    def run(self, tenant: str, tokens: list[int], now: float, keep_s: float = 0.0) -> int:
        """Compute a sequence and end it; gives the tokens that were cached."""
        chain = HashChain(root_hash(CacheRoot("m", "float32", 1), tenant.encode()), 1, tenant)
        chain.extend(tokens, len(tokens))
        self.step += 1
        draft = BlockDraft(self.pool)
        hits = draft.prefix_hits(chain, len(tokens) - 1)
        draft.share(hits)
        blocks = draft.take(len(tokens) - len(hits))
        assert blocks is not None
        draft.announce(chain, len(hits), blocks)
        draft.apply(self.step, now)
        self.pool.settle(self.step)
        if keep_s:
            self.pool.retain(hits + blocks, now + keep_s)
        self.pool.release(hits + blocks)
        return len(hits)


@settings(max_examples=60)
@given(
    st.integers(20, 60),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.lists(st.integers(1, 15), min_size=20, max_size=60),
    st.floats(0.0, 250.0),
)
def test_a_flood_leaves_the_others_their_share(
    num_blocks: int, quiet: list[int], flood: list[int], idle_s: float
) -> None:
    """A tenant idle for d keeps at least a share of num_blocks / num_tenants, halved with each half-life."""
    cache = Cache(num_blocks)
    for number, size in enumerate(quiet):
        cache.run(f"quiet {number}", list(range(size)), 0.0)
    held = {tenant: cache.pool.num_published(f"quiet {tenant}") for tenant in range(len(quiet))}
    for number, size in enumerate(flood):
        cache.run("flood", [1000 * number + place for place in range(size)], idle_s)
    share = num_blocks / (len(quiet) + 1) * 0.5 ** (idle_s / HALF_LIFE_S)
    for tenant, before in held.items():
        after = cache.pool.num_published(f"quiet {tenant}")
        # What a running sequence of the flood holds is not to be had, whoever owns it.
        assert after >= min(before, math.floor(share - max(flood))), (after, before, share)
        if after == quiet[tenant]:
            assert cache.run(f"quiet {tenant}", list(range(quiet[tenant])), idle_s) == quiet[tenant] - 1


def test_a_flood_against_plain_lru() -> None:
    """Two tenants, one of whom asks a thousand times for something new: the other keeps its prefix."""
    cache = Cache(100)
    prompt = list(range(20))
    cache.run("quiet", prompt, 0.0)
    for number in range(1000):
        cache.run("flood", [100 * number + place for place in range(30)], 50.0)
        if number % 100 == 99:
            assert cache.run("quiet", prompt, 50.0) == 19
    assert cache.pool.num_published("quiet") == 20


def test_a_tenant_that_left_does_not_stand_for_ever() -> None:
    cache = Cache(64)
    for number in range(16):
        cache.run(f"left {number}", [1, 2], 0.0)
    for number in range(40):
        cache.run("active", [100 * number + place for place in range(8)], 10 * HALF_LIFE_S)
    assert cache.pool.num_published("active") == 64


def test_one_tenant_alone_has_plain_lru() -> None:
    cache = Cache(4)
    for token in (1, 2, 3, 4):
        cache.run("one", [token], 0.0)
    cache.run("one", [1, 5], 0.0)  # hits 1 and evicts 2, the least recently used
    found = [cache.run("one", [token, 6], 0.0) for token in (1, 4, 2)]
    assert found == [1, 1, 0]


@given(st.integers(8, 40), st.lists(st.integers(1, 8), min_size=1, max_size=8), st.integers(1, 4))
def test_kept_prefixes_outlive_a_flood_and_never_block_it(num_blocks: int, sizes: list[int], num_tenants: int) -> None:
    """At most the budget is kept; no tenant keeps more than half of it; the flood always gets its blocks."""
    cache = Cache(num_blocks, retained_share=0.5)
    budget = num_blocks // 2
    kept = {}
    for number, size in enumerate(sizes):
        tokens = [1000 * (number + 1) + place for place in range(min(size, num_blocks - budget))]
        before = cache.pool.num_retained
        cache.run(f"t{number % num_tenants}", tokens, 0.0, keep_s=60.0)
        kept[number] = (tokens, cache.pool.num_retained - before)
        assert cache.pool.num_retained <= budget
    for number in range(5):
        cache.run("flood", [-1 - number * num_blocks - place for place in range(num_blocks - budget)], 1.0)
    for number, (tokens, length) in kept.items():
        if length:
            found = cache.run(f"t{number % num_tenants}", [*tokens[:length], 5], 1.0)
            assert found == length
    # A flood as large as the pool takes even what was kept: a hint never makes anybody wait.
    cache.run("flood", [10**6 + place for place in range(num_blocks)], 2.0)
    assert cache.pool.num_retained == 0


def test_a_request_may_ask_to_keep_its_prefix() -> None:
    """Through the scheduler: a conversation that is kept outlives other work of its own tenant, until its time."""
    bench = Bench(limits(num_blocks=16, max_batch_tokens=64, retained_share=0.6))
    prompt = list(range(17))
    kept = dataclasses.replace(bench.request(prompt, 2), retain_prefix_s=500.0)
    bench.submit(kept)
    bench.run()
    found = []
    for now in (50.0, 1000.0):
        bench.now = now
        for number in range(20):
            bench.submit(bench.request([20 + number % 10, *[number] * 20], 2))
            bench.run()
        bench.submit(bench.request(prompt, 2))
        bench.run()
        found.append(bench.ended[len(bench.requests) - 1].cached_prompt_tokens)
    assert found == [16, 0]
