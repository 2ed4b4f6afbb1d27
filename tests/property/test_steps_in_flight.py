"""Steps launched before the one before is settled: every request gives what it gives alone, step after step."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pawl_server.engine.books import Books
from pawl_server.engine.executor import InProcessExecutor
from pawl_server.engine.link.outbox import Outbox
from pawl_server.engine.loop import EngineLoop
from pawl_server.engine.meter import Meter
from pawl_server.engine.watchdog import Watchdog
from pawl_server.internal.v1 import engine_pb2
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.metrics import EngineMetrics
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.committer import Committed, commit, launch
from pawl_server.scheduler.endings import EndReason
from pawl_server.scheduler.invariants import check_invariants
from pawl_server.scheduler.plan import Plan
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.errors import PlanError
from pawl_workers.kernels import cpu
from pawl_workers.pending import Arrival, PendingStep
from pawl_workers.pipeline import Pipeline
from pawl_workers.plan import SamplingSpec, StepPlan
from pawl_workers.row_masks import RowMasks
from pawl_workers.rows import RowTable
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import EOS_TOKEN_ID, VOCAB_SIZE, make_llama
from tests.fakes.queueing_sampler import QueueingCpuSampler
from tests.fakes.told import Told
from tests.fakes.worker_driver import WorkerDriver

POISON = 77  # whoever computes this token is not finite from there on; it is sampled now and then
NUM_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class Workers:
    plain: Worker
    queueing: Worker


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Workers:
    folder = make_llama(tmp_path_factory.mktemp("llama"), max_position_embeddings=256)
    plain = _load(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CpuSampler", QueueingCpuSampler)
        queueing = _load(folder)
    assert (plain.facts.max_in_flight, queueing.facts.max_in_flight) == (1, 2)
    return Workers(plain, queueing)


def _load(folder: Path) -> Worker:
    worker = Worker.load(
        WorkerOptions(
            model=str(folder), kernels="cpu", max_running=6, max_batch_tokens=48, num_blocks=NUM_BLOCKS, num_threads=1
        )
    )
    with torch.inference_mode():
        worker._weights.embedding.tokens[POISON] = torch.nan
    return worker


def _sampling(draw: random.Random, seed: int) -> SamplingSpec:
    return draw.choice(
        [
            SamplingSpec(temperature=0.0),
            SamplingSpec(temperature=1.0, seed=seed),
            SamplingSpec(temperature=1.3, top_k=30, top_p=0.9, seed=seed),
            SamplingSpec(temperature=1.0, seed=seed, presence_penalty=1.0, repetition_penalty=1.2),
            SamplingSpec(temperature=0.0, frequency_penalty=0.8),
            SamplingSpec(temperature=1.0, seed=seed, logit_bias={5: 3.0, POISON: 4.0}),
            SamplingSpec(temperature=1.0, seed=seed, min_output_tokens=4, suppressed_ids=(EOS_TOKEN_ID,)),
            SamplingSpec(temperature=1.0, seed=seed, logprobs=2),
        ]
    )


def _words(handle: Hashable, output: list[int]) -> NDArray[np.uint32]:
    """What a request with a grammar may choose after some output, which depends on all of it."""
    allowed = np.array([(token_id + sum(output)) % 3 > 0 for token_id in range(-(-VOCAB_SIZE // 32) * 32)])
    return np.packbits(allowed, bitorder="little").view(np.uint32) if _is_masked(handle) else FREE


def _is_masked(handle: Hashable) -> bool:
    return isinstance(handle, int) and handle % 3 == 1


FREE = np.full(-(-VOCAB_SIZE // 32), 0xFFFFFFFF, dtype=np.uint32)


def _requests(draw: random.Random) -> list[SequenceRequest]:
    shared = [draw.randrange(70) for _ in range(40)]
    if draw.random() < 0.2:
        shared[draw.randrange(40)] = POISON  # whoever shares what it spoils is not given it
    requests = []
    for handle in range(draw.randint(4, 12)):
        prompt = [draw.randrange(70) for _ in range(draw.choice([1, 4, 31, 33, 70]))]
        if draw.random() < 0.3:
            prompt = shared + prompt[:10]
        if draw.random() < 0.05:
            prompt[-1] = POISON
        sampling = _sampling(draw, handle)
        request = SequenceRequest(
            handle=handle, request_id=str(handle), prompt_ids=prompt, sampling=sampling, cache_key=b"",
            max_output_tokens=draw.randint(1, 30), min_output_tokens=sampling.min_output_tokens,
            eos_token_ids=frozenset(range(EOS_TOKEN_ID - 10, VOCAB_SIZE)) if draw.random() < 0.5 else frozenset(),
            prompt_logprobs=1 if draw.random() < 0.1 else -1,
        )  # fmt: skip
        requests.append(request)
    return requests


def _limits(worker: Worker, draw: random.Random) -> SchedulerLimits:
    facts = worker.facts
    return SchedulerLimits(
        num_blocks=facts.num_blocks, block_size=facts.block_size, max_running=facts.max_running,
        max_batch_tokens=facts.max_batch_tokens, max_context=facts.max_context, watermark=0.0,
        max_prefill_chunk=draw.choice([7, 16, 48]), prefix_cache=draw.random() < 0.7,
    )  # fmt: skip


class Served:
    """Scheduler and worker, with so many steps in flight."""

    def __init__(self, worker: Worker, depth: int, draw: random.Random, epoch: int) -> None:
        self._limits = _limits(worker, draw)
        self._worker, self._depth, self._draw = worker, depth, draw
        worker.reset(epoch)
        root = CacheRoot("m", "float32", self._limits.block_size)
        self._state = SchedulerState(self._limits, root, epoch=epoch)
        self._in_flight: deque[tuple[Plan, PendingStep]] = deque()
        self.told: dict[object, Told] = {}
        self.num_preempted = 0
        self.num_overlapped = 0

    def run(self, requests: list[SequenceRequest]) -> None:
        waiting = list(requests)
        step = 0
        while waiting or self._in_flight or self._state.has_work():
            step += 1
            while waiting and (self._draw.random() < 0.4 or not (self._in_flight or self._state.has_work())):
                request = waiting.pop(0)
                self.told[request.handle] = Told()
                assert self._state.submit(request, float(step)) is None
            if self._draw.random() < 0.04:
                handle = self._draw.choice(sorted(self.told, key=str)) if self.told else None
                if (ended := self._state.abort(handle, "cancelled", float(step))) is not None:
                    self.told[handle].reason = ended.reason
            self._tick(float(step))
        check_invariants(self._state)

    def _tick(self, now: float) -> None:
        plan = plan_step(self._state, self._limits, now) if len(self._in_flight) < self._depth else None
        if plan is not None:
            wire = plan.wire()
            launch(self._state, plan)
            handles = [one.request.handle for one in self._state.ledger[-1].members(self._state.slots)]
            masks = partial(self._masks, wire.rows, handles, now) if any(_is_masked(one) for one in handles) else None
            self.num_overlapped += bool(self._in_flight)
            step = self._worker.launch(wire, masks)
            self._in_flight.append((plan, step))
        if self._in_flight and (plan is None or len(self._in_flight) == self._depth or self._draw.random() < 0.2):
            self._commit_oldest(now)

    def _masks(self, rows: list[int], handles: list[Hashable], now: float) -> RowMasks:
        """Asked for when the steps before are settled: they are committed first."""
        while self._in_flight:
            assert self._in_flight[0][1].future.done()
            self._commit_oldest(now)
        return RowMasks(rows, np.stack([_words(handle, self.told[handle].tokens) for handle in handles]))

    def _commit_oldest(self, now: float) -> None:
        plan, step = self._in_flight.popleft()
        self._hear(commit(self._state, plan, step.result(), now))

    def _hear(self, committed: Committed) -> None:
        self.num_preempted += committed.num_preempted
        logprobs = committed.logprobs or [None] * len(committed.handles)
        for handle, token_id, entry in zip(committed.handles, committed.token_ids, logprobs, strict=True):
            self.told[handle].tokens.append(token_id)
            self.told[handle].logprobs.append(entry)
        for handle, scored in committed.prompt_logprobs:
            self.told[handle].prompt += scored.positions
        for ended in committed.ended:
            self.told[ended.handle].reason = ended.reason


def _alone(driver: WorkerDriver, request: SequenceRequest) -> Told:
    """Token by token, nobody beside it, every step settled: the oracle."""
    one = driver.start(request.prompt_ids, request.sampling, prompt_logprobs=request.prompt_logprobs)
    reason = None
    while reason is None:
        masks = RowMasks([one.row], _words(request.handle, one.output)[None, :])
        driver.step([(one, len(one.token_ids) - one.num_computed)], masks=lambda masks=masks: masks)  # type: ignore[misc]
        count = len(one.output)
        if one.failure is not None:
            reason = EndReason.FAILED
        elif one.output[-1] in request.eos_token_ids and count > request.min_output_tokens:
            reason = EndReason.EOS
        elif count == request.max_output_tokens:
            reason = EndReason.MAX_TOKENS
    driver.finish(one)
    prompt = [entry for scored in one.prompt for entry in scored.positions]
    return Told(one.output, one.logprobs, prompt, reason)


def run_schedule(workers: Workers, seed: int) -> Served:
    """A drawn schedule on the worker that keeps two steps in flight, compared with each request alone."""
    draw = random.Random(seed)
    requests = _requests(draw)
    served = Served(workers.queueing, 2, draw, epoch=1)
    served.run(requests)
    driver = WorkerDriver(workers.plain)
    driver.reset()
    for request in requests:
        found, wanted = served.told[request.handle], _alone(driver, request)
        if found.reason is EndReason.ABORTED:
            count = len(found.tokens)
            assert found.tokens == wanted.tokens[:count]
            assert found.logprobs == wanted.logprobs[:count]
        else:
            assert (found.tokens, found.reason) == (wanted.tokens, wanted.reason)
            assert found.logprobs == wanted.logprobs
            assert found.prompt == wanted.prompt or found.reason is EndReason.FAILED
    return served


def run_schedules(workers: Workers, count: int) -> list[Served]:
    """Some of them, from the first."""
    return [run_schedule(workers, seed) for seed in range(count)]


@given(st.integers(0, 1 << 32))
def test_requests_give_what_they_give_alone(workers: Workers, seed: int) -> None:
    """Joins, ends, aborts, preemptions, chunks, rows that fail, and rows whose logits need the host."""
    run_schedule(workers, seed)


def test_the_schedules_reach_what_they_are_meant_to_reach(workers: Workers) -> None:
    served = run_schedules(workers, 20)
    reasons = {told.reason for one in served for told in one.told.values()}
    assert reasons >= {EndReason.FAILED, EndReason.EOS, EndReason.MAX_TOKENS, EndReason.ABORTED}
    assert sum(one.num_preempted for one in served) > 0
    assert sum(one.num_overlapped for one in served) > 100


async def test_an_engine_gives_what_requests_give_alone(workers: Workers) -> None:
    """The loop, the executor's two threads and the worker, two steps in flight; nobody waits for a step's commit."""
    draw = random.Random(5)
    requests = [one for _ in range(4) for one in _requests(draw)]
    requests = [replace(one, handle=(1, index), prompt_logprobs=-1) for index, one in enumerate(requests)]
    executor, watchdog, outbox = InProcessExecutor(), Watchdog(60.0), Outbox(1)
    worker = await executor.load(lambda: workers.queueing)
    limits = _limits(workers.queueing, draw)
    worker.reset(1)
    state = SchedulerState(limits, CacheRoot("m", "float32", limits.block_size))
    books = Books(state, Meter(EngineMetrics("m", 0)))
    loop = EngineLoop(state, executor, watchdog, books, depth=worker.facts.max_in_flight)
    loop.attach(outbox)
    for request in requests:
        loop.submit(request)
    running = asyncio.create_task(loop.run())
    tokens: dict[int, list[int]] = {index: [] for index in range(len(requests))}
    failed: dict[int, bool] = {}
    while len(failed) < len(requests):
        for frame in await asyncio.wait_for(outbox.take(), 60):
            for handle, token_id in zip(frame.tokens.handles, frame.tokens.token_ids, strict=True):
                tokens[handle].append(token_id)
            if frame.HasField("end"):
                failed[frame.end.handle] = frame.end.reason == engine_pb2.END_REASON_FAILED
    loop.stop()
    await running
    watchdog.close()
    await executor.close()
    driver = WorkerDriver(workers.plain)
    driver.reset()
    for index, request in enumerate(requests):
        wanted = _alone(driver, request)
        assert (tokens[index], failed[index]) == (wanted.tokens, wanted.reason is EndReason.FAILED)


_insert, _send, _apply = QueueingCpuSampler.insert, Arrival.send, RowTable.apply


def _insert_of_the_step_before(sampler: QueueingCpuSampler, token_ids: Tensor, chosen: Tensor) -> None:
    """Ids come from the step before the one in flight."""
    earlier = getattr(sampler, "earlier", chosen)
    sampler.earlier = chosen  # type: ignore[attr-defined]
    _insert(sampler, token_ids, earlier if len(earlier) >= len(chosen) else chosen)


def _send_to_one_buffer(arrival: Arrival, tensors: Sequence[Tensor]) -> None:
    """The ids of a step lie where the step after it puts its own."""
    arrival._buffers[:1] = [_ONE_BUFFER]
    _send(arrival, tensors)


_ONE_BUFFER = torch.empty(64, dtype=torch.int32)


def _never(*_: object) -> bool:
    """Penalties do not see the last token."""
    return False


def _apply_without_a_trace(table: RowTable, plan: StepPlan) -> None:
    """A row that was freed is not told from the one it was."""
    _apply(table, plan)
    table.generation[:] = 0


@pytest.mark.parametrize(
    ("owner", "name", "bug"),
    [
        (QueueingCpuSampler, "insert", _insert_of_the_step_before),
        (Arrival, "send", _send_to_one_buffer),
        (Pipeline, "choice_must_wait", _never),
        (RowTable, "apply", _apply_without_a_trace),
    ],
)
def test_a_planted_bug_is_caught(
    workers: Workers, owner: type, name: str, bug: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises((AssertionError, PlanError)):
        run_schedules(workers, 60)
