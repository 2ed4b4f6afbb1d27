"""What becomes of a request with several samples when its time is up, its reader is slow or its server drains."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
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
from pawl.v1 import admin_pb2, inference_pb2, inference_pb2_grpc, model_pb2, types_pb2
from pawl_server.internal.v1 import engine_pb2
from tests.fakes.fake_engine import FakeEngine, ids_of
from tests.fakes.front_end import RunningFrontEnd, front_end, health_stub, scrape
from tests.fakes.tokenizer import EOS_ID, write_checkpoint

SAMPLES = 3
SLOW_READER_S = 0.5


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RunningFrontEnd]:
    checkpoint = write_checkpoint(tmp_path / "toy")
    async with front_end(checkpoint, drain_grace_s=0.2, slow_reader_timeout_s=SLOW_READER_S) as running:
        yield running


def _request(max_output_tokens: int = 8) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(text="hello"),
        sampling=types_pb2.SamplingParams(sample_count=SAMPLES, temperature=1.0, seed=1),
        stop=types_pb2.StopParams(max_output_tokens=max_output_tokens),
    )


def _streamed(max_output_tokens: int = 8) -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(request=_request(max_output_tokens))


async def _read_until(call: Any, num_tokens: int) -> None:
    """Read until each sample has so many tokens."""
    seen: Counter[int] = Counter()
    while min(seen[index] for index in range(SAMPLES)) < num_tokens:
        delta = (await call.read()).delta
        seen[delta.index] += delta.token_count


async def _rest(call: Any) -> list[inference_pb2.StreamGenerateResponse]:
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


async def _error(call: Any) -> PawlError:
    with pytest.raises(grpc.aio.AioRpcError):
        await (_rest(call) if hasattr(call, "read") else call)
    status = await rpc_status.aio.from_call(call)
    assert status is not None
    return from_status(status)


def _ends(events: list[inference_pb2.StreamGenerateResponse]) -> dict[int, types_pb2.FinishReason.ValueType]:
    """How each sample ended, exactly once."""
    ends = [event.sample_end for event in events if event.HasField("sample_end")]
    assert sorted(end.index for end in ends) == list(range(SAMPLES))
    return {end.index: end.finish_reason for end in ends}


async def _aborted(server: RunningFrontEnd, reason: engine_pb2.AbortReason.ValueType) -> None:
    """The engine was told once of each sample, with this reason, and has none left."""
    await server.engine.seen(lambda: len(server.engine.aborts) == SAMPLES)
    submit = server.engine.submits[-1]
    assert {handle for handle, _ in server.engine.aborts} == {submit.handle, *submit.sample_handles}
    assert {given for _, given in server.engine.aborts} == {reason}
    assert not server.engine.live


async def _works(server: RunningFrontEnd) -> None:
    server.engine.hold_after = None
    answer = await server.inference.Generate(_request(), timeout=10)
    assert [len(sample.text) for sample in answer.samples] == [8] * SAMPLES
    assert not server.engine.live


@pytest.mark.parametrize(("hold_after", "phase"), [(0, "queue"), (2, "decode")])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_deadline_ends_all_with_one_error(
    server: RunningFrontEnd, hold_after: int, phase: str, streamed: bool
) -> None:
    """It tells the tokens of all samples."""
    server.engine.hold_after = hold_after
    if streamed:
        call: Any = server.inference.StreamGenerate(_streamed(), timeout=0.8)
    else:
        call = server.inference.Generate(_request(), timeout=0.8)
    error = await _error(call)
    assert error.status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.metadata == {"phase": phase, "output_tokens": str(SAMPLES * hold_after)}
    await _aborted(server, engine_pb2.ABORT_REASON_DEADLINE)
    await _works(server)


async def test_a_deadline_leaves_alone_the_samples_that_have_ended(server: RunningFrontEnd) -> None:
    server.engine.hold_after = 4
    x = ids_of("x")[0]
    server.engine.reply = lambda submit: [x, EOS_ID] if _place(server, submit) == 1 else [x] * 8
    call = server.inference.StreamGenerate(_streamed(), timeout=0.8)
    assert await _sample_ends(call) == [1]
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    first, _, third = (server.engine.submits[-1].handle, *server.engine.submits[-1].sample_handles)
    await server.engine.seen(lambda: len(server.engine.aborts) == 2)
    assert {handle for handle, _ in server.engine.aborts} == {first, third}


async def _sample_ends(call: Any) -> list[int]:
    """The samples that ended before the call failed."""
    ended = []
    with contextlib.suppress(grpc.aio.AioRpcError):
        while (event := await call.read()) is not grpc.aio.EOF:
            if event.HasField("sample_end"):
                ended.append(event.sample_end.index)
    return ended


def _place(server: RunningFrontEnd, submit: engine_pb2.Submit) -> int:
    """Which sample of the last request this is."""
    last = server.engine.submits[-1]
    return [last.handle, *last.sample_handles].index(submit.handle)


async def test_a_reader_that_takes_nothing_loses_all_samples(server: RunningFrontEnd) -> None:
    """The engine never waits for it, and goes on for others meanwhile."""
    server.engine.max_context = 8192
    server.fleet.show(server.engines, incarnation=2)  # a new link, which learns the longer context
    async with asyncio.timeout(10):
        while await _context(server) != 8192:
            await asyncio.sleep(0.01)
    x = ids_of("x")[0]
    server.engine.reply = lambda _submit: [x] * 4000
    server.engine.hold_after = 3900
    options = [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 16384),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(server.addresses.grpc, options=options) as channel:
        request = _streamed(4000)
        request.request.output.logprobs = 20
        call = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request)
        await call.initial_metadata()
        await _aborted(server, engine_pb2.ABORT_REASON_SLOW_READER)
        async with asyncio.timeout(10):
            while _GIVEN_UP not in await asyncio.to_thread(scrape, server):
                await asyncio.sleep(0.05)
        call.cancel()
    server.engine.reply = FakeEngine().reply
    await _works(server)


async def _context(server: RunningFrontEnd) -> int:
    return (await server.models.GetModel(model_pb2.GetModelRequest(name="models/toy"))).model.max_context_tokens


_GIVEN_UP = 'pawl_requests_total{method="StreamGenerate",model="toy",outcome="cancelled"} 1.0'


async def test_a_drain_lets_all_samples_finish(server: RunningFrontEnd) -> None:
    server.engine.hold_after = 2
    call = server.inference.StreamGenerate(_streamed())
    await _read_until(call, 2)
    grace = duration_pb2.Duration(seconds=20)
    draining = asyncio.ensure_future(server.admin.Drain(admin_pb2.DrainRequest(grace_period=grace)))
    async with asyncio.timeout(10):
        async for answer in health_stub(server.channel).Watch(health_pb2.HealthCheckRequest(service="readiness")):
            if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
    assert (await _error(server.inference.Generate(_request()))).reason == "DRAINING"
    assert not draining.done()
    server.engine.release.set()
    events = await _rest(call)
    assert set(_ends(events).values()) == {types_pb2.FINISH_REASON_MAX_TOKENS}
    assert events[-1].end.usage.output_tokens == 8 * SAMPLES
    assert (await draining).cancelled_request_count == 0


async def test_what_a_drain_cuts_off_ends_with_what_it_has(server: RunningFrontEnd) -> None:
    """One request, whatever the number of its samples."""
    server.engine.hold_after = 2
    call = server.inference.StreamGenerate(_streamed())
    await _read_until(call, 2)
    grace = duration_pb2.Duration(nanos=100_000_000)
    drained = await server.admin.Drain(admin_pb2.DrainRequest(grace_period=grace))
    assert drained.cancelled_request_count == 1
    events = await _rest(call)
    assert set(_ends(events).values()) == {types_pb2.FINISH_REASON_CANCELLED}
    assert events[-1].end.usage.output_tokens == 2 * SAMPLES
    await _aborted(server, engine_pb2.ABORT_REASON_CANCELLED)


async def test_a_stop_cancels_all_samples_after_the_grace(server: RunningFrontEnd) -> None:
    server.engine.hold_after = 2
    call = server.inference.StreamGenerate(_streamed())
    await _read_until(call, 2)
    server.stop.set()
    events = await _rest(call)
    assert set(_ends(events).values()) == {types_pb2.FINISH_REASON_CANCELLED}
    assert await asyncio.wait_for(server.task, 10) == 0
