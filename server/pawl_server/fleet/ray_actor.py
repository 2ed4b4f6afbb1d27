"""What runs inside the fleet actor: the supervisor, its listener, and one placement group per replica.

Owns the groups (killing an actor does not free the group it made, so they are named, removed by the fleet, and
swept at its start) and the engine actors, which die with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from concurrent.futures import Future

import msgspec
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pawl_server.config import Config
from pawl_server.engine.replica import ReplicaActor
from pawl_server.engine.spec import (
    EngineAddresses,
    EngineFailed,
    EngineProgress,
    EngineSpec,
    decode_addresses,
    decode_event,
    encode,
)
from pawl_server.fleet.launcher import LaunchError, OnProgress
from pawl_server.fleet.replicas import EventLog, encode_batch
from pawl_server.fleet.service import FleetServer, FleetService
from pawl_server.fleet.specs import engine_specs, restart_policy, served_name
from pawl_server.fleet.supervisor import Supervisor
from pawl_server.logs import set_up_logs
from pawl_workers.parallel import thread_environment

__all__ = ["NAMESPACE", "FleetActor", "FleetPlan", "RayLauncher", "RayReplica", "encode_plan"]

log = logging.getLogger(__name__)

NAMESPACE = "pawl"
_PROGRESS_PERIOD_S = 0.2
_STOP_S = 5.0


class FleetPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that the fleet actor is told. Ray hands it to the actor again when it restarts it.

    Attributes:
        config: the settings.
        token: the shared token.
        name: of the actor; prefix of its placement groups.
        digest: of settings and token, to recognise the same fleet.
        port: where it listens.
        cores_per_replica: compute threads when num_threads is 0.
        gpus_per_replica: GPUs to reserve.
        first_incarnation: see Supervisor.
    """

    config: Config
    token: str
    name: str
    digest: str
    port: int
    cores_per_replica: int
    gpus_per_replica: float
    first_incarnation: int = 1

    def __repr__(self) -> str:
        return f"FleetPlan({self.name!r})"


_plan_decoder = msgspec.json.Decoder(FleetPlan)


def encode_plan(plan: FleetPlan) -> bytes:
    """JSON of a plan."""
    return msgspec.json.encode(plan)


class RayReplica:
    """One engine actor that serves; see supervisor.Running."""

    def __init__(
        self, actor: ray.actor.ActorHandle, group: PlacementGroup, addresses: EngineAddresses, node_id: str
    ) -> None:
        self._actor = actor
        self._group = group
        self._addresses = addresses
        self._node_id = node_id
        self._run_ref = actor.run.remote()  # the death sentinel

    @property
    def addresses(self) -> EngineAddresses:
        """Where it listens."""
        return self._addresses

    async def died(self) -> str:
        """Return, with the reason, once it is gone."""
        process_id = self._addresses.process_id
        try:
            await self._run_ref
        except RayTaskError as error:
            return _split_cause(error).message
        except RayActorError as error:
            return f"the engine process {process_id} died: {_first_line(error)}"
        return f"the engine process {process_id} stopped by itself"

    async def stop(self, grace_s: float) -> None:
        """Ask it to stop, wait, then kill it."""
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._actor.stop.remote()
        await self.kill()

    async def kill(self) -> None:
        """Kill it and free its resources."""
        ray.kill(self._actor, no_restart=True)
        if self._node_id == ray.get_runtime_context().get_node_id():
            # Ray asks the process to end, which one that is stopped or stuck in a kernel does not hear.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._addresses.process_id, signal.SIGKILL)
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await self._run_ref
        remove_placement_group(self._group)


class RayLauncher:
    """Starts one engine actor per replica, each in a placement group of its own.

    Args:
        name: prefix of the groups' names.
        num_cpus: CPUs to reserve per replica.
        num_gpus: GPUs to reserve per replica.
    """

    def __init__(self, name: str, num_cpus: float, num_gpus: float) -> None:
        self._name = name
        self._num_cpus = num_cpus
        self._num_gpus = num_gpus

    def sweep(self) -> None:
        """Remove the groups that a former fleet of this name left behind."""
        for facts in placement_group_table().values():
            if facts["name"].startswith(f"{self._name}-replica-") and facts["state"] != "REMOVED":
                log.warning("removing the orphaned placement group %s", facts["name"])
                with contextlib.suppress(ValueError):  # gone in between
                    remove_placement_group(get_placement_group(facts["name"]))

    async def start(self, spec: EngineSpec, on_progress: OnProgress) -> RayReplica:
        """See ReplicaLauncher."""
        bundle = {"CPU": self._num_cpus or 0.001}
        if self._num_gpus:
            bundle["GPU"] = self._num_gpus
        wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
        on_progress(EngineProgress(step="workers", text=f"waiting for {wanted} of the Ray cluster"))
        group = placement_group(
            [bundle], strategy="STRICT_PACK", name=f"{self._name}-replica-{spec.replica}-{spec.incarnation}"
        )
        actor = None
        try:
            await group.ready()
            actor = self._create_actor(spec, group)
            addresses = await self._started(actor, spec, on_progress)
        except BaseException:
            if actor is not None:
                ray.kill(actor, no_restart=True)
            remove_placement_group(group)
            raise
        node_id = placement_group_table(group)["bundles_to_node_id"][0]
        return RayReplica(actor, group, addresses, node_id)

    def _create_actor(self, spec: EngineSpec, group: PlacementGroup) -> ray.actor.ActorHandle:
        return ReplicaActor.options(
            num_cpus=self._num_cpus,
            num_gpus=self._num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            runtime_env={"env_vars": thread_environment(spec.num_threads)},
        ).remote()

    async def _started(
        self, actor: ray.actor.ActorHandle, spec: EngineSpec, on_progress: OnProgress
    ) -> EngineAddresses:
        """Start the engine in its actor, passing its progress on.

        Raises:
            LaunchError: it failed or died.
        """
        progress = _Progress(actor, on_progress)
        following = asyncio.create_task(progress.follow())
        try:
            return decode_addresses(await actor.start.remote(encode(spec)))
        except RayTaskError as error:
            raise LaunchError(_split_cause(error), reported=True) from error
        except RayActorError as error:
            words = f"the engine process of replica {spec.replica} died at its start: {_first_line(error)}"
            failure = EngineFailed(code="unavailable", reason="DIED_AT_START", message=words, detail=_log_hint())
            raise LaunchError(failure, reported=False) from error
        finally:
            following.cancel()
            await asyncio.wait({following})
            with contextlib.suppress(RayError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await progress.look()  # the steps that ended after the last look


class _Progress:
    """Follows the start of an engine actor, and tells each piece of news once."""

    def __init__(self, actor: ray.actor.ActorHandle, on_progress: OnProgress) -> None:
        self._actor = actor
        self._on_progress = on_progress
        self._seen: dict[str, EngineProgress] = {}

    async def look(self) -> None:
        """Ask once."""
        for line in await self._actor.progress.remote():
            event = decode_event(line)
            if isinstance(event, EngineProgress) and self._seen.get(event.step) != event:
                self._seen[event.step] = event
                self._on_progress(event)

    async def follow(self) -> None:
        """Ask until cancelled or the actor is gone."""
        with contextlib.suppress(RayError):
            while True:
                await self.look()
                await asyncio.sleep(_PROGRESS_PERIOD_S)


class _FleetActor:
    """The fleet. Runs on a thread of its own, so that its life does not hang on calls from outside."""

    def __init__(self, plan_json: bytes) -> None:
        self._plan = _plan_decoder.decode(plan_json)
        self._events = EventLog()
        self._ready: Future[str] = Future()
        self._loop = asyncio.new_event_loop()
        self._supervisor: Supervisor | None = None
        self._server: FleetServer | None = None
        set_up_logs(self._plan.config.log, "fleet")
        threading.Thread(target=self._work, name="pawl-fleet", daemon=True).start()

    def describe(self) -> tuple[str, str]:
        """Address and digest.

        Raises:
            RuntimeError: the fleet could not start.
        """
        return self._ready.result(), self._plan.digest

    def events(self, number: int) -> bytes:
        """An EventBatch from `number` on, as JSON; may be empty after a while."""
        self._ready.result()
        waiting = self._events.after(number, timeout_s=2.0)
        return encode_batch(asyncio.run_coroutine_threadsafe(waiting, self._loop).result())

    def stop(self, grace_s: float) -> None:
        """Stop the replicas and the listener."""
        asyncio.run_coroutine_threadsafe(self._stop(grace_s), self._loop).result()

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._ready.set_result(self._loop.run_until_complete(self._start()))
        except Exception as error:
            log.exception("the fleet cannot start")
            self._ready.set_exception(RuntimeError(str(error)))
            return
        self._loop.run_forever()

    async def _start(self) -> str:
        plan = self._plan
        fleet = plan.config.fleet
        launcher = RayLauncher(plan.name, fleet.cpus_per_replica, plan.gpus_per_replica)
        launcher.sweep()
        self._supervisor = Supervisor(
            engine_specs(plan.config, plan.token, plan.cores_per_replica),
            launcher,
            restart_policy(plan.config),
            self._events,
            first_incarnation=self._first_incarnation(),
        )
        service = FleetService(self._supervisor, plan.config.model.model, served_name(plan.config))
        self._server = FleetServer(service, plan.token)
        port = await self._server.start(fleet.fleet_host, plan.port)
        self._supervisor.start()
        return f"{fleet.fleet_host}:{port}"

    def _first_incarnation(self) -> int:
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        return int(time.time()) if restarted else self._plan.first_incarnation

    async def _stop(self, grace_s: float) -> None:
        if self._supervisor is not None:
            await self._supervisor.stop(grace_s)
        if self._server is not None:
            await self._server.stop()


FleetActor = ray.remote(_FleetActor)


def _split_cause(error: RayTaskError) -> EngineFailed:
    """The engine's own words: `REASON: message` of the RuntimeError it raised."""
    words = str(error.cause) if error.cause is not None else str(error)
    reason, colon, message = words.partition(": ")
    if not colon or not reason.isupper():
        reason, message = "ENGINE_FAILED", words
    return EngineFailed(code="unavailable", reason=reason, message=message)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _log_hint() -> str:
    return f"its log: {ray.get_runtime_context().get_session_name()}/logs in Ray's folder for temporary files"
