"""A client that nobody here wrote: `buf curl` learns the API by reflection and drives it over gRPC."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from pawl_server.frontend.auth import hash_key, new_key
from tests.fakes.front_end import RunningFrontEnd, front_end
from tests.fakes.tokenizer import write_checkpoint

BUF = Path(sys.executable).with_name("buf")
pytestmark = pytest.mark.skipif(not BUF.exists(), reason="buf is not installed beside this Python")

INVALID_ARGUMENT, NOT_FOUND, UNAUTHENTICATED = 3, 5, 16
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run of `buf curl` left: exit code, the messages on stdout, stderr."""

    exit_code: int
    messages: list[dict[str, Any]]
    errors: str


def _documents(text: str) -> list[dict[str, Any]]:
    """JSON documents that follow each other."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def _decoded(value: str) -> bytes:
    """Base64 as the Connect protocol has it, without padding."""
    return base64.b64decode(value + "=" * (-len(value) % 4))


async def _curl(server: RunningFrontEnd, method: str, request: Mapping[str, object], *flags: str) -> Answer:
    process = await asyncio.create_subprocess_exec(
        *(str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *flags),
        *("--data", json.dumps(request), f"http://{server.addresses.grpc}/{method}"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Answer(process.returncode, _documents(output.decode()), errors.decode())


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RunningFrontEnd]:
    async with front_end(write_checkpoint(tmp_path / "toy")) as running:
        yield running


async def test_generate(server: RunningFrontEnd) -> None:
    request = {
        "prompt": {"text": "hello"},
        "sampling": {"temperature": 0},
        "stop": {"maxOutputTokens": 5},
        "output": {"timings": True},
    }
    answer = await _curl(server, "pawl.v1.InferenceService/Generate", request)
    assert answer.exit_code == 0, answer.errors
    (message,) = answer.messages
    assert message["samples"] == [{"text": "cdefg", "finishReason": "FINISH_REASON_MAX_TOKENS"}]
    assert message["usage"] == {"promptTokens": 2, "cachedPromptTokens": 3, "outputTokens": 5}
    assert message["timings"]["total"].endswith("s")


async def test_stream_generate(server: RunningFrontEnd) -> None:
    request = {"request": {"prompt": {"text": "hello"}, "stop": {"maxOutputTokens": 6}}}
    answer = await _curl(server, "pawl.v1.InferenceService/StreamGenerate", request)
    assert answer.exit_code == 0, answer.errors
    first, *deltas, sample_end, end = answer.messages
    assert set(first) == {"start"}
    assert "".join(message["delta"]["text"] for message in deltas) == "cdefgh"
    assert sample_end["sampleEnd"]["finishReason"] == "FINISH_REASON_MAX_TOKENS"
    assert end["end"]["usage"]["outputTokens"] == 6


@pytest.mark.parametrize("name", ["", "liveness", "readiness", "pawl.v1.InferenceService"])
async def test_health(server: RunningFrontEnd, name: str) -> None:
    answer = await _curl(server, "grpc.health.v1.Health/Check", {"service": name})
    assert (answer.exit_code, answer.messages) == (0, [{"status": "SERVING"}]), answer.errors


async def test_health_of_an_unknown_service(server: RunningFrontEnd) -> None:
    answer = await _curl(server, "grpc.health.v1.Health/Check", {"service": "no.such.Service"})
    assert answer.exit_code == NOT_FOUND << 3, answer.errors


async def test_error_details_are_shown(server: RunningFrontEnd) -> None:
    request = {
        "prompt": {"text": "hello"},
        "sampling": {"topP": 2, "minP": -1},
        "options": {"requestId": "from-buf"},
    }
    answer = await _curl(server, "pawl.v1.InferenceService/Generate", request)
    # buf's exit code is the gRPC code, shifted past its own.
    assert answer.exit_code == INVALID_ARGUMENT << 3, answer.errors
    assert answer.messages == []
    (error,) = _documents(answer.errors)
    assert error["code"] == "invalid_argument"
    info, named, bad = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RequestInfo(),
        error_details_pb2.BadRequest(),
    )
    for message, detail in zip((info, named, bad), error["details"], strict=True):
        assert detail["type"] == message.DESCRIPTOR.full_name
        message.ParseFromString(_decoded(detail["value"]))
    assert (info.domain, named.request_id) == ("pawl", "from-buf")
    assert [violation.field for violation in bad.field_violations] == ["sampling.top_p", "sampling.min_p"]
    unknown = await _curl(server, "pawl.v1.ModelService/GetModel", {"name": "models/other"})
    assert unknown.exit_code == NOT_FOUND << 3, unknown.errors
    assert "google.rpc.ResourceInfo" in unknown.errors


async def test_only_public_services_are_listed(server: RunningFrontEnd) -> None:
    process = await asyncio.create_subprocess_exec(
        *(str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--list-services"),
        f"http://{server.addresses.grpc}",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(DEADLINE_S):
        output, _ = await process.communicate()
    listed = set(output.decode().split())
    assert {"pawl.v1.InferenceService", "pawl.v1.TokenizerService", "pawl.v1.ModelService"} <= listed
    assert not any("Admin" in name or "internal" in name for name in listed)


async def test_an_api_key_is_wanted(tmp_path: Path) -> None:
    key = new_key()
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[keys]]\nhash = "{hash_key(key)}"\ntenant = "acme"\n')
    request = {"prompt": {"text": "hello"}, "stop": {"maxOutputTokens": 2}}
    async with front_end(write_checkpoint(tmp_path / "toy"), api_key_file=str(keys)) as server:
        method = "pawl.v1.InferenceService/Generate"
        assert (await _curl(server, method, request)).exit_code == UNAUTHENTICATED << 3
        answer = await _curl(server, method, request, "--header", f"authorization: Bearer {key}")
    assert answer.exit_code == 0, answer.errors
