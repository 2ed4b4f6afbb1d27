"""The client against frames that no good engine sends."""

from __future__ import annotations

import asyncio

import pytest

from pawl.errors import Unavailable
from pawl_server.engine.link.client import EngineLink
from pawl_server.internal.v1 import engine_pb2
from tests.fakes.engine_harness import Recorder, ended, open_stream, submit_frame, until
from tests.fakes.scripted_engine import scripted_engine


def _tokens(*entries: tuple[int, int, int]) -> engine_pb2.ConnectResponse:
    handles, indices, token_ids = zip(*entries, strict=True)
    return engine_pb2.ConnectResponse(
        tokens=engine_pb2.Tokens(step=1, handles=handles, indices=indices, token_ids=token_ids)
    )


def _end(handle: int) -> engine_pb2.ConnectResponse:
    return engine_pb2.ConnectResponse(end=engine_pb2.End(handle=handle, reason=engine_pb2.END_REASON_MAX_TOKENS))


async def test_repeats_are_dropped_within_and_across_frames() -> None:
    async with scripted_engine() as engine, engine.link() as link:
        stream, recorder = open_stream(link, [1])
        handle = stream.handle
        engine.send(_tokens((handle, 0, 5), (handle, 1, 6)), _tokens((handle, 1, 6), (handle, 2, 7)), _end(handle))
        await ended(recorder)
        assert (recorder.indices, recorder.token_ids) == ([0, 1, 2], [5, 6, 7])


async def test_a_gap_loses_that_stream_alone_and_tells_the_engine() -> None:
    async with scripted_engine() as engine, engine.link() as link:
        torn, torn_recorder = open_stream(link, [1])
        whole, whole_recorder = open_stream(link, [1])
        engine.send(
            _tokens((torn.handle, 0, 5), (whole.handle, 0, 5)),
            _tokens((torn.handle, 2, 7), (whole.handle, 1, 6)),
            _end(torn.handle),
            _end(whole.handle),
        )
        await ended(whole_recorder)
        assert whole_recorder.token_ids == [5, 6]
        assert (torn_recorder.token_ids, torn_recorder.ends) == ([5], [])
        (detail,) = torn_recorder.lost
        assert "expected 1" in detail
        await until(lambda: (torn.handle, engine_pb2.ABORT_REASON_INTERNAL) in engine.aborts)


async def test_a_resumed_stream_expects_its_first_new_index() -> None:
    async with scripted_engine() as engine, engine.link() as link:
        recorder = Recorder()
        stream = link.open(submit_frame([1], resume=[5, 6]), recorder)
        engine.send(_tokens((stream.handle, 1, 6)), _tokens((stream.handle, 2, 7)), _end(stream.handle))
        await ended(recorder)
        assert recorder.indices == [2]


async def test_frames_of_unknown_handles_are_ignored() -> None:
    async with scripted_engine() as engine, engine.link() as link:
        stream, recorder = open_stream(link, [1])
        engine.send(_tokens((99, 0, 5)), _end(99), _end(stream.handle), _end(stream.handle))
        await ended(recorder)
        assert len(recorder.ends) == 1


def _raise(*_: object) -> None:
    raise ValueError("planted")


@pytest.mark.parametrize("callback", ["on_tokens", "on_prompt_logprobs", "on_end", "on_lost"])
async def test_a_callback_that_raises_ends_its_own_stream_only(callback: str) -> None:
    """It is told so, once and with the error; the engine is told to end the sequence unless it has."""
    broken_type = type("Broken", (Recorder,), {callback: _raise})
    async with scripted_engine() as engine, engine.link() as link:
        broken_recorder = broken_type()
        broken = link.open(submit_frame([1]), broken_recorder)
        whole, recorder = open_stream(link, [1])
        frames = {
            "on_tokens": _tokens((broken.handle, 0, 5)),
            "on_prompt_logprobs": engine_pb2.ConnectResponse(
                prompt_logprobs=engine_pb2.PromptLogprobs(handle=broken.handle, first_position=1)
            ),
            "on_end": _end(broken.handle),
            "on_lost": _tokens((broken.handle, 3, 5)),  # a gap
        }
        engine.send(frames[callback], _tokens((whole.handle, 0, 5)), _end(broken.handle), _end(whole.handle))
        await ended(recorder)
        assert recorder.token_ids == [5]
        (error,) = broken_recorder.defects
        assert str(error) == "planted"
        assert not broken_recorder.ends
        assert not link.closed.done()
        if callback != "on_end":
            await until(lambda: (broken.handle, engine_pb2.ABORT_REASON_INTERNAL) in engine.aborts)


async def test_a_broken_stream_is_told_once_to_everyone_and_open_refuses() -> None:
    async with scripted_engine() as engine:
        async with engine.link() as link:
            recorders = [open_stream(link, [1])[1] for _ in range(3)]
            engine.hang_up()
            detail = await link.closed
            assert [recorder.lost for recorder in recorders] == [[detail]] * 3
            with pytest.raises(Unavailable):
                open_stream(link, [1])
        assert all(len(recorder.lost) == 1 for recorder in recorders)


async def test_leaving_the_context_loses_what_is_open() -> None:
    async with scripted_engine() as engine:
        async with engine.link() as link:
            assert isinstance(link, EngineLink)
            _, recorder = open_stream(link, [1])
        assert len(recorder.lost) == 1
        assert await link.closed == recorder.lost[0]


async def test_a_failure_that_nobody_expected_loses_the_link_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not only when the engine has seemed silent for the heartbeat timeout."""
    async with scripted_engine() as engine, engine.link() as link:
        link.on_cache_events = _raise
        _, recorder = open_stream(link, [1])
        engine.send(engine_pb2.ConnectResponse(cache_events=engine_pb2.CacheEvents(reset=True)))
        async with asyncio.timeout(10):
            detail = await link.closed
        assert "planted" in detail
        assert recorder.lost == [detail]
    assert sum("read failed" in record.getMessage() for record in caplog.records) == 1
