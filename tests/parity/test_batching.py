"""Batching changes nothing: whatever arrives when, each request gives the tokens it gives alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pawl_server.kv.block_hash import CacheRoot
from pawl_server.kv.host_tier import RestoreCost
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.invariants import check_invariants
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import SamplingSpec
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama

VOCAB = 257
NUM_REQUESTS = 64


class InProcess:
    """Scheduler and worker, step after step, with arrivals in between."""

    def __init__(self, worker: Worker, limits: SchedulerLimits, epoch: int) -> None:
        self.worker = worker
        self.limits = limits
        self.epoch = epoch
        self.num_preempted = 0
        self.num_cached = 0
        self.num_restored = 0

    def run(self, arrivals: list[tuple[int, SequenceRequest]]) -> dict[object, list[int]]:
        """Tokens by handle; each request arrives before the step it names."""
        self.worker.reset(self.epoch)
        state = SchedulerState(self.limits, CacheRoot("m", "float32", self.limits.block_size), epoch=self.epoch)
        output: dict[object, list[int]] = {request.handle: [] for _, request in arrivals}
        pending = sorted(arrivals, key=lambda arrival: arrival[0], reverse=True)
        step = 0
        while pending or state.has_work():
            while pending and (pending[-1][0] <= step or not state.has_work()):
                assert state.submit(pending.pop()[1], float(step)) is None
            plan = plan_step(state, self.limits, float(step))
            step += 1
            if plan is None:
                continue
            wire = plan.wire()
            self.num_restored += len(wire.swap_in)
            launch(state, plan)
            committed = commit(state, plan, self.worker.execute(wire), float(step))
            self.num_preempted += committed.num_preempted
            self.num_cached += committed.num_prompt_cached
            for handle, token_id in zip(committed.handles, committed.token_ids, strict=True):
                output[handle].append(token_id)
            if step % 16 == 0:
                check_invariants(state)
        counts = state.counts()
        assert counts.free_blocks + counts.cached_blocks == self.limits.num_blocks
        return output


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = make_llama(tmp_path_factory.mktemp("llama"), max_position_embeddings=512)
    return Worker.load(
        WorkerOptions(
            model=str(folder), num_threads=1, max_running=16, max_batch_tokens=64, num_blocks=12, host_kv_bytes=1 << 20
        )
    )


def draw_requests(seed: int) -> list[tuple[int, SequenceRequest]]:
    """Mixed lengths, a third with a shared beginning, greedy and sampled with penalties, arriving at random."""
    draw = random.Random(seed)
    shared = [draw.randrange(VOCAB) for _ in range(70)]
    arrivals = []
    for handle in range(NUM_REQUESTS):
        prompt = [draw.randrange(VOCAB) for _ in range(draw.choice([1, 5, 33, 90, 150]))]
        if draw.random() < 0.35:
            prompt = shared + prompt[:40]
        sampling = SamplingSpec(temperature=0.0)
        if draw.random() < 0.5:
            sampling = SamplingSpec(
                temperature=0.9, top_k=draw.choice([0, 20]), top_p=0.95, seed=handle, presence_penalty=0.4,
                repetition_penalty=1.1,
            )  # fmt: skip
        request = SequenceRequest(
            handle=handle, request_id=str(handle), prompt_ids=prompt, sampling=sampling,
            max_output_tokens=draw.randint(1, 40), cache_key=b"tenant",
        )  # fmt: skip
        arrivals.append((draw.randrange(120), request))
    return arrivals


def test_blocks_that_went_to_the_host_change_nothing(worker: Worker) -> None:
    """The same requests over a second tier that always pays: what comes back is what was computed."""
    facts = worker.facts
    assert facts.num_host_blocks > 16
    tight = SchedulerLimits(
        num_blocks=facts.num_blocks, block_size=facts.block_size, max_running=16, max_batch_tokens=64,
        max_context=facts.max_context, max_prefill_chunk=24, watermark=0.0,
    )  # fmt: skip
    arrivals = draw_requests(11)
    plain = InProcess(worker, tight, epoch=100).run(arrivals)
    cost = RestoreCost(fixed_s=0.0, block_s=0.0, token_s=1.0, block_size=facts.block_size)
    tiered = InProcess(worker, replace(tight, num_host_blocks=facts.num_host_blocks, restore_cost=cost), epoch=101)
    assert tiered.run(arrivals) == plain
    assert tiered.num_restored > 0


def test_64_requests_give_what_they_give_alone(worker: Worker) -> None:
    """Chunked prefill, a pool so small that it preempts, the prefix cache on."""
    facts = worker.facts
    tight = SchedulerLimits(
        num_blocks=facts.num_blocks, block_size=facts.block_size, max_running=16, max_batch_tokens=64,
        max_context=facts.max_context, max_prefill_chunk=24, watermark=0.0,
    )  # fmt: skip
    arrivals = draw_requests(7)
    batched = InProcess(worker, tight, epoch=2)
    together = batched.run(arrivals)
    assert batched.num_preempted > 0, "the pool was meant to be too small"
    assert batched.num_cached > 0, "prefixes were meant to be shared"
    alone = InProcess(worker, replace(tight, prefix_cache=False, max_prefill_chunk=64), epoch=3)
    for index, (_, request) in enumerate(arrivals):
        alone.epoch = 3 + index
        assert alone.run([(0, request)])[request.handle] == together[request.handle], request.request_id
