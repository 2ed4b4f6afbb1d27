"""One replica in Ray: a placement group, the engine's actor in it, and how both end.

Owns the groups (killing an actor does not free the group it made, so they are named, removed by the fleet, and
swept at its start).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal

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
from pawl_workers.parallel import thread_environment

__all__ = ["RayLauncher", "RayReplica"]

log = logging.getLogger(__name__)

_PROGRESS_PERIOD_S = 0.2
_STOP_S = 5.0


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
