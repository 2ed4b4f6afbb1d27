"""Generated traces of the whole scheduler, with all that can happen to it at once, and what each of them reached."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pawl_server.kv.host_tier import RestoreCost
from pawl_server.scheduler.decisions import Decision, decode
from pawl_server.scheduler.endings import EndReason
from pawl_server.scheduler.invariants import check_invariants
from pawl_server.scheduler.journal import Journal, Launched, Reset, Settled, Voided, read_events
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_workers.plan import StepPlan
from tests.fakes.mirrored_pool import MirroredPool
from tests.fakes.scheduler_bench import Bench, make_limits, random_request

__all__ = ["FEATURES", "MIXED", "Trace", "play"]

FEATURES = (
    "chunks", "hits", "shared while computed", "preempted: decode", "preempted: priority", "drafts", "accepted",
    "rejected", "overlap", "drafts beside prompts", "forks", "copies", "aborted while waiting", "aborted in flight",
    "late tokens", "failed rows", "started again", "lost workers", "swapped in", "flushes", "kept", "bypassed",
    "grammar", "scored prompts", "attempts given up",
)  # fmt: skip
MIXED = ("chunks", "hits", "preempted", "drafts", "overlap", "forks", "aborted")  # in one and the same trace


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace that was run to its end.

    Attributes:
        pool: mirrored by the naive cache model.
        journal: of all that happened.
        reached: how often each of `FEATURES` and `MIXED` occurred.
    """

    bench: Bench
    pool: MirroredPool
    journal: bytes
    reached: Counter[str]


def _make_bench(draw: random.Random) -> Bench:
    """A replica with everything turned on, in two of three; any other in the third."""
    made = make_limits(draw)
    swaps = draw.random() < 0.3
    cost = RestoreCost(fixed_s=0.0, block_s=1e-6, token_s=1.0, block_size=made.block_size)
    limits = dataclasses.replace(
        made,
        num_blocks=draw.randint(4, 16),
        num_host_blocks=draw.randint(1, 12) if swaps else 0,
        restore_cost=cost if swaps else None,
        retained_share=0.5,
    )
    if draw.random() < 0.33:
        return Bench(limits, depth=draw.randint(1, 3))
    limits = dataclasses.replace(
        limits,
        num_blocks=draw.randint(20, 40) // made.block_size,
        max_running=max(4, made.max_running),
        max_batch_tokens=max(12, made.max_batch_tokens),
        max_bypass=draw.randint(0, 1),
        max_prefill_chunk=min(8, made.max_prefill_chunk),
        prefix_cache=True,
        max_drafts=max(2, made.max_drafts),
        preempt_below=1,
        output_quantile=0.0,
    )
    return Bench(limits, depth=draw.randint(2, 3))


def _request(bench: Bench, draw: random.Random) -> SequenceRequest:
    request = random_request(bench, draw)
    constrained = draw.random() < 0.1  # which keeps it from drafting
    urgent = draw.random() < 0.2  # so that somebody is to give way while others draft
    return dataclasses.replace(
        request,
        priority=2 if urgent else request.priority,
        tenant="ab"[request.cache_key[0]],
        weight=draw.choice([1.0, 2.0]),
        retain_prefix_s=draw.choice([0.0, 0.0, 0.0, 20.0]),
        constraint=True if constrained else None,
    )


def play(seed: int, check: Callable[[Bench], None] = lambda bench: check_invariants(bench.state)) -> Trace:
    """Run the trace of a seed: arrivals at any time, chunks, cached and shared prefixes, a host tier, classes, tenants,
    samples, drafts, up to three steps in flight, aborts, rows that fail, lost workers; then what is left to its end.

    The worker compares every KV slot that it reads and rebuilds tables from the plans' differences (invariants 37 and
    38), every lookup and the order of eviction are compared with the naive cache model (40), and all output is compared
    with that of each request alone.
    """
    draw = random.Random(seed)
    bench = _make_bench(draw)
    pool = MirroredPool(bench.state)
    journal = bench.state.journal = Journal(bench.limits)
    reached: Counter[str] = Counter()
    if draw.random() < 0.2:
        bench.worker.fault = lambda plan: [row for row in plan.rows if draw.random() < 0.02]
    for _ in range(draw.randint(4, 9)):
        request = _request(bench, draw)
        if bench.submit(request):
            reached["grammar"] += request.constraint is not None
            reached["kept"] += request.retain_prefix_s > 0
        for _ in range(draw.randint(0, 3)):
            bench.step()
        _interfere(bench, draw, reached)
        check(bench)
    bench.run()
    _check_end(bench)
    data = journal.drain()
    _count(bench, data, reached)
    return Trace(bench, pool, data, reached)


def _interfere(bench: Bench, draw: random.Random, reached: Counter[str]) -> None:
    kind = draw.random()
    if kind < 0.2 and bench.requests:
        handle = draw.choice(list(bench.requests))
        for sample in bench.state.siblings(handle) if draw.random() < 0.3 else [handle]:
            ended = bench.state.abort(sample, "cancelled", bench.now)
            if ended is not None:
                bench.finish(ended)
                in_flight = any(sample in owners.values() for owners in bench.owners)
                reached["aborted in flight" if in_flight else "aborted while waiting"] += 1
    elif kind < 0.24:
        bench.lose_worker()
        reached["lost workers"] += 1
    elif kind < 0.28:
        bench.state.flush_prefix_cache()
        reached["flushes"] += 1


def _check_end(bench: Bench) -> None:
    assert set(bench.ended) == set(bench.requests)
    for handle, request in bench.requests.items():
        bench.check_output(handle)
        ended = bench.ended[handle]
        if ended.reason is EndReason.MAX_TOKENS:
            assert ended.output_tokens == request.max_output_tokens == len(bench.output[handle])
        elif ended.reason is EndReason.EOS:
            assert bench.output[handle][-1] == 5
            assert 5 not in bench.output[handle][:-1]
        if request.prompt_logprobs >= 0 and ended.reason not in (EndReason.ABORTED, EndReason.FAILED):
            assert bench.scored.get(handle, 1) == len(request.prompt_ids)
        assert min(ended.prefill_s, ended.decode_s, ended.stalled_s) >= 0
    counts = bench.state.counts()
    assert counts.free_blocks + counts.cached_blocks == bench.limits.num_blocks
    assert (counts.running, counts.waiting, counts.used_blocks) == (0, 0, 0)
    assert not bench.state.live
    assert not bench.state.ledger


def _count(bench: Bench, data: bytes, reached: Counter[str]) -> None:
    """What the trace reached, from what was decided, sent and recorded."""
    for decision in map(decode, bench.state.decisions.records()):
        _count_decision(decision, reached)
    for plan in bench.log:
        assert isinstance(plan, StepPlan)
        reached["copies"] += len(plan.copies)
        reached["swapped in"] += len(plan.swap_in)
    in_flight = 0
    for event in read_events(data):
        if isinstance(event, Launched):
            reached["overlap"] += in_flight > 0
            reached["attempts given up"] += max(0, len(event.drafts) - 1)
            in_flight += 1
        elif isinstance(event, Settled | Voided):
            in_flight -= 1
        elif isinstance(event, Reset):
            assert in_flight == 0
    reached["drafts"] += bench.num_drafts
    reached["accepted"] += bench.num_accepted
    reached["rejected"] += bench.num_drafts - bench.num_accepted
    reached["drafts beside prompts"] += bench.num_mixed
    reached["late tokens"] += bench.num_late
    reached["started again"] += bench.num_requeued
    reached["shared while computed"] += bench.num_shared_pending
    reached["failed rows"] += sum(ended.reason is EndReason.FAILED for ended in bench.ended.values())
    reached["scored prompts"] += len(bench.scored)
    reached["preempted"] = sum(reached[f"preempted: {why}"] for why in ("decode", "priority", "progress"))
    reached["aborted"] = reached["aborted in flight"] + reached["aborted while waiting"]


def _count_decision(decision: Decision, reached: Counter[str]) -> None:
    reached["chunks"] += len(decision.prefills)  # of prompts that were begun before
    reached["hits"] += sum(num_cached > 0 for _, _, num_cached, _ in decision.started)
    for _, reason, _ in decision.preempted:
        reached[f"preempted: {reason}"] += 1
    reached["forks"] += len(decision.forked)
    reached["bypassed"] += len(decision.unfit)
