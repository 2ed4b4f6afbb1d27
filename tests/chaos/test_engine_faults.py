"""Faults of one engine: crashing steps, lost and silent front ends, hung steps, signals, a dead parent."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading

import grpc
import pytest

from pawl.errors import ServerError
from pawl_server.engine import suspects
from pawl_server.engine.link.auth import token_metadata
from pawl_server.engine.link.client import EngineLink
from pawl_server.engine.link.protocol import PROTOCOL_VERSION
from pawl_server.engine.spec import EngineFailed, EngineProgress, EngineReady, EngineSpec
from pawl_server.engine.watchdog import HUNG_EXIT_CODE
from pawl_server.internal.v1 import engine_pb2, engine_pb2_grpc
from tests.fakes.engine_harness import (
    Recorder,
    ended,
    expected_output,
    open_stream,
    running_engine,
    submit_frame,
    until,
)
from tests.fakes.engine_subprocess import engine_process
from tests.fakes.engine_worker import DELAYED_POISON, HANG, POISON, STUMBLE, fake_spec
from tests.fakes.scripted_engine import scripted_engine


async def test_a_step_that_crashes_once_is_repeated_and_nobody_notices() -> None:
    async with running_engine() as running, running.link() as link:
        opened = [open_stream(link, [1, place], 20) for place in range(3)]
        for _, recorder in opened:
            await recorder.first_token.wait()
        opened.append(open_stream(link, [STUMBLE, 3], 20))
        for _, recorder in opened:
            await ended(recorder)
        for place, (_, recorder) in enumerate(opened[:3]):
            assert recorder.token_ids == expected_output([1, place], 20)
        assert opened[3][1].token_ids == expected_output([STUMBLE, 3], 20)
        assert running.engine.loop.state.epoch == 2
        await running.until_empty()


@pytest.mark.parametrize("prompt", [[POISON, 1], [DELAYED_POISON, 9, 1]])
async def test_a_request_that_crashes_the_worker_fails_alone(prompt: list[int]) -> None:
    async with running_engine() as running, running.link() as link:
        running.worker.gate = threading.Event()  # all of them arrive before the first step is over
        before = [open_stream(link, [2, place], 30) for place in range(4)]
        _, poison = open_stream(link, prompt, 30)
        after = [open_stream(link, [3, place], 30) for place in range(4)]
        running.worker.gate.set()
        end = await ended(poison)
        assert end.reason == engine_pb2.END_REASON_FAILED
        assert (end.error.code, end.error.reason) == ("internal", "WORKER_FAILED")
        assert "planted crash" in end.error.message
        for first, opened in ((2, before), (3, after)):
            for place, (_, recorder) in enumerate(opened):
                assert (await ended(recorder)).reason == engine_pb2.END_REASON_MAX_TOKENS
                assert recorder.token_ids == expected_output([first, place], 30)
        assert running.engine.loop.state.epoch == 3
        await running.until_empty()


async def test_two_poisonous_requests_fail_and_the_others_do_not() -> None:
    async with running_engine() as running, running.link() as link:
        running.worker.gate = threading.Event()
        prompts = [[1, 1], [POISON, 1], [1, 2], [DELAYED_POISON, 6, 1], [1, 3]]
        opened = [open_stream(link, prompt, 12) for prompt in prompts]
        running.worker.gate.set()
        reasons = [(await ended(recorder)).reason for _, recorder in opened]
        failed, done = engine_pb2.END_REASON_FAILED, engine_pb2.END_REASON_MAX_TOKENS
        assert reasons == [done, failed, done, failed, done]
        await running.until_empty()


async def test_who_starts_over_a_cached_prefix_is_not_taken_for_who_starts_beside_him() -> None:
    """Most of his prompt is there already: what is left of the step's room is for nobody while it is looked who it was.

    Else he would be in every step that the poisonous one crashes.
    """
    async with running_engine() as running, running.link() as link:
        running.worker.gate = threading.Event()
        prompts = [[5] * 36 + [1], [5] * 36 + [2], [POISON, 1], [5] * 36 + [3]]
        opened = [open_stream(link, prompt, 12) for prompt in prompts]
        running.worker.gate.set()
        reasons = [(await ended(recorder)).reason for _, recorder in opened]
        failed, done = engine_pb2.END_REASON_FAILED, engine_pb2.END_REASON_MAX_TOKENS
        assert reasons == [done, done, failed, done]
        for prompt, (_, recorder) in zip(prompts, opened, strict=True):
            assert prompt[0] == POISON or recorder.token_ids == expected_output(prompt, 12)
        await running.until_empty()


async def test_a_worker_that_always_crashes_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "MAX_CRASHES", 4)
    async with running_engine() as running, running.link() as link:
        opened = [open_stream(link, [POISON, place], 3) for place in range(8)]
        with pytest.raises(ServerError, match="planted crash"):
            await asyncio.wait_for(asyncio.shield(running.running), 20)
        await running.engine.stop()
        for _, recorder in opened:
            await asyncio.wait_for(recorder.done.wait(), 20)
            assert len(recorder.ends) + len(recorder.lost) == 1
        assert await link.closed


async def test_a_lost_connection_frees_its_sequences_and_blocks() -> None:
    async with running_engine() as running, running.link() as survivor:
        _, kept = open_stream(survivor, [7], 200)
        async with running.link() as link:
            opened = [open_stream(link, [1, place], 400) for place in range(20)]
            await opened[0][1].first_token.wait()
        for _, recorder in opened:
            assert len(recorder.lost) == 1
            assert recorder.ends == []
        assert (await ended(kept)).reason == engine_pb2.END_REASON_MAX_TOKENS
        await running.until_empty()
        assert await survivor.list_sequences() == []


async def test_a_silent_front_end_is_cut_off() -> None:
    async with (
        running_engine(fake_spec(heartbeat_timeout_s=0.25)) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        call = engine_pb2_grpc.EngineServiceStub(channel).Connect(metadata=token_metadata("secret"))
        hello = engine_pb2.Hello(protocol_version=PROTOCOL_VERSION, frontend_id="silent")
        await call.write(engine_pb2.ConnectRequest(hello=hello))
        running.worker.gate = threading.Event()
        submit = submit_frame([1], -1)
        submit.handle = 1
        await call.write(engine_pb2.ConnectRequest(submit=submit))
        await until(lambda: bool(running.engine.loop.state.live))
        with contextlib.suppress(grpc.aio.AioRpcError):
            while isinstance(await call.read(), engine_pb2.ConnectResponse):
                pass
        assert await call.code() is grpc.StatusCode.ABORTED
        assert "silent for 0.25 s" in await call.details()
        running.worker.gate.set()
        await running.until_empty()


async def test_a_silent_engine_is_lost_and_each_stream_hears_it_once() -> None:
    async with scripted_engine() as engine:  # says nothing after its welcome
        async with engine.link(heartbeat_timeout_s=0.25) as link:
            _, recorder = open_stream(link, [1], 3)
            detail = await asyncio.wait_for(link.closed, 20)
            assert "silent for 0.25 s" in detail
            assert recorder.lost == [detail]
        assert recorder.lost == [detail]


async def test_a_stalled_reader_costs_the_engine_nothing() -> None:
    """A front end that reads nothing gets everything afterwards: merged, in fewer frames than steps."""
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 12)]
    async with (
        running_engine(fake_spec(num_blocks=1024, heartbeat_timeout_s=60.0)) as running,
        running.link() as busy,
        grpc.aio.insecure_channel(running.address, options=small_window) as channel,
    ):
        call = engine_pb2_grpc.EngineServiceStub(channel).Connect(metadata=token_metadata("secret"))
        hello = engine_pb2.Hello(protocol_version=PROTOCOL_VERSION, frontend_id="slow")
        await call.write(engine_pb2.ConnectRequest(hello=hello))
        for handle in range(1, 8):
            submit = submit_frame([handle], 500)
            submit.handle = handle
            await call.write(engine_pb2.ConnectRequest(submit=submit))
        _, recorder = open_stream(busy, [2], 500)
        await ended(recorder)
        await running.until_empty()
        indices: dict[int, list[int]] = {handle: [] for handle in range(1, 8)}
        num_frames = num_ends = 0
        while num_ends < 7 and isinstance(frame := await call.read(), engine_pb2.ConnectResponse):
            num_frames += frame.HasField("tokens")
            num_ends += frame.HasField("end")
            for handle, index in zip(frame.tokens.handles, frame.tokens.indices, strict=True):
                indices[handle].append(index)
        assert all(numbers == list(range(500)) for numbers in indices.values())
        assert num_frames < 400


async def test_sigterm_stops_an_engine_process_with_0() -> None:
    async with engine_process(fake_spec()) as process:
        ready = await process.ready()
        async with EngineLink(ready.addresses.address, "secret", "test") as link:
            _, recorder = open_stream(link, [1], 400)
            await recorder.first_token.wait()
            process.signal(signal.SIGTERM)
            assert await process.exit_code() == 0
            await asyncio.wait_for(recorder.done.wait(), 20)
            assert len(recorder.lost) == 1
    steps = {event.step for event in process.events if isinstance(event, EngineProgress)}
    assert steps == {"weights", "memory", "warm-up", "self-test"}


async def test_an_engine_process_dies_with_its_parent() -> None:
    async with engine_process(fake_spec()) as process:
        await process.ready()
        process.close_stdin()
        assert await process.exit_code() == 0


async def test_a_start_that_fails_says_why_and_exits_nonzero() -> None:
    async with engine_process(fake_spec(model="broken")) as process:
        assert await process.exit_code() == 1
    (failure,) = [event for event in process.events if isinstance(event, EngineFailed)]
    assert "planted load failure" in failure.message
    assert "load_fake_worker" in failure.detail


async def test_a_bad_setting_says_which() -> None:
    spec: EngineSpec = fake_spec(ports="many")
    async with engine_process(spec) as process:
        assert await process.exit_code() == 1
    failure = process.events[-1]
    assert isinstance(failure, EngineFailed)
    assert (failure.reason, failure.detail) == ("BAD_SETTING", "")
    assert "engine_ports" in failure.message


async def test_a_hung_step_ends_the_process() -> None:
    spec = fake_spec(step_timeout_s=0.5)
    async with engine_process(spec) as process:
        ready: EngineReady = await process.ready()
        async with EngineLink(ready.addresses.address, "secret", "test") as link:
            _, recorder = open_stream(link, [HANG], 4)
            assert await process.exit_code() == HUNG_EXIT_CODE
            await asyncio.wait_for(recorder.done.wait(), 20)
            assert recorder.lost


async def test_a_killed_engine_is_noticed_at_once() -> None:
    async with engine_process(fake_spec()) as process:
        ready = await process.ready()
        async with EngineLink(ready.addresses.address, "secret", "test", heartbeat_timeout_s=60.0) as link:
            recorder: Recorder
            _, recorder = open_stream(link, [1], 400)
            await recorder.first_token.wait()
            process.signal(signal.SIGKILL)
            await asyncio.wait_for(link.closed, 20)
            assert len(recorder.lost) + len(recorder.ends) == 1


async def test_an_engine_that_stands_still_is_lost_and_serves_again_when_it_wakes() -> None:
    async with engine_process(fake_spec()) as process:
        ready = await process.ready()
        async with EngineLink(ready.addresses.address, "secret", "test", heartbeat_timeout_s=1.0) as link:
            _, recorder = open_stream(link, [1], 2)
            await ended(recorder)
            process.signal(signal.SIGSTOP)
            _, stuck = open_stream(link, [2], 500)
            assert "silent for 1 s" in await asyncio.wait_for(link.closed, 20)
            assert len(stuck.lost) == 1
        process.signal(signal.SIGCONT)
        async with EngineLink(ready.addresses.address, "secret", "test", connect_timeout_s=20.0) as link:
            _, after = open_stream(link, [3], 2)
            await ended(after)
            assert after.token_ids == expected_output([3], 2)
            async with asyncio.timeout(20):
                while await link.list_sequences():
                    await asyncio.sleep(0.01)
