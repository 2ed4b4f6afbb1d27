"""The ratchet without sockets: events in, frames in the outbox out."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from pawl_server.engine.books import Books
from pawl_server.engine.executor import InProcessExecutor
from pawl_server.engine.link.frames import to_request
from pawl_server.engine.link.outbox import Outbox
from pawl_server.engine.loop import EngineLoop
from pawl_server.engine.meter import Meter
from pawl_server.engine.watchdog import Watchdog
from pawl_server.internal.v1 import engine_pb2
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.metrics import EngineMetrics
from pawl_server.scheduler.admission import Refusal, SchedulerLimits
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from tests.fakes.engine_harness import expected_output, sample_seed, submit_frame
from tests.fakes.engine_worker import DELAYED_POISON, POISON, VOCAB_SIZE, FakeEngineWorker
from tests.fakes.late_worker import LateWorker

LIMITS = SchedulerLimits(num_blocks=64, block_size=4, max_running=4, max_batch_tokens=16, max_context=64)


class Tripping(SchedulerState):
    """A scheduler with a defect: it trips over one request id."""

    def submit(self, request: SequenceRequest, now: float) -> Refusal | None:
        if request.request_id == "request-13":
            raise ZeroDivisionError
        return super().submit(request, now)


@contextlib.asynccontextmanager
async def _loop(depth: int = 1, worker: FakeEngineWorker | None = None) -> AsyncIterator[EngineLoop]:
    executor, watchdog = InProcessExecutor(), Watchdog(60.0)
    await executor.load(lambda: worker or FakeEngineWorker())
    state = Tripping(LIMITS, CacheRoot("m", "float32", 4))
    books = Books(state, Meter(EngineMetrics("m", 0)), check_every=1)
    try:
        yield EngineLoop(state, executor, watchdog, books, depth=depth)
    finally:
        watchdog.close()
        await executor.close()


def _request(
    handle: int, prompt: list[int], num_output: int, *, seed: int = 0, samples: tuple[int, ...] = ()
) -> SequenceRequest:
    submit = submit_frame(prompt, num_output, seed=seed, sample_handles=samples)
    return to_request(submit, (1, handle), VOCAB_SIZE)


async def _take(outbox: Outbox) -> tuple[list[tuple[int, int]], list[engine_pb2.End]]:
    frames = await outbox.take()
    tokens = [pair for frame in frames for pair in zip(frame.tokens.handles, frame.tokens.token_ids, strict=True)]
    return tokens, [frame.end for frame in frames if frame.HasField("end")]


async def test_a_scheduler_that_contradicts_itself_is_told_of_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """The checks of `check_every` in a server: whoever is served must not suffer for them."""
    async with _loop() as loop:
        outbox = Outbox(1)
        loop.attach(outbox)
        loop.submit(_request(1, [5, 6], 3))
        await loop.tick()
        assert not caplog.records
        loop.state.num_parked += 1
        await loop.tick()
        assert [record.getMessage() for record in caplog.records] == ["after step 2 the scheduler contradicts itself"]
        assert "the counter of parked sequences is off" in caplog.text
        loop.state.num_parked -= 1
        await loop.tick()
        tokens, ends = await _take(outbox)
        assert [token_id for _, token_id in tokens] == expected_output([5, 6], 3)
        assert [end.reason for end in ends] == [engine_pb2.END_REASON_MAX_TOKENS]
        assert len(caplog.records) == 1


async def test_one_tick_is_one_step() -> None:
    async with _loop() as loop:
        outbox = Outbox(1)
        loop.attach(outbox)
        loop.submit(_request(1, [5, 6], 2))
        whole = expected_output([5, 6], 2)
        await loop.tick()
        assert await _take(outbox) == ([(1, whole[0])], [])
        await loop.tick()
        tokens, (end,) = await _take(outbox)
        assert tokens == [(1, whole[1])]
        assert end.reason == engine_pb2.END_REASON_MAX_TOKENS
        assert loop.num_steps == 2


async def test_an_abort_takes_effect_at_the_next_tick_and_frees_the_blocks() -> None:
    async with _loop() as loop:
        outbox = Outbox(1)
        loop.attach(outbox)
        loop.submit(_request(1, [5, 6], 20))
        loop.submit(_request(2, [7], 20))
        await loop.tick()
        await outbox.take()
        loop.abort([(1, 1)], "cancelled")
        loop.abort([(1, 1)], "cancelled")
        await loop.tick()
        tokens, (end,) = await _take(outbox)
        assert [handle for handle, _ in tokens] == [2]
        assert (end.handle, end.reason, end.output_tokens) == (1, engine_pb2.END_REASON_ABORTED, 1)
        assert len(loop.describe()) == 1


async def test_a_connection_that_is_gone_leaves_nothing() -> None:
    async with _loop() as loop:
        gone, stays = Outbox(1), Outbox(2)
        loop.attach(gone)
        loop.attach(stays)
        for handle in range(1, 4):
            gone.handles.add(handle)
            loop.submit(_request(handle, [handle], 20))
        loop.submit(to_request(submit_frame([9], 3), (2, 1), VOCAB_SIZE))
        await loop.tick()
        loop.detach(gone)
        for _ in range(2):
            await loop.tick()
        tokens, ends = await _take(stays)
        assert [token for _, token in tokens] == expected_output([9], 3)
        assert len(ends) == 1
        assert loop.state.counts().used_blocks == 0


async def test_a_defect_of_the_scheduler_costs_one_request(caplog: pytest.LogCaptureFixture) -> None:
    async with _loop() as loop:
        outbox = Outbox(1)
        loop.attach(outbox)
        loop.submit(_request(1, [5], 3, seed=13))
        loop.submit(_request(2, [5], 1))
        await loop.tick()
        tokens, ends = await _take(outbox)
        assert tokens == [(2, expected_output([5], 1)[0])]
        assert [(end.handle, end.reason) for end in ends] == [
            (1, engine_pb2.END_REASON_REFUSED),
            (2, engine_pb2.END_REASON_MAX_TOKENS),
        ]
        assert (ends[0].error.code, ends[0].error.reason) == ("internal", "SCHEDULER_FAILED")
    assert "request-13" in caplog.text


async def test_it_sleeps_without_work_and_wakes_for_it() -> None:
    async with _loop() as loop:
        outbox = Outbox(1)
        loop.attach(outbox)
        running = asyncio.create_task(loop.run())
        for _ in range(50):
            await asyncio.sleep(0)
        assert loop.num_steps == 0
        await outbox.take()
        loop.submit(_request(1, [5], 1))
        tokens, _ = await asyncio.wait_for(_take(outbox), 20)
        assert tokens == [(1, expected_output([5], 1)[0])]
        assert not loop.stopped.is_set()
        loop.stop()
        await asyncio.wait_for(running, 20)
        assert loop.stopped.is_set()


async def test_with_two_steps_in_flight_the_next_is_launched_before_the_first_is_settled() -> None:
    worker = FakeEngineWorker()
    worker.gate = threading.Event()
    async with _loop(2, worker) as loop:
        outbox = Outbox(1)
        loop.attach(outbox)
        loop.submit(_request(1, [5, 6], 3))
        await loop.tick()
        tick = asyncio.create_task(loop.tick())
        while len(loop.state.ledger) < 2:
            await asyncio.sleep(0)
        worker.gate.set()
        await tick
        assert [token for _, token in (await _take(outbox))[0]] == expected_output([5, 6], 1)
        assert len(loop.state.ledger) == 1


async def _run_to_the_end(loop: EngineLoop) -> None:
    await loop.tick()
    while loop.state.has_work() or loop.state.ledger:
        await loop.tick()


@pytest.mark.parametrize(
    ("depth", "kind"), [(1, FakeEngineWorker), (2, FakeEngineWorker), (1, LateWorker), (2, LateWorker)]
)
async def test_aborts_and_a_crash_change_nothing_for_the_others(depth: int, kind: type[FakeEngineWorker]) -> None:
    """One crashes the worker whenever it starts, one in mid-output; one is aborted, perhaps while in flight."""
    async with _loop(depth, kind()) as loop:
        outbox = Outbox(1)
        loop.attach(outbox)
        prompts = {1: [5, 6], 2: [POISON, 1], 3: [7] * 9, 4: [DELAYED_POISON, 6], 5: [9]}
        for handle, prompt in prompts.items():
            loop.submit(_request(handle, prompt, 8))
        for _ in range(3):
            await loop.tick()
        loop.abort([(1, 5)], "cancelled")
        await _run_to_the_end(loop)
        tokens, ends = await _take(outbox)
        reasons = {end.handle: end.reason for end in ends}
        assert sorted(reasons) == sorted(prompts), "everybody ends exactly once"
        assert len(ends) == len(prompts)
        for handle in (1, 3):
            assert reasons[handle] == engine_pb2.END_REASON_MAX_TOKENS
            assert [token for own, token in tokens if own == handle] == expected_output(prompts[handle], 8)
        assert reasons[2] == reasons[4] == engine_pb2.END_REASON_FAILED
        assert loop.state.counts().used_blocks == 0


@pytest.mark.parametrize("depth", [1, 2])
async def test_the_samples_of_a_request_end_one_by_one_or_all_at_once(depth: int) -> None:
    """One is aborted by itself, then a whole group between two steps; a group that never fits is refused whole."""
    async with _loop(depth) as loop:
        outbox = Outbox(1)
        loop.attach(outbox)
        loop.submit(_request(1, [5, 6, 7, 8, 9], 6, samples=(2, 3)))
        loop.submit(_request(10, [5], 6, samples=(11, 12, 13, 14)))
        for _ in range(3):
            await loop.tick()
        loop.abort([(1, 2)], "stop_string")
        await _run_to_the_end(loop)
        tokens, ends = await _take(outbox)
        reasons = {end.handle: end.reason for end in ends}
        assert reasons == {
            1: engine_pb2.END_REASON_MAX_TOKENS, 2: engine_pb2.END_REASON_ABORTED, 3: engine_pb2.END_REASON_MAX_TOKENS,
            **dict.fromkeys(range(10, 15), engine_pb2.END_REASON_REFUSED),
        }  # fmt: skip
        for handle, index in ((1, 0), (3, 2)):
            wanted = expected_output([5, 6, 7, 8, 9], 6, seed=sample_seed(0, index))
            assert [token for own, token in tokens if own == handle] == wanted
        loop.submit(_request(21, [4] * 30, 30, samples=(22, 23, 24)))
        for _ in range(4):
            await loop.tick()
        loop.abort([(1, handle) for handle in range(21, 25)], "cancelled")
        loop.submit(_request(30, [3], 1))
        await _run_to_the_end(loop)
        assert loop.state.counts().used_blocks == 0
        assert {end.handle for end in (await _take(outbox))[1]} == {21, 22, 23, 24, 30}


async def test_one_prompt_that_crashes_the_worker_fails_all_its_samples() -> None:
    """And nobody else, after two crashes and not after two for each sample."""
    async with _loop() as loop:
        outbox = Outbox(1)
        loop.attach(outbox)
        loop.submit(_request(1, [5, 6], 8))
        loop.submit(_request(2, [POISON, 1], 8, samples=(3, 4)))
        await _run_to_the_end(loop)
        tokens, ends = await _take(outbox)
        assert {end.handle: end.reason for end in ends} == {
            1: engine_pb2.END_REASON_MAX_TOKENS, **dict.fromkeys((2, 3, 4), engine_pb2.END_REASON_FAILED)
        }  # fmt: skip
        assert [token for _, token in tokens] == expected_output([5, 6], 8)
        assert loop.state.epoch <= 4


async def test_stop_settles_what_is_in_flight() -> None:
    async with _loop(2) as loop:
        outbox = Outbox(1)
        loop.attach(outbox)
        loop.submit(_request(1, [5, 6], 50))
        running = asyncio.create_task(loop.run())
        await outbox.take()
        loop.stop()
        await asyncio.wait_for(running, 20)
        assert not loop.state.ledger


async def test_at_most_one_row_is_wasted_on_a_sequence_that_stopped() -> None:
    """With two steps in flight one step is too many after a stop token, and none where the end was certain."""
    worker = FakeEngineWorker()
    async with _loop(2, worker) as loop:
        loop.attach(Outbox(1))
        loop.submit(_request(1, [5, 6, 7], 4))
        await _run_to_the_end(loop)
        assert worker.num_executed == 4
    stop = expected_output([5, 6, 7], 3)[-1]
    worker = FakeEngineWorker()
    async with _loop(2, worker) as loop:
        loop.attach(Outbox(1))
        frame = submit_frame([5, 6, 7], 40)
        frame.stop_token_ids.append(stop)
        loop.submit(to_request(frame, (1, 1), VOCAB_SIZE))
        await _run_to_the_end(loop)
        assert worker.num_executed == 3 + 1
