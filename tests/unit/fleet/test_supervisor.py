"""The life of a replica, with a launcher and a clock driven by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from pawl_server.config import Config
from pawl_server.engine.spec import EngineProgress
from pawl_server.fleet.replicas import EventLog, ReplicaChanged, ReplicaProgress, ReplicaState
from pawl_server.fleet.specs import engine_specs
from pawl_server.fleet.supervisor import Backoff, RestartPolicy, Supervisor
from tests.fakes.replica_launcher import FakeClock, FakeLauncher, settle

POLICY = RestartPolicy(start_timeout_s=100.0, backoff_initial_s=1.0, backoff_max_s=8.0, stable_s=60.0)


@dataclass
class Fleet:
    supervisor: Supervisor
    launcher: FakeLauncher
    clock: FakeClock
    events: EventLog

    @property
    def states(self) -> list[str]:
        return [status.state.value for status in self.supervisor.statuses]

    async def changes(self) -> list[ReplicaChanged]:
        batch = await self.events.after(0, timeout_s=0.0)
        return [event for event in batch.events if isinstance(event, ReplicaChanged)]


@asynccontextmanager
async def fleet(replicas: int = 1, *, automatic: bool = False, first_incarnation: int = 1) -> AsyncIterator[Fleet]:
    clock, launcher, events = FakeClock(), FakeLauncher(automatic=automatic), EventLog()
    specs = engine_specs(Config().replace(replicas=replicas), "token", 1)
    supervisor = Supervisor(
        specs,
        launcher,
        POLICY,
        events,
        first_incarnation=first_incarnation,
        clock=clock,
        sleep=clock.sleep,
    )
    supervisor.start()
    await settle()
    try:
        yield Fleet(supervisor, launcher, clock, events)
    finally:
        await supervisor.stop(0.0)


async def test_a_start_ends_in_ready_with_the_addresses() -> None:
    async with fleet() as it:
        assert it.states == ["STARTING"]
        assert it.supervisor.statuses[0].address == ""
        replica = await it.launcher.become_ready()
        status = it.supervisor.statuses[0]
        assert (status.state, status.incarnation, status.restart_count) == (ReplicaState.READY, 1, 0)
        assert status.address == replica.addresses.address
        assert status.metrics_address == replica.addresses.metrics_address
        assert status.process_id == replica.addresses.process_id


async def test_a_dead_replica_is_killed_whole_and_rebuilt_as_the_next_incarnation() -> None:
    async with fleet() as it:
        first = await it.launcher.become_ready()
        first.death.set_result("was killed by SIGKILL")
        await settle()
        status = it.supervisor.statuses[0]
        assert (status.state, status.detail) == (ReplicaState.BACKOFF, "was killed by SIGKILL")
        assert status.address == ""
        assert first.kills == 1
        await it.clock.advance(0.9)
        assert it.states == ["BACKOFF"]
        await it.clock.advance(0.2)
        assert it.states == ["STARTING"]
        await it.launcher.become_ready()
        status = it.supervisor.statuses[0]
        assert (status.state, status.incarnation, status.restart_count) == (ReplicaState.READY, 2, 1)
        assert [spec.incarnation for spec in it.launcher.specs] == [1, 2]
        shown = [(event.status.state.value, event.restart_reason) for event in await it.changes()]
        assert shown == [
            ("STARTING", ""),
            ("READY", ""),
            ("DEAD", ""),
            ("BACKOFF", "died"),
            ("STARTING", ""),
            ("READY", ""),
        ]


async def test_a_crash_loop_waits_longer_and_longer_up_to_the_bound_and_a_stable_life_resets_it() -> None:
    async with fleet(automatic=True) as it:
        waits = []
        for _ in range(6):
            it.launcher.replicas[-1].death.set_result("crashed")
            await settle()
            wait_s = it.clock.wakes_in
            assert wait_s is not None
            waits.append(wait_s)
            await it.clock.advance(wait_s)
        assert waits == [1, 2, 4, 8, 8, 8]
        await it.clock.advance(POLICY.stable_s)
        it.launcher.replicas[-1].death.set_result("crashed")
        await settle()
        assert it.clock.wakes_in == 1


async def test_a_start_that_takes_too_long_is_undone_and_tried_again() -> None:
    async with fleet() as it:
        assert it.launcher.progress is not None
        it.launcher.progress(EngineProgress(step="weights", text="reading"))
        await it.clock.advance(POLICY.start_timeout_s)
        assert it.launcher.num_cancelled == 1
        status = it.supervisor.statuses[0]
        assert status.state is ReplicaState.BACKOFF
        assert "100 s" in status.detail
        assert "weights reading" in status.detail
        assert (await it.changes())[-1].restart_reason == "start_timeout"
        await it.clock.advance(1.0)
        await it.launcher.become_ready()
        assert it.states == ["READY"]


async def test_a_first_start_that_reports_its_cause_gives_up_at_once() -> None:
    async with fleet(2) as it:
        await it.launcher.fail(1)
        last = (await it.changes())[-1]
        assert (last.status.index, last.status.state, last.gives_up) == (1, ReplicaState.DEAD, True)
        assert "no such folder" in last.status.detail
        await it.clock.advance(1000.0)
        assert len([spec for spec in it.launcher.specs if spec.replica == 1]) == 1


async def test_a_first_start_that_dies_without_a_word_is_tried_three_times() -> None:
    async with fleet() as it:
        for tries in range(3):
            await it.launcher.fail(reported=False, reason="DIED_AT_START")
            assert (await it.changes())[-1].gives_up == (tries == 2)
            if tries < 2:
                await it.clock.advance(POLICY.backoff_max_s)
        assert len(it.launcher.specs) == 3


async def test_a_replica_that_served_once_is_tried_for_ever_whatever_its_next_start_reports() -> None:
    async with fleet() as it:
        (await it.launcher.become_ready()).death.set_result("crashed")
        for _ in range(10):
            await it.clock.advance(POLICY.backoff_max_s)
            await it.launcher.fail()
        assert it.states == ["BACKOFF"]
        assert (await it.changes())[-1].restart_reason == "start_failed"
        assert it.supervisor.statuses[0].incarnation == 11


async def test_stop_drains_what_serves_and_undoes_what_starts_or_waits() -> None:
    async with fleet(3) as it:
        ready = await it.launcher.become_ready(0)
        (await it.launcher.become_ready(1)).death.set_result("crashed")
        await settle()
        assert it.states == ["READY", "BACKOFF", "STARTING"]
        await it.supervisor.stop(7.0)
        assert ready.stopped_with == 7.0
        assert it.launcher.num_cancelled == 1
        assert it.states == ["DEAD", "DEAD", "DEAD"]
        states = [event.status.state.value for event in await it.changes() if event.status.index == 0]
        assert states[-2:] == ["DRAINING", "DEAD"]
        num_starts = len(it.launcher.specs)
        await it.clock.advance(1000.0)
        assert len(it.launcher.specs) == num_starts


async def test_replicas_do_not_disturb_each_other() -> None:
    async with fleet(2) as it:
        first = await it.launcher.become_ready(0)
        await it.launcher.become_ready(1)
        first.death.set_result("crashed")
        await settle()
        assert it.states == ["BACKOFF", "READY"]


async def test_incarnations_of_a_fleet_that_front_ends_outlive_begin_at_a_number_of_its_own() -> None:
    async with fleet(automatic=True, first_incarnation=1_000) as it:
        it.launcher.replicas[0].death.set_result("crashed")
        await settle()
        await it.clock.advance(1.0)
        assert [spec.incarnation for spec in it.launcher.specs] == [1_000, 1_001]
        assert it.supervisor.statuses[0].restart_count == 1


async def test_progress_reaches_the_log_with_its_replica() -> None:
    async with fleet() as it:
        assert it.launcher.progress is not None
        it.launcher.progress(EngineProgress(step="weights", done=1, total=3))
        it.launcher.progress(EngineProgress(step="weights", done=2, total=3))  # too soon to be worth an event
        it.launcher.progress(EngineProgress(step="weights", done=3, total=3))
        batch = await it.events.after(1, timeout_s=0.0)
        assert [event for event in batch.events if isinstance(event, ReplicaProgress)] == [
            ReplicaProgress(replica=0, incarnation=1, progress=EngineProgress(step="weights", done=done, total=3))
            for done in (1, 3)
        ]


async def test_changed_returns_at_the_next_change_alone() -> None:
    async with fleet() as it:
        revision = it.supervisor.revision
        await it.launcher.become_ready()
        await it.supervisor.changed(revision)
        assert it.supervisor.revision > revision


@given(
    initial=st.floats(0.01, 10),
    longest=st.floats(10, 100),
    served=st.lists(st.floats(0, 120), max_size=30),
)
def test_backoff_grows_by_doubling_stays_bounded_and_starts_again_after_a_stable_life(
    initial: float, longest: float, served: list[float]
) -> None:
    backoff = Backoff(
        RestartPolicy(start_timeout_s=1.0, backoff_initial_s=initial, backoff_max_s=longest, stable_s=60.0)
    )
    expected = initial
    for served_s in served:
        expected = initial if served_s >= 60.0 else expected
        assert backoff.next_wait(served_s) == min(expected, longest)
        expected = min(expected * 2, 1e9)
