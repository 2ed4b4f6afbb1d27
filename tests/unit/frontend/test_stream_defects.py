"""A callback of the link that raises ends its request at once, with one error and one line in the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from pawl.errors import ServerError
from pawl_server.internal.v1 import engine_pb2
from tests.fakes.engine_harness import submit_frame, until
from tests.fakes.request_stream import request_stream
from tests.fakes.scripted_engine import ScriptedEngine, scripted_engine


def _tokens(handle: int) -> engine_pb2.ConnectResponse:
    return engine_pb2.ConnectResponse(tokens=engine_pb2.Tokens(handles=[handle], indices=[0], token_ids=[5]))


def _end_without_reason(handle: int) -> engine_pb2.ConnectResponse:
    return engine_pb2.ConnectResponse(end=engine_pb2.End(handle=handle))


def _late_prompt(handle: int) -> engine_pb2.ConnectResponse:
    frame = engine_pb2.PromptLogprobs(handle=handle, first_position=4)
    return engine_pb2.ConnectResponse(prompt_logprobs=frame)


CASES: dict[str, tuple[str, Callable[[ScriptedEngine, int], None]]] = {
    "on_tokens": ("first_token", lambda engine, handle: engine.send(_tokens(handle))),
    "on_prompt_logprobs": ("", lambda engine, handle: engine.send(_late_prompt(handle))),
    "on_end": ("retry_after", lambda engine, handle: engine.send(_end_without_reason(handle))),
    "on_lost": ("retry_after", lambda engine, _: engine.hang_up()),
}


@pytest.mark.parametrize("callback", CASES)
async def test_a_callback_that_raises_ends_the_request_at_once(callback: str, caplog: pytest.LogCaptureFixture) -> None:
    planted, act = CASES[callback]
    async with scripted_engine() as engine, engine.link() as link:
        submit = submit_frame([1, 2, 3])
        stream = request_stream(submit, "the-request", planted=planted)
        opened = link.open(submit, stream)
        stream.begin(opened, 60.0)
        with caplog.at_level(logging.ERROR):
            act(engine, opened.handle)
            with pytest.raises(ServerError) as caught:
                await asyncio.wait_for(stream.take(), 10.0)
        assert caught.value.request_id == "the-request"
        (record,) = caplog.records
        assert "the-request" in record.getMessage()
        assert record.exc_info is not None
        if callback in ("on_tokens", "on_prompt_logprobs"):
            await until(lambda: (opened.handle, engine_pb2.ABORT_REASON_INTERNAL) in engine.aborts)
