"""What a front end does when clients leave, engines die, queues fill up and servers drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from pawl.errors import PawlError
from pawl.status import from_status
from pawl.v1 import admin_pb2, inference_pb2, inference_pb2_grpc, types_pb2
from pawl_server.internal.v1 import engine_pb2, fleet_pb2
from tests.fakes.fake_engine import FakeEngine, ids_of
from tests.fakes.front_end import RunningFrontEnd, front_end, health_stub, scrape
from tests.fakes.tokenizer import write_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "toy")


@pytest.fixture
async def server(checkpoint: Path) -> AsyncIterator[RunningFrontEnd]:
    async with front_end(
        checkpoint, max_queued_requests=3, heartbeat_timeout_s=1.0, slow_reader_timeout_s=0.3
    ) as running:
        yield running


def _request(request_id: str = "", **stop: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(text="hello"),
        stop=types_pb2.StopParams(**({"max_output_tokens": 8} | stop)),
        options=types_pb2.RequestOptions(request_id=request_id),
    )


def _streamed(request: inference_pb2.GenerateRequest) -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(request=request)


async def _error(call: Any) -> PawlError:
    """The error that a call ends with; deltas before it are read."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (_rest(call) if hasattr(call, "read") else call)
    status = await rpc_status.aio.from_call(call)
    assert status is not None, caught.value
    error = from_status(status)
    assert error.status is caught.value.code()
    return error


async def _rest(call: Any) -> list[inference_pb2.StreamGenerateResponse]:
    """What is left of a stream; raises its error."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


async def _until_tokens(call: Any, num_tokens: int) -> str:
    text, seen = "", 0
    while seen < num_tokens:
        event = await call.read()
        text += event.delta.text
        seen += event.delta.token_count
    return text


async def _works(server: RunningFrontEnd) -> None:
    """The next good request succeeds and nothing is left anywhere."""
    for engine in server.engines:
        engine.hold_after = None
    answer = await server.inference.Generate(_request(), timeout=10, wait_for_ready=True)
    assert answer.usage.output_tokens == 8
    assert all(not engine.live for engine in server.engines)


async def test_a_lost_replica_ends_its_streams_with_one_error(server: RunningFrontEnd) -> None:
    server.engine.hold_after = 4
    call = server.inference.StreamGenerate(_streamed(_request("lost-one")))
    assert await _until_tokens(call, 4) == "cdef"
    await server.engine.kill()
    error = await _error(call)
    assert (error.reason, error.request_id, error.metadata["output_tokens"]) == ("WORKER_LOST", "lost-one", "4")
    assert error.status is grpc.StatusCode.UNAVAILABLE
    assert error.retry_after is not None
    refused = await _error(server.inference.Generate(_request()))
    assert refused.reason == "NOT_READY"
    replacement = await FakeEngine().start()
    server.engines[0] = replacement
    server.fleet.show([replacement], incarnation=2)
    await _ready(server)
    await _works(server)


async def _ready(server: RunningFrontEnd) -> None:
    health = health_stub(server.channel)
    async with asyncio.timeout(10):
        async for answer in health.Watch(health_pb2.HealthCheckRequest(service="readiness")):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


async def test_a_silent_engine_counts_as_lost(server: RunningFrontEnd) -> None:
    server.engine.hold_after = 2
    call = server.inference.StreamGenerate(_streamed(_request()))
    await _until_tokens(call, 2)
    server.engine.silent = True
    assert (await _error(call)).reason == "WORKER_LOST"
    server.engine.silent = False
    await _ready(server)
    server.engine.live.clear()
    await _works(server)


async def test_repeats_are_dropped_and_a_gap_is_an_error(server: RunningFrontEnd) -> None:
    server.engine.repeat = True
    answer = await server.inference.Generate(_request())
    assert answer.samples[0].text == "cdefghij"
    server.engine.skip_index = 3
    assert (await _error(server.inference.Generate(_request()))).status is grpc.StatusCode.UNAVAILABLE
    server.engine.skip_index = None
    await _works(server)


async def test_refusals_and_failures_of_an_engine_keep_their_reason(server: RunningFrontEnd) -> None:
    server.engine.refuse = engine_pb2.EngineError(
        code="invalid_request",
        reason="NEVER_FITS",
        message="needs 20 blocks, 10 exist",
        field="stop.max_output_tokens",
        metadata={"blocks": "20"},
    )
    error = await _error(server.inference.Generate(_request()))
    assert (error.code, error.reason, error.metadata["blocks"]) == ("invalid_request", "NEVER_FITS", "20")
    assert [violation.field for violation in error.violations] == ["stop.max_output_tokens"]
    error = await _error(server.inference.StreamGenerate(_streamed(_request())))
    assert [violation.field for violation in error.violations] == ["request.stop.max_output_tokens"]
    server.engine.refuse, server.engine.fail_after = None, 3
    error = await _error(server.inference.StreamGenerate(_streamed(_request())))
    assert (error.code, error.reason) == ("internal", "BAD_STEP")
    server.engine.fail_after = None
    await _works(server)


async def test_cancel_ends_a_request_normally(server: RunningFrontEnd) -> None:
    server.engine.hold_after = 3
    call = server.inference.StreamGenerate(_streamed(_request("to-cancel")))
    await _until_tokens(call, 3)
    ask = inference_pb2.CancelRequest(request_ids=["to-cancel", "never-seen"])
    outcomes = (await server.inference.Cancel(ask)).outcomes
    assert outcomes["to-cancel"] == inference_pb2.CANCEL_OUTCOME_CANCELLED
    assert outcomes["never-seen"] == inference_pb2.CANCEL_OUTCOME_NOT_FOUND
    events = await _rest(call)
    assert events[-2].sample_end.finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert events[-1].end.usage.output_tokens == 3
    assert [reason for _, reason in server.engine.aborts] == [engine_pb2.ABORT_REASON_CANCELLED]
    again = (await server.inference.Cancel(ask)).outcomes["to-cancel"]
    assert again == inference_pb2.CANCEL_OUTCOME_ALREADY_FINISHED
    await _works(server)


async def test_an_end_does_not_wait_for_an_engine_that_forgot(server: RunningFrontEnd) -> None:
    server.engine.hold_after, server.engine.ignore_aborts = 3, True
    call = server.inference.Generate(_request("forgotten"))
    await server.engine.seen(lambda: bool(server.engine.live))
    await server.inference.Cancel(inference_pb2.CancelRequest(request_ids=["forgotten"]))
    answer = await asyncio.wait_for(call, 10)
    assert answer.samples[0].finish_reason == types_pb2.FINISH_REASON_CANCELLED


async def test_a_deadline_is_an_error_with_the_phase(server: RunningFrontEnd) -> None:
    for hold_after, phase in ((0, "queue"), (2, "decode")):
        server.engine.hold_after = hold_after
        error = await _error(server.inference.Generate(_request(), timeout=0.8))
        assert error.status is grpc.StatusCode.DEADLINE_EXCEEDED
        assert error.metadata == {"phase": phase, "output_tokens": str(hold_after)}
        await server.engine.seen(lambda: not server.engine.live)
    await _works(server)


async def test_max_duration_ends_cleanly_with_the_text_so_far(server: RunningFrontEnd) -> None:
    server.engine.hold_after = 5
    request = _request(max_duration=duration_pb2.Duration(nanos=300_000_000))
    answer = await server.inference.Generate(request)
    assert answer.samples[0].finish_reason == types_pb2.FINISH_REASON_TIME_LIMIT
    assert answer.samples[0].text == "cdefg"
    assert server.engine.aborts[0][1] == engine_pb2.ABORT_REASON_TIME_LIMIT
    await _works(server)


@pytest.mark.parametrize("hold_after", [0, 4])
async def test_a_client_that_leaves_frees_its_sequence(server: RunningFrontEnd, hold_after: int) -> None:
    server.engine.hold_after = hold_after
    call = server.inference.StreamGenerate(_streamed(_request()))
    await call.read()
    await server.engine.seen(lambda: bool(server.engine.live))
    call.cancel()
    await server.engine.seen(lambda: not server.engine.live)
    assert server.engine.aborts[0][1] == engine_pb2.ABORT_REASON_DISCONNECTED
    await _works(server)


async def test_a_full_queue_refuses_with_the_time_to_wait(server: RunningFrontEnd) -> None:
    server.engine.hold_after = 0
    calls = [asyncio.ensure_future(server.inference.Generate(_request(f"q{n}"))) for n in range(3)]
    await server.engine.seen(lambda: len(server.engine.live) == 3)
    refused = server.inference.Generate(_request())
    error = await _error(refused)
    assert (error.reason, error.status) == ("QUEUE_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert error.retry_after is not None
    assert error.retry_after > 0
    trailers = dict(await refused.trailing_metadata())
    assert int(trailers["grpc-retry-pushback-ms"]) == round(error.retry_after * 1000)
    server.engine.release.set()
    assert [(await call).usage.output_tokens for call in calls] == [8, 8, 8]
    await _works(server)


async def test_a_live_id_is_taken_and_a_finished_one_is_free(server: RunningFrontEnd) -> None:
    server.engine.hold_after = 0
    first = asyncio.ensure_future(server.inference.Generate(_request("same")))
    await server.engine.seen(lambda: bool(server.engine.live))
    error = await _error(server.inference.Generate(_request("same")))
    assert error.status is grpc.StatusCode.ALREADY_EXISTS
    server.engine.release.set()
    await first
    assert (await server.inference.Generate(_request("same"))).request_id == "same"


async def test_a_reader_that_takes_nothing_is_given_up(server: RunningFrontEnd) -> None:
    server.engine.max_context = 8192
    server.fleet.show(server.engines, incarnation=2)  # a new link, which learns the longer context
    await _ready(server)
    x = ids_of("x")[0]
    server.engine.reply = lambda _submit: [x] * 4000
    options = [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 16384),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(server.addresses.grpc, options=options) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = _request(max_output_tokens=4000)
        request.output.logprobs = 20
        call = stub.StreamGenerate(_streamed(request))
        await call.initial_metadata()
        # The engine never waited: it has made every token although nobody reads.
        await server.engine.seen(lambda: bool(server.engine.submits) and not server.engine.live)
        async with asyncio.timeout(10):
            while _CANCELLED_ONE not in await asyncio.to_thread(scrape, server):
                await asyncio.sleep(0.05)
        assert 'pawl_frontend_streams_open{model="toy"} 0.0' in await asyncio.to_thread(scrape, server)
        call.cancel()
    server.engine.reply = FakeEngine().reply
    await _works(server)


_CANCELLED_ONE = 'pawl_requests_total{method="StreamGenerate",model="toy",outcome="cancelled"} 1.0'


async def test_drain_lets_requests_finish_and_refuses_new_ones(server: RunningFrontEnd) -> None:
    server.engine.hold_after = 2
    call = server.inference.StreamGenerate(_streamed(_request()))
    await _until_tokens(call, 2)
    grace = duration_pb2.Duration(seconds=20)
    draining = asyncio.ensure_future(server.admin.Drain(admin_pb2.DrainRequest(grace_period=grace)))
    health = health_stub(server.channel)
    async with asyncio.timeout(10):
        async for answer in health.Watch(health_pb2.HealthCheckRequest(service="readiness")):
            if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
    liveness = await health.Check(health_pb2.HealthCheckRequest(service="liveness"))
    assert liveness.status == health_pb2.HealthCheckResponse.SERVING
    error = await _error(server.inference.Generate(_request()))
    assert (error.reason, error.status) == ("DRAINING", grpc.StatusCode.UNAVAILABLE)
    assert error.retry_after is not None
    assert not draining.done()
    server.engine.release.set()
    events = await _rest(call)
    assert events[-2].sample_end.finish_reason == types_pb2.FINISH_REASON_MAX_TOKENS
    assert (await draining).cancelled_request_count == 0


async def test_stopping_cancels_what_does_not_finish_in_time(checkpoint: Path) -> None:
    async with front_end(checkpoint, drain_grace_s=0.2) as server:
        server.engine.hold_after = 2
        call = server.inference.StreamGenerate(_streamed(_request()))
        await _until_tokens(call, 2)
        server.stop.set()
        events = await _rest(call)
        assert events[-2].sample_end.finish_reason == types_pb2.FINISH_REASON_CANCELLED
        assert await asyncio.wait_for(server.task, 10) == 0


async def test_two_replicas_share_the_work_and_one_may_die(checkpoint: Path) -> None:
    async with front_end(checkpoint, num_engines=2, prefix_affinity=0.0) as server:
        async with asyncio.timeout(10):
            while (await server.admin.GetServerInfo(admin_pb2.GetServerInfoRequest())).replica_count < 2:
                await asyncio.sleep(0.01)
        for engine in server.engines:
            engine.hold_after = 1
        calls = [server.inference.StreamGenerate(_streamed(_request())) for _ in range(4)]
        for call in calls:
            await _until_tokens(call, 1)
        assert [len(engine.submits) for engine in server.engines] == [2, 2]
        await server.engines[1].kill()
        server.engines[0].release.set()
        results = await asyncio.gather(*(_drained(call) for call in calls))
        assert sorted(results) == ["OK", "OK", "UNAVAILABLE", "UNAVAILABLE"]
        server.engines.pop()
        await _works(server)


async def _drained(call: Any) -> str:
    try:
        await _rest(call)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


async def test_a_draining_replica_gets_nothing_new_and_the_last_list_is_kept(checkpoint: Path) -> None:
    async with front_end(checkpoint, num_engines=2) as server:
        first = server.inference.StreamGenerate(_streamed(_request()))
        server.engines[0].hold_after = server.engines[1].hold_after = 1
        await _until_tokens(first, 1)
        busy = 0 if server.engines[0].live else 1
        other = server.engines[1 - busy]
        server.fleet._listing.replicas[busy].state = fleet_pb2.REPLICA_STATE_DRAINING
        server.fleet._revision += 1
        for watcher in server.fleet._watchers:
            watcher.put_nowait(server.fleet._listing)
        async with asyncio.timeout(10):
            while (await server.admin.GetServerInfo(admin_pb2.GetServerInfoRequest())).replica_count != 1:
                await asyncio.sleep(0.01)
        await server.fleet.stop()
        for _ in range(3):
            call = server.inference.StreamGenerate(_streamed(_request()))
            await _until_tokens(call, 1)
            call.cancel()
        assert len(other.submits) == 3
        server.engines[busy].release.set()
        assert await _drained(first) == "OK"
