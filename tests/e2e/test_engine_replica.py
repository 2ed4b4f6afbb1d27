"""The engine as a Ray actor: start, serve over the link, stop; and what its sentinel says."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from pawl_server.engine.link.client import EngineLink
from pawl_server.engine.spec import EngineProgress, decode_addresses, decode_event, encode
from tests.fakes.engine_harness import ended, expected_output, open_stream
from tests.fakes.engine_worker import fake_spec, load_fake_worker

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def _start_ray() -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    try:
        _start_ray()
    except Exception:  # what it raises when its node took more than 30 s to register: a busy machine
        ray.shutdown()
        _start_ray()
    yield
    ray.shutdown()


async def test_a_replica_starts_serves_and_stops(local_ray: None) -> None:
    from pawl_server.engine.replica import ReplicaActor

    actor = ReplicaActor.options(num_cpus=0).remote(load_fake_worker)
    addresses = decode_addresses(await actor.start.remote(encode(fake_spec(replica=1))))
    sentinel = actor.run.remote()
    steps = [decode_event(line) for line in await actor.progress.remote()]
    assert [e.step for e in steps if isinstance(e, EngineProgress)] == [
        "weights",
        "memory",
        "warm-up",
        "self-test",
    ]
    async with EngineLink(addresses.address, "secret", "test") as link:
        _, recorder = open_stream(link, [4, 5], 10)
        await ended(recorder)
        assert recorder.token_ids == expected_output([4, 5], 10)
        assert link.welcome.replica == 1
    await actor.stop.remote()
    assert await sentinel is None
    ray.kill(actor)


async def test_a_start_that_fails_carries_its_cause(local_ray: None) -> None:
    from pawl_server.engine.replica import ReplicaActor

    actor = ReplicaActor.options(num_cpus=0).remote(load_fake_worker)
    with pytest.raises(RuntimeError, match="planted load failure"):
        await actor.start.remote(encode(fake_spec(model="broken")))
    ray.kill(actor)


async def test_a_killed_replica_is_told_by_its_sentinel_and_by_its_link(local_ray: None) -> None:
    from pawl_server.engine.replica import ReplicaActor

    actor = ReplicaActor.options(num_cpus=0).remote(load_fake_worker)
    addresses = decode_addresses(await actor.start.remote(encode(fake_spec())))
    sentinel = actor.run.remote()
    async with EngineLink(addresses.address, "secret", "test", heartbeat_timeout_s=60.0) as link:
        os.kill(addresses.process_id, signal.SIGKILL)
        ready, _ = ray.wait([sentinel], timeout=30)
        assert ready == [sentinel]
        with pytest.raises(ray.exceptions.ActorDiedError):
            await sentinel
        await link.closed
