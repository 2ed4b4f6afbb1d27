"""A front-end process holds neither torch nor Ray nor any part of the engine, the scheduler or a worker."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from pawl.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from tests.fakes.fake_engine import TOKEN, FakeEngine
from tests.fakes.fake_fleet import FakeFleet, fakes
from tests.fakes.servers import ROOT, RunningServer, pawl_frontend
from tests.fakes.tokenizer import write_checkpoint

FORBIDDEN = (
    "torch",
    "ray",
    "transformers",
    "pawl_server.engine.loop",
    "pawl_server.engine.engine",
    "pawl_server.engine.replica",
    "pawl_server.engine.process",
    "pawl_server.scheduler",
    "pawl_server.kv.block_pool",
    "pawl_server.kv.draft",
    "pawl_server.fleet.ray_fleet",
    "pawl_server.fleet.local_fleet",
    "pawl_workers.worker",
    "pawl_workers.forward",
)
# Python imports this by name when it starts; it tells at the end what the process had imported.
LISTER = """\
import atexit, json, os, sys
def tell():
    with open(os.environ["MODULES_FILE"], "w") as file:
        json.dump(sorted(sys.modules), file)
atexit.register(tell)
"""


@pytest.fixture
async def behind(tmp_path: Path) -> AsyncIterator[tuple[FakeFleet, list[FakeEngine]]]:
    async with fakes(str(write_checkpoint(tmp_path / "toy"))) as fleet_and_engines:
        yield fleet_and_engines


async def test_a_serving_front_end_has_imported_no_engine(
    behind: tuple[FakeFleet, list[FakeEngine]], tmp_path: Path
) -> None:
    fleet, engines = behind
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(LISTER)
    listing = tmp_path / "modules.json"
    paths = [tmp_path / "hook", *(ROOT / part for part in ("client", "server", "workers"))]
    variables = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "MODULES_FILE": str(listing),
        "PAWL_INTERNAL_TOKEN": TOKEN,
    }
    running = pawl_frontend(fleet.address, variables=variables)
    server: RunningServer = await asyncio.to_thread(running.__enter__)
    try:
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.GenerateRequest(
                prompt=types_pb2.Prompt(text="hello"), stop=types_pb2.StopParams(max_output_tokens=4)
            )
            answer = await stub.Generate(request, timeout=30)
        assert answer.usage.output_tokens == 4
        assert len(engines[0].submits) == 1
        assert await asyncio.to_thread(server.stop) == 0, server.errors
    finally:
        await asyncio.to_thread(running.__exit__, None, None, None)
    modules: list[str] = json.loads(listing.read_text())
    assert "pawl_server.frontend.service" in modules
    held = [name for name in modules if any(name == word or name.startswith(f"{word}.") for word in FORBIDDEN)]
    assert held == []
