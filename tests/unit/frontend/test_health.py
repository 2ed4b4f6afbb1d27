"""What health says, asked as a probe asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pawl_server.frontend.health import Health

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class _Core:
    """Serves, or does not, or fails to say."""

    def __init__(self) -> None:
        self.answer: bool | Exception = True

    def __call__(self) -> bool:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@asynccontextmanager
async def _asked(health: Health) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            yield health_pb2_grpc.HealthStub(channel)
        finally:
            await server.stop(None)


async def _status(stub: Any, service: str) -> int:
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return int(answer.status)


async def _until(stub: Any, service: str, wanted: int) -> None:
    async with asyncio.timeout(10):
        async for answer in stub.Watch(health_pb2.HealthCheckRequest(service=service)):
            if answer.status == wanted:
                return


async def test_nothing_is_said_to_serve_before_it_does() -> None:
    """The library's servicer begins with SERVING for the empty name."""
    core = _Core()
    core.answer = False
    health = Health(core, ["pawl.v1.Some"])
    await health.look()
    async with _asked(health) as stub:
        for service in ("", "readiness", "pawl.v1.Some"):
            assert await _status(stub, service) == NOT_SERVING
        assert await _status(stub, "liveness") == SERVING


async def test_what_cannot_be_found_out_is_not_serving_until_it_can(caplog: pytest.LogCaptureFixture) -> None:
    core = _Core()
    health = Health(core, ["pawl.v1.Some"])
    task = asyncio.create_task(health.run())
    async with _asked(health) as stub:
        await _until(stub, "readiness", SERVING)
        core.answer = ValueError("planted")
        health.news.set()
        for service in ("", "readiness", "pawl.v1.Some"):
            await _until(stub, service, NOT_SERVING)
        assert await _status(stub, "liveness") == SERVING
        await health.look()
        await health.look()
        assert sum("health cannot be found out" in record.getMessage() for record in caplog.records) == 1
        core.answer = True
        health.news.set()
        for service in ("", "readiness", "pawl.v1.Some"):
            await _until(stub, service, SERVING)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
