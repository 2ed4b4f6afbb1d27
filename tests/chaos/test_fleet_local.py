"""Replicas as subprocesses: started, killed, rebuilt, stopped; nothing is left of them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from pawl_server.engine.link.client import EngineLink
from pawl_server.engine.link.stopping import ask_to_stop
from pawl_server.engine.spec import EngineProgress, EngineSpec
from pawl_server.fleet.launcher import LaunchError
from pawl_server.fleet.local_fleet import LocalLauncher, LocalReplica
from pawl_server.fleet.replicas import EventLog, ReplicaState
from pawl_server.fleet.supervisor import RestartPolicy, Supervisor
from tests.fakes.engine_worker import fake_spec
from tests.fakes.waiting import until

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
LAUNCHER = LocalLauncher((sys.executable, "-m", "tests.fakes.engine_process"))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds the sources and the fakes."""
    monkeypatch.chdir(ROOT)
    paths = [str(ROOT / part) for part in ("client", "server", "workers", ".")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


Children = Callable[[], list[psutil.Process]]


@pytest.fixture
def children() -> Children:
    """What this process has started since the test began, and what that has."""
    before = set(psutil.Process().children(recursive=True))
    return lambda: [process for process in psutil.Process().children(recursive=True) if process not in before]


@asynccontextmanager
async def replica(spec: EngineSpec) -> AsyncIterator[tuple[LocalReplica, list[EngineProgress]]]:
    progress: list[EngineProgress] = []
    async with asyncio.timeout(DEADLINE_S):
        running = await LAUNCHER.start(spec, progress.append)
    try:
        yield running, progress
    finally:
        await running.kill()


async def test_a_replica_reports_its_start_serves_and_stops_in_order() -> None:
    async with replica(fake_spec(replica=3, num_threads=1)) as (running, progress):
        steps = list(dict.fromkeys(event.step for event in progress))
        assert steps == ["weights", "memory", "warm-up", "self-test"]
        async with EngineLink(running.addresses.address, "secret", "test") as link:
            assert link.welcome.replica == 3
        process = psutil.Process(running.addresses.process_id)
        assert process.environ()["OMP_WAIT_POLICY"] == "passive"
        assert process.environ()["OMP_NUM_THREADS"] == "1"
        dying = asyncio.create_task(running.died())
        await running.stop(10.0)
        assert "exit code 0" in await dying
        assert not process.is_running()


async def test_a_replica_that_is_asked_over_its_link_ends_in_order() -> None:
    async with replica(fake_spec()) as (running, _):
        dying = asyncio.create_task(running.died())
        await ask_to_stop(running.addresses.address, "secret", 10.0)
        assert "exit code 0" in await asyncio.wait_for(dying, DEADLINE_S)


async def test_the_death_of_a_replica_is_told_with_its_signal() -> None:
    async with replica(fake_spec()) as (running, _):
        dying = asyncio.create_task(running.died())
        os.kill(running.addresses.process_id, signal.SIGKILL)
        assert "SIGKILL" in await asyncio.wait_for(dying, DEADLINE_S)


async def test_a_replica_that_hears_no_signal_is_killed_after_the_grace() -> None:
    async with replica(fake_spec()) as (running, _):
        process = psutil.Process(running.addresses.process_id)
        process.suspend()
        await running.stop(0.1)
        assert not process.is_running()


async def test_a_start_that_fails_carries_the_engines_own_words(children: Children) -> None:
    with pytest.raises(LaunchError, match="planted load failure") as caught:
        async with replica(fake_spec(model="broken")):
            pass
    assert caught.value.reported
    assert children() == []


async def test_a_process_that_dies_at_its_start_leaves_the_end_of_its_log() -> None:
    code = "import sys; print('the last words', file=sys.stderr); sys.exit(3)"
    with pytest.raises(LaunchError, match="exit code 3") as caught:
        await LocalLauncher((sys.executable, "-c", code)).start(fake_spec(), lambda _: None)
    assert "the last words" in caught.value.failure.message
    assert not caught.value.reported


async def test_a_cancelled_start_leaves_nothing(children: Children) -> None:
    launcher = LocalLauncher((sys.executable, "-c", "import time; time.sleep(600)"))
    starting = asyncio.create_task(launcher.start(fake_spec(), lambda _: None))
    await until(lambda: len(children()) == 1)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert children() == []


async def test_a_killed_replica_is_rebuilt_and_serves_under_a_new_address(children: Children) -> None:
    policy = RestartPolicy(start_timeout_s=DEADLINE_S, backoff_initial_s=0.01, backoff_max_s=0.1)
    specs = [fake_spec(replica=0), fake_spec(replica=1)]
    supervisor = Supervisor(specs, LAUNCHER, policy, EventLog())
    supervisor.start()
    try:
        await until(lambda: all(status.state is ReplicaState.READY for status in supervisor.statuses))
        first, other = supervisor.statuses
        os.kill(first.process_id, signal.SIGKILL)
        await until(lambda: supervisor.statuses[0].incarnation == 2)
        assert supervisor.statuses[1] == other
        await until(lambda: supervisor.statuses[0].state is ReplicaState.READY)
        rebuilt = supervisor.statuses[0]
        assert rebuilt.process_id != first.process_id
        assert rebuilt.restart_count == 1
        async with EngineLink(rebuilt.address, "secret", "test") as link:
            assert link.welcome.replica == 0
    finally:
        await supervisor.stop(10.0)
    assert children() == []


async def test_engines_end_by_themselves_when_their_parent_is_killed() -> None:
    code = (
        "import asyncio, sys\n"
        "from pawl_server.fleet.local_fleet import LocalLauncher\n"
        "from tests.fakes.engine_worker import fake_spec\n"
        "async def main():\n"
        "    launcher = LocalLauncher((sys.executable, '-m', 'tests.fakes.engine_process'))\n"
        "    running = await launcher.start(fake_spec(), lambda _: None)\n"
        "    print(running.addresses.process_id, flush=True)\n"
        "    await running.died()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    engine = psutil.Process(int(await asyncio.wait_for(parent.stdout.readline(), DEADLINE_S)))
    parent.kill()
    await parent.wait()
    await until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
