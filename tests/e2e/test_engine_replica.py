"""The engine as a Ray actor: start, serve over the link, stop; and what its stream says."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import psutil
import pytest

from pawl_server.engine.link.client import EngineLink
from pawl_server.engine.link.stopping import ask_to_stop
from pawl_server.engine.spec import EngineEvent, EngineFailed, EngineProgress, EngineReady, decode_event, encode
from pawl_server.fleet.launcher import LaunchError
from pawl_server.internal.v1 import engine_pb2, engine_pb2_grpc
from tests.fakes.engine_harness import ended, expected_output, open_stream
from tests.fakes.engine_worker import fake_spec, load_fake_worker
from tests.fakes.ray_marks import RAY
from tests.fakes.waiting import wait_until

if TYPE_CHECKING:
    from ray import ObjectRefGenerator

    from pawl_server.fleet.ray_replica import RayReplica

ray = pytest.importorskip("ray")
pytestmark = RAY


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    from pawl_server.fleet.ray_session import end_ray, start_ray

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    start_ray(num_cpus=2)
    yield
    end_ray()


async def _told(stream: ObjectRefGenerator) -> list[EngineEvent]:
    """What the actor says until it serves or has ended."""
    events = []
    async for reference in stream:
        events.append(decode_event(await reference))
        if isinstance(events[-1], EngineReady):
            break
    return events


async def _ready(stream: ObjectRefGenerator) -> EngineReady:
    ready = (await _told(stream))[-1]
    assert isinstance(ready, EngineReady)
    return ready


async def test_a_replica_starts_serves_and_stops(local_ray: None) -> None:
    from pawl_server.engine.replica import ReplicaActor

    actor = ReplicaActor.options(num_cpus=0).remote(load_fake_worker)
    stream = actor.run.remote(encode(fake_spec(replica=1)))
    *steps, ready = await _told(stream)
    assert [e.step for e in steps if isinstance(e, EngineProgress) and e.done == e.total] == [
        "weights",
        "memory",
        "warm-up",
        "self-test",
    ]
    assert isinstance(ready, EngineReady)
    addresses = ready.addresses
    async with EngineLink(addresses.address, "secret", "test") as link:
        woken = 0
        for generation in range(21):
            _, recorder = open_stream(link, [4, 5], 100)
            await ended(recorder)
            assert recorder.token_ids == expected_output([4, 5], 100)
            if generation == 0:  # what followed its last word is over
                woken = _wakes_of_main_thread(addresses.process_id)
        assert link.welcome.replica == 1
        # Ray wakes the main thread of an actor that waits for calls every 10 ms, hundreds of times meanwhile.
        assert _wakes_of_main_thread(addresses.process_id) - woken < 5
        with pytest.raises(grpc.aio.AioRpcError):
            async with grpc.aio.insecure_channel(addresses.address) as channel:
                await engine_pb2_grpc.EngineServiceStub(channel).Stop(engine_pb2.StopRequest())
        assert not link.closed.done()
        await ask_to_stop(addresses.address, "secret", 10.0)
        await link.closed
    assert await _told(stream) == []
    ray.kill(actor)


def _wakes_of_main_thread(process_id: int) -> int:
    status = Path(f"/proc/{process_id}/task/{process_id}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


async def test_a_start_that_fails_carries_its_cause(local_ray: None) -> None:
    from pawl_server.engine.replica import ReplicaActor

    actor = ReplicaActor.options(num_cpus=0).remote(load_fake_worker)
    failure = (await _told(actor.run.remote(encode(fake_spec(model="broken")))))[-1]
    assert isinstance(failure, EngineFailed)
    assert "planted load failure" in failure.message
    ray.kill(actor)


async def test_a_killed_replica_is_told_by_its_sentinel_and_by_its_link(local_ray: None) -> None:
    from pawl_server.engine.replica import ReplicaActor

    actor = ReplicaActor.options(num_cpus=0).remote(load_fake_worker)
    stream = actor.run.remote(encode(fake_spec()))
    addresses = (await _ready(stream)).addresses
    async with EngineLink(addresses.address, "secret", "test", heartbeat_timeout_s=60.0) as link:
        os.kill(addresses.process_id, signal.SIGKILL)
        with pytest.raises(ray.exceptions.ActorDiedError):
            await asyncio.wait_for(_told(stream), 30.0)
        await link.closed


async def _launch(replica: int) -> tuple[RayReplica, list[str]]:
    """A replica of the embedded model, and the steps of its start."""
    from pawl_server.fleet.ray_replica import RayLauncher

    steps: list[str] = []
    launcher = RayLauncher("test", num_cpus=1, num_gpus=0)
    spec = fake_spec(model="demo", replica=replica, num_threads=1)
    return await launcher.start(spec, lambda event: steps.append(event.step)), steps


async def test_a_launched_replica_stops_when_it_is_asked(local_ray: None) -> None:
    running, steps = await _launch(replica=1)
    assert list(dict.fromkeys(steps))[:2] == ["workers", "imports"]
    dying = asyncio.create_task(running.died())
    await running.stop(30.0)
    assert "stopped by itself" in await dying
    wait_until(lambda: not psutil.pid_exists(running.addresses.process_id))  # Ray collects it


async def test_a_launched_replica_that_hears_nothing_is_killed_after_the_grace(local_ray: None) -> None:
    running, _ = await _launch(replica=2)
    psutil.Process(running.addresses.process_id).suspend()
    await running.stop(0.1)
    wait_until(lambda: not psutil.pid_exists(running.addresses.process_id))  # Ray collects it
    assert "died" in await running.died()


async def test_a_launch_that_fails_carries_the_engines_own_words(local_ray: None) -> None:
    from pawl_server.fleet.ray_replica import RayLauncher

    with pytest.raises(LaunchError, match="no-such-model") as caught:
        await RayLauncher("test", num_cpus=1, num_gpus=0).start(fake_spec(model="./no-such-model"), lambda _: None)
    assert caught.value.reported
