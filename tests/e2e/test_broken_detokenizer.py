"""A tokenizer whose decoder panics over a token: the requests that meet it fail, the others never notice."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from pawl.errors import PawlError
from pawl.status import from_status
from pawl.v1 import inference_pb2, tokenizer_pb2, types_pb2
from pawl_server.internal.v1 import engine_pb2
from tests.fakes.fake_engine import ids_of
from tests.fakes.front_end import RunningFrontEnd, front_end
from tests.fakes.tokenizer import write_checkpoint


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RunningFrontEnd]:
    """The decoder cuts off two x at the end of each token, and panics over a token that is one."""
    path = write_checkpoint(tmp_path / "toy") / "tokenizer.json"
    decoder = {"type": "Strip", "content": "x", "start": 0, "stop": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": decoder}))
    async with front_end(path.parent) as running:
        yield running


def _request(request_id: str, num_tokens: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt=types_pb2.Prompt(text="hello"),
        stop=types_pb2.StopParams(max_output_tokens=num_tokens),
        options=types_pb2.RequestOptions(request_id=request_id),
    )


async def _fails(call: Any) -> PawlError:
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    status = await rpc_status.aio.from_call(call)
    assert status is not None
    return from_status(status)


async def test_a_panic_over_a_new_token_fails_its_request_alone(
    server: RunningFrontEnd, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.reply = lambda submit: ids_of("abxcd" if submit.max_output_tokens == 5 else "abcdefg")
    server.engine.hold_after = 1  # both run when the token comes
    broken, sound = (server.inference.Generate(_request(*asked)) for asked in (("broken", 5), ("sound", 7)))
    await server.engine.seen(lambda: len(server.engine.submits) == 2)
    server.engine.release.set()
    error = await _fails(broken)
    assert (error.status, error.request_id) == (grpc.StatusCode.INTERNAL, "broken")
    assert (await sound).samples[0].text == "abcdefg"
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == "request broken: the stream failed"
    assert record.exc_info is not None
    await server.engine.seen(
        lambda: [reason for _, reason in server.engine.aborts] == [engine_pb2.ABORT_REASON_INTERNAL]
    )


async def test_tokens_that_the_decoder_breaks_over_are_their_callers_mistake(server: RunningFrontEnd) -> None:
    sequences = [types_pb2.TokenIds(ids=ids_of("ax"))]
    error = await _fails(server.tokenizer.Detokenize(tokenizer_pb2.DetokenizeRequest(sequences=sequences)))
    assert (error.status, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "TOKENIZER_REFUSED")
    assert "the model's tokenizer cannot decode the tokens: " in str(error)
