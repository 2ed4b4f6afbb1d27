"""The link over a real socket: a whole engine with the fake worker, and the front end's client."""

from __future__ import annotations

import asyncio
import random
import sys

import grpc
import pytest

from pawl.errors import Unauthenticated, Unavailable
from pawl_server.engine.link import client as client_module
from pawl_server.engine.link.auth import token_metadata
from pawl_server.engine.link.protocol import PROTOCOL_VERSION
from pawl_server.internal.v1 import engine_pb2, engine_pb2_grpc
from tests.fakes.engine_harness import (
    Recorder,
    ended,
    expected_output,
    open_stream,
    running_engine,
    sample_seed,
    submit_frame,
)
from tests.fakes.engine_worker import VOCAB_SIZE, FakeFacts, fake_spec


async def test_a_stream_gives_every_token_once_and_one_end() -> None:
    async with running_engine() as running, running.link() as link:
        _, recorder = open_stream(link, [5, 6, 7], 12)
        end = await ended(recorder)
        assert recorder.indices == list(range(12))
        assert recorder.token_ids == expected_output([5, 6, 7], 12)
        assert end.reason == engine_pb2.END_REASON_MAX_TOKENS
        assert (end.output_tokens, end.preemption_count) == (12, 0)
        assert link.num_streams == 0
        await running.until_empty()


async def test_welcome_says_what_is_served() -> None:
    async with running_engine(fake_spec(replica=3)) as running, running.link() as link:
        welcome = link.welcome
        assert (welcome.protocol_version, welcome.replica) == (PROTOCOL_VERSION, 3)
        assert (welcome.block_size, welcome.num_blocks, welcome.max_running) == (4, 256, 8)
        assert (welcome.model.id, welcome.model.source) == ("shadow", "shadow")
        assert (welcome.model.vocab_size, welcome.model.max_context_tokens) == (VOCAB_SIZE, 512)
        assert welcome.engine_id


async def test_resumed_tokens_are_counted_and_not_sent_again() -> None:
    whole = expected_output([1, 2], 10)
    async with running_engine() as running, running.link() as link:
        recorder = Recorder()
        link.open(submit_frame([1, 2], 10, resume=whole[:4]), recorder)
        end = await ended(recorder)
        assert recorder.indices == list(range(4, 10))
        assert recorder.token_ids == whole[4:]
        assert end.output_tokens == 10


async def test_a_stop_token_ends_with_its_id() -> None:
    whole = expected_output([9], 10)
    submit = submit_frame([9], 10)
    submit.stop_token_ids.append(whole[3])
    async with running_engine() as running, running.link() as link:
        recorder = Recorder()
        link.open(submit, recorder)
        end = await ended(recorder)
        assert (end.reason, end.stop_token_id) == (engine_pb2.END_REASON_STOP_TOKEN, whole[3])
        assert recorder.token_ids == whole[: whole.index(whole[3]) + 1]


async def test_prompt_logprobs_come_before_the_end_and_cover_the_prompt() -> None:
    submit = submit_frame(list(range(1, 60)), 0)
    submit.prompt_logprobs = 0
    submit.prompt_logprobs_from = 1
    async with running_engine() as running, running.link() as link:
        recorder = Recorder()
        link.open(submit, recorder)
        await ended(recorder)
        positions = [
            (frame.first_position + offset, position.token_id)
            for frame in recorder.prompt_logprobs
            for offset, position in enumerate(frame.positions)
        ]
        assert positions == [(place, place + 1) for place in range(1, 59)]
        assert recorder.token_ids == []


async def test_an_abort_ends_the_stream_and_frees_its_blocks() -> None:
    async with running_engine() as running, running.link() as link:
        stream, recorder = open_stream(link, [1, 2, 3], 400)
        await recorder.first_token.wait()
        stream.abort(engine_pb2.ABORT_REASON_CANCELLED)
        stream.abort(engine_pb2.ABORT_REASON_CANCELLED)
        assert (await ended(recorder)).reason == engine_pb2.END_REASON_ABORTED
        await running.until_empty()
        stream.abort(engine_pb2.ABORT_REASON_CANCELLED)
        _, after = open_stream(link, [4], 3)
        await ended(after)
        assert len(recorder.ends) == 1


async def test_samples_share_a_prompt_and_end_together() -> None:
    """One frame asks for three samples, each told of its own tokens; one frame ends what is left of them."""
    async with running_engine() as running, running.link() as link:
        submit = submit_frame(list(range(1, 11)), 400)
        submit.sample_seeds.extend(sample_seed(0, index) for index in (1, 2))
        recorders = [Recorder() for _ in range(3)]
        streams = link.open_samples(submit, recorders)
        assert [submit.handle, *submit.sample_handles] == [stream.handle for stream in streams]
        for recorder in recorders:
            async with asyncio.timeout(20):
                await recorder.first_token.wait()
        assert running.engine.loop.state.counts().running == 3
        link.abort_samples([stream.handle for stream in streams], engine_pb2.ABORT_REASON_CANCELLED)
        for index, recorder in enumerate(recorders):
            assert (await ended(recorder)).reason == engine_pb2.END_REASON_ABORTED
            number = len(recorder.token_ids)
            assert recorder.token_ids == expected_output(submit.prompt_ids, number, seed=sample_seed(0, index))
        await running.until_empty()


async def test_a_sample_without_a_seed_is_refused_with_its_siblings() -> None:
    async with running_engine() as running, running.link() as link:
        recorders = [Recorder(), Recorder()]
        link.open_samples(submit_frame([1, 2], 4), recorders)
        for recorder in recorders:
            end = await ended(recorder)
            assert (end.reason, end.error.reason) == (engine_pb2.END_REASON_REFUSED, "BAD_SAMPLES")
        assert not running.engine.loop.state.live


@pytest.mark.parametrize(
    ("submit", "reason", "field"),
    [
        (submit_frame(list(range(600)), 8), "NEVER_FITS", "prompt"),
        (submit_frame([1, 2], 600), "NEVER_FITS", "stop.max_output_tokens"),
        (submit_frame([], 4), "EMPTY_PROMPT", "prompt"),
        (submit_frame([1, VOCAB_SIZE], 4), "TOKEN_OUT_OF_RANGE", "prompt"),
        (submit_frame([1, -1], 4), "TOKEN_OUT_OF_RANGE", "prompt"),
        (submit_frame([1], 4, resume=[VOCAB_SIZE]), "TOKEN_OUT_OF_RANGE", "resume_ids"),
    ],
)
async def test_what_can_never_run_is_refused_with_the_numbers(
    submit: engine_pb2.Submit, reason: str, field: str
) -> None:
    async with running_engine() as running, running.link() as link:
        recorder = Recorder()
        link.open(submit, recorder)
        end = await ended(recorder)
        assert end.reason == engine_pb2.END_REASON_REFUSED
        assert (end.error.code, end.error.reason, end.error.field) == ("invalid_request", reason, field)
        assert any(character.isdigit() for character in end.error.message) or reason == "EMPTY_PROMPT"
        _, after = open_stream(link, [4], 3)
        await ended(after)


@pytest.mark.parametrize("token", ["", "wrong", "secre", "secret "])
async def test_a_wrong_token_is_refused(token: str) -> None:
    async with running_engine() as running:
        with pytest.raises(Unauthenticated):
            async with running.link(token):
                pass
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.FlushCache(engine_pb2.FlushCacheRequest(), metadata=token_metadata(token))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ListSequences(engine_pb2.ListSequencesRequest())
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    async with running_engine() as running:
        with pytest.raises(Unavailable, match=f"speaks protocol {PROTOCOL_VERSION + 1}"):
            async with running.link():
                pass


async def test_the_first_frame_must_be_a_hello() -> None:
    async with running_engine() as running, grpc.aio.insecure_channel(running.address) as channel:
        call = engine_pb2_grpc.EngineServiceStub(channel).Connect(metadata=token_metadata("secret"))
        await call.write(engine_pb2.ConnectRequest(submit=submit_frame([1])))
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_engine_that_is_not_there_is_unavailable() -> None:
    async with running_engine() as running:
        address = running.address
    with pytest.raises(Unavailable):
        async with client_module.EngineLink(address, "secret", "test", connect_timeout_s=5.0):
            pass


async def test_operators_see_sequences_and_can_flush_the_cache() -> None:
    async with running_engine() as running, running.link() as link:
        stream, recorder = open_stream(link, [1, 2, 3], 480, seed=7)
        await recorder.first_token.wait()
        (state,) = await link.list_sequences()
        assert (state.request_id, state.prompt_tokens, state.phase) == ("request-7", 3, "decode")
        assert state.num_blocks > 0
        stream.abort(engine_pb2.ABORT_REASON_CANCELLED)
        await ended(recorder)
        await running.until_empty()
        cached = running.engine.loop.state.counts().cached_blocks
        assert cached > 0
        assert await link.flush_cache() == cached
        assert running.engine.loop.state.counts().free_blocks == 256


async def test_two_front_ends_do_not_see_each_other() -> None:
    async with running_engine() as running, running.link() as one, running.link() as other:
        streams = [open_stream(link, [8, place], 9) for place in range(4) for link in (one, other)]
        for _, recorder in streams:
            await ended(recorder)
        for place, (_, recorder) in enumerate(streams):
            assert recorder.token_ids == expected_output([8, place // 2], 9)


async def _opened_or_done(recorder: Recorder) -> None:
    waits = [asyncio.create_task(event.wait()) for event in (recorder.first_token, recorder.done)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def test_random_requests_with_aborts_leave_nothing_behind() -> None:
    """200 requests on a pool that holds five of them, 30 % aborted: at once, or after their first token."""
    dice = random.Random(7)
    before = asyncio.all_tasks()
    spec = fake_spec(num_blocks=48)
    async with running_engine(spec, FakeFacts(num_blocks=48)) as running, running.link() as link:
        opened = []
        for number in range(200):
            prompt = [dice.randrange(900) for _ in range(dice.randrange(1, 40))]
            num_output = dice.randrange(1, 24)
            stream, recorder = open_stream(link, prompt, num_output, seed=number)
            aborted = dice.random() < 0.3
            if aborted and dice.random() < 0.5:
                stream.abort(engine_pb2.ABORT_REASON_DISCONNECTED)
            opened.append((stream, recorder, prompt, num_output, number, aborted))
        for stream, recorder, *_, aborted in opened:
            if aborted:
                await _opened_or_done(recorder)
                stream.abort(engine_pb2.ABORT_REASON_DISCONNECTED)
        for _, recorder, prompt, num_output, seed, aborted in opened:
            end = await ended(recorder)
            whole = expected_output(prompt, num_output, seed=seed)
            assert recorder.token_ids == whole[: len(recorder.token_ids)]
            assert recorder.indices == list(range(len(recorder.token_ids)))
            if not aborted:
                assert end.reason == engine_pb2.END_REASON_MAX_TOKENS
                assert recorder.token_ids == whole
        assert link.num_streams == 0
        await running.until_empty()
        counts = running.engine.loop.state.counts()
        assert counts.free_blocks + counts.cached_blocks == 48
    left = {task.get_name() for task in asyncio.all_tasks() - before if not task.done()}
    assert not any(name.startswith(("link", "connection", "engine")) for name in left)


async def test_a_busy_port_fails_loudly() -> None:
    async with running_engine() as running:
        port = running.address.split(":")[1]
        with pytest.raises(Unavailable, match="engine_ports"):
            async with running_engine(fake_spec(ports=port)):
                pass


def test_the_client_brings_neither_torch_nor_ray_nor_the_engine() -> None:
    import subprocess

    program = (
        "import sys, pawl_server.engine.link.client\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'ray', 'pawl_workers')"
        " or m.startswith(('pawl_server.scheduler', 'pawl_server.kv', 'pawl_server.engine.loop'))]\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{program}"], check=True)
