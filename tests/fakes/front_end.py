"""A whole front end in this process, with real sockets on both sides: fake fleet and engines behind, stubs before."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from pawl.v1 import admin_pb2_grpc, inference_pb2_grpc, model_pb2_grpc, tokenizer_pb2_grpc
from pawl_server.config import Config, Value
from pawl_server.frontend.main import FrontendAddresses, run_frontend
from tests.fakes.fake_engine import TOKEN, FakeEngine
from tests.fakes.fake_fleet import FakeFleet, fakes

__all__ = ["RunningFrontEnd", "front_end", "health_stub", "scrape", "settings_for"]


@dataclass
class RunningFrontEnd:
    """What a test talks to."""

    addresses: FrontendAddresses
    channel: grpc.aio.Channel
    admin_channel: grpc.aio.Channel
    inference: inference_pb2_grpc.InferenceServiceAsyncStub
    tokenizer: tokenizer_pb2_grpc.TokenizerServiceAsyncStub
    models: model_pb2_grpc.ModelServiceAsyncStub
    admin: admin_pb2_grpc.AdminServiceAsyncStub
    engines: list[FakeEngine]
    fleet: FakeFleet
    stop: asyncio.Event
    task: asyncio.Task[int]

    @property
    def engine(self) -> FakeEngine:
        """The first engine."""
        return self.engines[0]


def scrape(server: RunningFrontEnd) -> str:
    """Read its metrics."""
    with urllib.request.urlopen(f"http://{server.addresses.metrics}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def health_stub(channel: grpc.aio.Channel) -> Any:
    """grpc.health.v1, whose stub has no type for its calls."""
    return health_pb2_grpc.HealthStub(channel)


def settings_for(**settings: Value) -> Config:
    """Settings with free ports and a short drain."""
    defaults: dict[str, Value] = {"port": 0, "admin_port": 0, "metrics_port": 0, "drain_grace_s": 1.0}
    return Config().replace(**(defaults | settings))


@contextlib.asynccontextmanager
async def front_end(
    checkpoint: Path, *, num_engines: int = 1, wait_ready: bool = True, **settings: Value
) -> AsyncIterator[RunningFrontEnd]:
    """Start fleet, engines and front end; stop them in the other order."""
    async with fakes(str(checkpoint), num_engines) as (fleet, engines):
        stop = asyncio.Event()
        ready: asyncio.Future[FrontendAddresses] = asyncio.get_running_loop().create_future()
        work = run_frontend(settings_for(**settings), fleet.address, TOKEN, ready.set_result, stop)
        task = asyncio.create_task(work)
        try:
            either: set[asyncio.Future[Any]] = {task, ready}
            await asyncio.wait(either, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            addresses = ready.result()
            async with (
                grpc.aio.insecure_channel(addresses.grpc) as channel,
                grpc.aio.insecure_channel(addresses.admin) as admin_channel,
            ):
                yield RunningFrontEnd(
                    addresses,
                    channel,
                    admin_channel,
                    inference_pb2_grpc.InferenceServiceStub(channel),
                    tokenizer_pb2_grpc.TokenizerServiceStub(channel),
                    model_pb2_grpc.ModelServiceStub(channel),
                    admin_pb2_grpc.AdminServiceStub(admin_channel),
                    engines,
                    fleet,
                    stop,
                    task,
                )
        finally:
            stop.set()
            async with asyncio.timeout(20):
                await task
