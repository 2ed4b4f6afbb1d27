"""`pawl serve` as it comes: with a local Ray."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e import serve_story
from tests.fakes.servers import FREE_PORTS, SMALL, RunningServer, environment, launch_pawl, pawl_serve
from tests.fakes.waiting import wait_until

pytestmark = pytest.mark.ray

_FRONT_END = "pawl_server.serve.frontend_child"
_ENGINE = "ray::EngineReplica"


def _listens_at(server: RunningServer) -> set[str]:
    """Addresses on which any process of the server listens."""
    found = set()
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(str(connection.laddr.ip))
    return found


def _command_lines(server: RunningServer) -> dict[int, list[str]]:
    """Of every process of the server, by its id."""
    found = {}
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            found[process.pid] = process.cmdline()
    return found


def _useless(server: RunningServer) -> list[str]:
    """Processes of Ray that take time from the model and do nothing for pawl."""
    helpers = {"log_monitor.py", "monitor.py", "dashboard.py"}
    parts = [part for line in _command_lines(server).values() for part in line]
    return [part for part in parts if Path(part).name in helpers or part.startswith("ray::IDLE")]


def test_a_life_in_ray() -> None:
    """Answers through Ray, rebuilds a lost replica, drains; no process and no Ray is left."""
    with pawl_serve(fleet="ray") as server:
        serve_story.answers(server)
        wait_until(lambda: not _useless(server))
        front_ends = [number for number, line in _command_lines(server).items() if _FRONT_END in line]
        assert front_ends
        assert all("-event_engine_listener" in psutil.Process(n).environ()["GRPC_EXPERIMENTS"] for n in front_ends)
        assert all(os.sched_getscheduler(number) == os.SCHED_BATCH for number in front_ends)
        engines = [number for number, line in _command_lines(server).items() if line[0].startswith(_ENGINE)]
        assert engines
        # A step goes before what is made of its tokens, unless all of this runs at a lower priority already.
        assert all(psutil.Process(n).nice() <= psutil.Process(f).nice() for n in engines for f in front_ends)
        assert all(ipaddress.ip_address(host.removeprefix("::ffff:")).is_loopback for host in _listens_at(server))
        serve_story.survives_the_loss_of_an_engine(server)
        serve_story.drains_on_sigterm(server)
        # Ray's handler of crashes, which would print a stack trace and abort a drain, is out of the way.
        assert "*** SIGTERM" not in server.errors
        # Nor does what was turned off report that it has failed.
        assert "autoscaler" not in server.output


_CLUSTER_VARIABLES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # so told, Ray listens on 127.0.0.1 alone
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0" * 64,
}
_CLUSTER = """
import sys, ray
for attempt in range(2):
    try:
        context = ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        break
    except Exception:  # its node took more than 30 s to register: a busy machine
        ray.shutdown()
        if attempt:
            raise
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _cluster() -> Iterator[tuple[str, psutil.Process]]:
    """Somebody else's Ray, on loopback: its address, and the process that it ends with."""
    variables = environment({"RAY_USAGE_STATS_ENABLED": "0", **_CLUSTER_VARIABLES})
    command = [sys.executable, "-c", _CLUSTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.stdin.close()
            process.wait(60.0)


def _actors_of(cluster: psutil.Process) -> set[str]:
    """Classes of pawl's actors that run in it."""
    found = set()
    for process in cluster.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            name = process.cmdline()[:1] or [""]
            found |= {actor for actor in ("EngineReplica", "_FleetActor") if name[0].startswith(f"ray::{actor}")}
    return found


def test_a_life_in_a_cluster() -> None:
    """Joins a Ray of somebody else's, serves, drains, and leaves no actor there."""
    with _cluster() as (address, cluster):
        where = ("--ray-address", address, "--cpus-per-replica=1")
        with pawl_serve(*where, fleet="ray", variables=_CLUSTER_VARIABLES) as server:
            serve_story.answers(server)
            assert _actors_of(cluster) == {"EngineReplica", "_FleetActor"}
            serve_story.drains_on_sigterm(server)
        wait_until(lambda: not _actors_of(cluster))


def test_a_killed_server_takes_its_engines_along() -> None:
    with pawl_serve(fleet="ray") as server:
        try:
            engines = server.engines()
            assert engines
            server.signal(signal.SIGKILL)
            _, alive = psutil.wait_procs(engines, timeout=30.0)
            assert alive == []
        finally:
            server.kill()  # helpers of Ray see its end later


def test_a_stop_while_ray_starts_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM before READY: exit code 0, no Ray left half-way."""
    server = launch_pawl("serve", "--fleet=ray", *FREE_PORTS, *SMALL, folder=tmp_path)
    try:
        wait_until(lambda: any(process.name() == "gcs_server" for process in server.processes()))
        server.signal(signal.SIGTERM)

        def ended() -> bool:
            server.processes()  # what it still starts is recorded, too
            return server.process.poll() is not None

        wait_until(ended)
        assert server.wait() == 0, server.errors
        assert "READY" not in server.output
        assert server.leftovers() == []
    finally:
        server.kill()
