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
from collections.abc import AsyncIterator

import ray
from ray import ObjectRefGenerator
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pawl_server.engine.link.stopping import ask_to_stop
from pawl_server.engine.replica import ReplicaActor
from pawl_server.engine.spec import (
    EngineAddresses,
    EngineEvent,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineSpec,
    decode_event,
    encode,
)
from pawl_server.fleet.launcher import LaunchError, OnProgress
from pawl_workers.parallel import thread_environment

__all__ = ["RayLauncher", "RayReplica"]

log = logging.getLogger(__name__)

_STOP_S = 5.0


class RayReplica:
    """One engine actor that serves; see supervisor.Running.

    Args:
        actor: the engine's.
        group: that it is placed in.
        addresses: where it listens.
        token: the shared token.
        events: what it still says; they end when it does.
    """

    def __init__(
        self,
        actor: ray.actor.ActorHandle,
        group: PlacementGroup,
        addresses: EngineAddresses,
        token: str,
        events: AsyncIterator[EngineEvent],
    ) -> None:
        self._actor = actor
        self._group = group
        self._addresses = addresses
        self._token = token
        self._node_id = placement_group_table(group)["bundles_to_node_id"][0]
        self._ending = asyncio.create_task(self._last_words(events), name=f"pawl-ending-{addresses.address}")

    @property
    def addresses(self) -> EngineAddresses:
        """Where it listens."""
        return self._addresses

    async def died(self) -> str:
        """Return, with the reason, once it is gone."""
        return await asyncio.shield(self._ending)

    async def stop(self, grace_s: float) -> None:
        """Ask it to stop, wait, then kill it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await ask_to_stop(self._addresses.address, self._token, grace_s)
                await self.died()
        await self.kill()

    async def kill(self) -> None:
        """Kill it and free its resources."""
        ray.kill(self._actor, no_restart=True)
        if self._node_id == ray.get_runtime_context().get_node_id():
            # Ray asks the process to end, which one that is stopped or stuck in a kernel does not hear.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._addresses.process_id, signal.SIGKILL)
        await asyncio.wait({self._ending}, timeout=_STOP_S)
        self._ending.cancel()
        remove_placement_group(self._group)

    async def _last_words(self, events: AsyncIterator[EngineEvent]) -> str:
        process_id = self._addresses.process_id
        reason = f"the engine process {process_id} stopped by itself"
        try:
            async for event in events:
                if isinstance(event, EngineFailed):
                    reason = event.message
        except RayError as error:
            return f"the engine process {process_id} died: {_first_line(error)}"
        return reason


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
            events = _events(actor.run.remote(encode(spec)))
            addresses = await _ready(events, spec, on_progress)
            return RayReplica(actor, group, addresses, spec.internal_token, events)
        except BaseException:
            if actor is not None:
                ray.kill(actor, no_restart=True)
            remove_placement_group(group)
            raise

    def _create_actor(self, spec: EngineSpec, group: PlacementGroup) -> ray.actor.ActorHandle:
        return ReplicaActor.options(
            num_cpus=self._num_cpus,
            num_gpus=self._num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            runtime_env={"env_vars": thread_environment(spec.num_threads)},
        ).remote()


async def _events(stream: ObjectRefGenerator) -> AsyncIterator[EngineEvent]:
    """What an engine actor says, until it has ended.

    Raises:
        RayError: its process died.
    """
    async for reference in stream:
        yield decode_event(await reference)


async def _ready(events: AsyncIterator[EngineEvent], spec: EngineSpec, on_progress: OnProgress) -> EngineAddresses:
    """Pass the start's progress on until the engine serves.

    Raises:
        LaunchError: it failed or died.
    """
    how = "ended without a word"
    try:
        async for event in events:
            if isinstance(event, EngineReady):
                return event.addresses
            if isinstance(event, EngineFailed):
                raise LaunchError(event, reported=True)
            on_progress(event)
    except RayError as error:
        how = f"died: {_first_line(error)}"
    words = f"the engine process of replica {spec.replica} {how} at its start"
    failure = EngineFailed(code="unavailable", reason="DIED_AT_START", message=words, detail=_log_hint())
    raise LaunchError(failure, reported=False)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _log_hint() -> str:
    return f"its log: {ray.get_runtime_context().get_session_name()}/logs in Ray's folder for temporary files"
