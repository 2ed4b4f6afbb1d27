"""Everything malformed or oversized is refused with the right status and field, and the next good call succeeds."""

from __future__ import annotations

import asyncio
import dataclasses
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from pawl.errors import PawlError
from pawl.status import DOMAIN, from_status
from pawl.v1 import inference_pb2, types_pb2
from pawl_server.config import LimitSettings
from pawl_server.frontend.auth import hash_key, new_key
from tests.e2e.bad_generate_rows import GENERATE_ROWS
from tests.e2e.bad_input import LIMITS, Row, generate
from tests.e2e.bad_other_rows import OTHER_ROWS
from tests.fakes.front_end import RunningFrontEnd, front_end
from tests.fakes.tokenizer import write_checkpoint

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROWS = [*GENERATE_ROWS, *OTHER_ROWS]
DEADLINE_S = 5.0
KEY = new_key()
GOOD_KEY = (("authorization", f"Bearer {KEY}"),)
MAX_PRIORITY = 3


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningFrontEnd]:
    folder = tmp_path_factory.mktemp("bad-input")
    keys = folder / "keys.toml"
    keys.write_text(f'[[keys]]\nhash = "{hash_key(KEY)}"\ntenant = "acme"\nmax_priority = {MAX_PRIORITY}\n')
    checkpoint = write_checkpoint(folder / "toy")
    async with front_end(checkpoint, api_key_file=str(keys), **dataclasses.asdict(LIMITS)) as running:
        yield running


async def _outcome(server: RunningFrontEnd, row: Row) -> tuple[grpc.aio.AioRpcError, Any]:
    """The error of a row's call and its google.rpc.Status, which is None without details."""
    service, _, method = row.method.partition("/")
    streams = method.startswith(("Stream", "Watch"))
    invoke: Any
    if isinstance(row.request, bytes):
        channel: Any = server.admin_channel if service == "AdminService" else server.channel
        invoke = (channel.unary_stream if streams else channel.unary_unary)(f"/pawl.v1.{row.method}")
    else:
        stubs = {
            "InferenceService": server.inference,
            "TokenizerService": server.tokenizer,
            "ModelService": server.models,
            "AdminService": server.admin,
        }
        invoke = getattr(stubs[service], method)
    call = invoke(row.request, timeout=DEADLINE_S, metadata=row.metadata or GOOD_KEY)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if streams else call)
    return caught.value, await rpc_status.aio.from_call(call)


async def _works(server: RunningFrontEnd) -> None:
    request = generate(stop=types_pb2.StopParams(max_output_tokens=3))
    answer = await server.inference.Generate(request, timeout=DEADLINE_S, metadata=GOOD_KEY)
    assert answer.usage.output_tokens == 3


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_refused_with_status_and_fields(server: RunningFrontEnd, row: Row) -> None:
    before = len(server.engine.submits)
    error, status = await _outcome(server, row)
    assert error.code() is row.status, error.details()
    if row.by_grpc:
        assert status is None
    else:
        refused = from_status(status)
        assert tuple(violation.field for violation in refused.violations) == row.fields, refused
        assert refused.violations or row.reason or row.status is not grpc.StatusCode.INVALID_ARGUMENT
        _check_details(row, refused, status)
    assert len(server.engine.submits) == before, "it reached an engine"
    await _works(server)


def _check_details(row: Row, refused: PawlError, status: Any) -> None:
    assert refused.request_id
    assert refused.reason == row.reason if row.reason else refused.reason
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details if detail.Is(info.DESCRIPTOR))
    assert info.domain == DOMAIN
    if row.limit:
        setting = f"limits.{row.limit}"
        assert all(setting in violation.message for violation in refused.violations), refused
    assert "internal error" not in refused.message


async def test_every_limit_has_a_row() -> None:
    assert {row.limit for row in ROWS if row.limit} == {field.name for field in dataclasses.fields(LimitSettings)}
    assert len({row.name for row in ROWS}) == len(ROWS) >= 60


async def test_a_live_id_is_refused_and_the_first_call_goes_on(server: RunningFrontEnd) -> None:
    server.engine.hold_after = 1
    request = generate(
        stop=types_pb2.StopParams(max_output_tokens=4), options=types_pb2.RequestOptions(request_id="twice")
    )
    first = asyncio.ensure_future(server.inference.Generate(request, timeout=30, metadata=GOOD_KEY))
    await server.engine.seen(lambda: bool(server.engine.live))
    try:
        for method, message in (
            ("Generate", request),
            ("StreamGenerate", inference_pb2.StreamGenerateRequest(request=request)),
        ):
            row = Row("live-id", f"InferenceService/{method}", message)
            error, status = await _outcome(server, row)
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS
            assert from_status(status).reason == "REQUEST_ID_IN_USE"
    finally:
        server.engine.hold_after = None
        server.engine.release.set()
    assert (await first).usage.output_tokens == 4
    await _works(server)


async def test_a_compressed_message_counts_with_its_real_size(server: RunningFrontEnd) -> None:
    request = generate(prompt=types_pb2.Prompt(text="x" * 4_000_000))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.inference.Generate(
            request, timeout=DEADLINE_S, metadata=GOOD_KEY, compression=grpc.Compression.Gzip
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await _works(server)


async def test_no_refusal_left_anything_behind(server: RunningFrontEnd) -> None:
    def scrape() -> str:
        with urllib.request.urlopen(f"http://{server.addresses.metrics}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    text = await asyncio.to_thread(scrape)
    for gauge in ("pawl_frontend_streams_open", "pawl_frontend_requests_queued"):
        assert f'{gauge}{{model="toy"}} 0.0' in text
    assert not server.engine.live
    assert not server.engine.aborts
    assert 'outcome="error"' not in "\n".join(line for line in text.splitlines() if not line.endswith(" 0.0"))
