"""The front end's view of the fleet, over real sockets on loopback."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pawl.errors import Unauthenticated, Unavailable
from pawl_server.config import Config
from pawl_server.fleet.replicas import EventLog
from pawl_server.fleet.service import FleetServer, FleetService
from pawl_server.fleet.specs import engine_specs
from pawl_server.fleet.supervisor import RestartPolicy, Supervisor
from pawl_server.fleet.watch import FleetWatch
from pawl_server.internal.v1 import fleet_pb2
from tests.fakes.replica_launcher import FakeLauncher, settle
from tests.fakes.waiting import until

TOKEN = "a-shared-token"
DEADLINE_S = 20.0


@asynccontextmanager
async def serving(launcher: FakeLauncher, port: int = 0, first_incarnation: int = 1) -> AsyncIterator[int]:
    policy = RestartPolicy(start_timeout_s=60.0, backoff_initial_s=0.01, backoff_max_s=0.1)
    specs = engine_specs(Config().replace(replicas=2), TOKEN, 1)
    supervisor = Supervisor(specs, launcher, policy, EventLog(), first_incarnation=first_incarnation)
    server = FleetServer(FleetService(supervisor, "somewhere/model", "model"), TOKEN)
    bound = await server.start("127.0.0.1", port)
    supervisor.start()
    await settle()
    try:
        yield bound
    finally:
        await supervisor.stop(0.0)
        await server.stop()


def states(view: fleet_pb2.WatchReplicasResponse | None) -> list[str]:
    names = [fleet_pb2.ReplicaState.Name(replica.state) for replica in view.replicas] if view else []
    return [name.removeprefix("REPLICA_STATE_") for name in names]


def incarnations(view: fleet_pb2.WatchReplicasResponse | None) -> list[int]:
    return [replica.incarnation for replica in view.replicas] if view else []


async def test_the_whole_list_comes_at_once_and_again_with_every_change() -> None:
    launcher = FakeLauncher()
    async with serving(launcher) as port:
        lists: list[list[str]] = []
        async with FleetWatch(f"127.0.0.1:{port}", TOKEN, "test", lambda v: lists.append(states(v))) as watch:
            view = await watch.first(DEADLINE_S)
            assert (view.model_source, view.model_id) == ("somewhere/model", "model")
            assert states(view) == ["STARTING", "STARTING"]
            ready = await launcher.become_ready(1)
            await until(lambda: states(watch.view) == ["STARTING", "READY"])
            assert watch.view is not None
            assert watch.view.replicas[1].address == ready.addresses.address
            ready.death.set_result("crashed")
            await until(lambda: states(watch.view) == ["STARTING", "STARTING"])
            assert watch.view.replicas[1].incarnation == 2
            assert watch.connected
        assert lists[0] == ["STARTING", "STARTING"]


async def test_a_fleet_that_restarts_is_found_again_and_its_list_is_kept_meanwhile() -> None:
    launcher = FakeLauncher(automatic=True)
    async with serving(launcher) as port:
        watch = FleetWatch(f"127.0.0.1:{port}", TOKEN, "test")
        await watch.__aenter__()
        await until(lambda: states(watch.view) == ["READY", "READY"])
    try:
        await until(lambda: not watch.connected)
        assert watch.view is not None
        last = watch.view
        async with serving(FakeLauncher(automatic=True), port, first_incarnation=500):
            await until(lambda: watch.connected and watch.view is not last)
            await until(lambda: incarnations(watch.view) == [500, 500])
    finally:
        await watch.__aexit__(None, None, None)


async def test_a_wrong_token_is_refused_and_says_so() -> None:
    async with serving(FakeLauncher()) as port, FleetWatch(f"127.0.0.1:{port}", "wrong", "test") as watch:
        with pytest.raises(Unauthenticated):
            await watch.first(DEADLINE_S)
        assert watch.view is None


async def test_no_fleet_within_the_time_is_unavailable_with_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    async with FleetWatch(f"127.0.0.1:{port}", TOKEN, "test") as watch:
        with pytest.raises(Unavailable, match=str(port)):
            await watch.first(0.2)


async def test_a_second_fleet_on_the_port_fails_loudly() -> None:
    async with serving(FakeLauncher()) as port:
        with pytest.raises(Unavailable, match="in use") as caught:
            async with serving(FakeLauncher(), port):
                pass
        assert caught.value.reason == "PORT_IN_USE"
