"""The fleet in a cluster of Ray, as `pawl serve` and `pawl fleet` see it: one detached, named actor.

Owns the actor's life; what runs inside it is in `ray_actor`. Whoever comes with the same settings finds it. Ray places,
starts and watches; no token passes here.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket

import msgspec
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pawl.errors import Unavailable
from pawl_server.addresses import family_of
from pawl_server.config import Config
from pawl_server.fleet.ray_actor import FleetActor, FleetPlan, encode_plan
from pawl_server.fleet.ray_session import RaySession, gpus_per_replica
from pawl_server.fleet.replicas import EventBatch, decode_batch
from pawl_server.fleet.specs import memory_share, served_name

__all__ = ["RayFleet"]

log = logging.getLogger(__name__)


class RayFleet:
    """A fleet inside a cluster. `start`, then `stop`.

    Args:
        config: the settings, with the `ray_address` to join.
        token: the shared token.
        first_incarnation: see Supervisor.
    """

    def __init__(self, config: Config, token: str, first_incarnation: int = 1) -> None:
        self._first_incarnation = first_incarnation
        self._config = config
        self._token = token
        self._session = RaySession(config)
        self._actor: ray.actor.ActorHandle | None = None
        self.kind = f"Ray at {config.fleet.ray_address}"
        self.address = ""

    async def start(self) -> None:
        """Join Ray, start or find the fleet actor; the replicas begin to start.

        Raises:
            Unavailable: Ray cannot be joined, or the fleet's port is in use.
        """
        await self._session.open(self._find_or_create)
        try:
            self.address, _ = await self._fleet_actor().describe.remote()
        except RayTaskError as error:
            raise Unavailable(str(error.cause), reason="FLEET_FAILED") from error

    async def events(self, number: int) -> EventBatch:
        """Events from `number` on; may be none after a while.

        Raises:
            Unavailable: the fleet actor is gone for good.
        """
        actor = self._fleet_actor()
        try:
            return decode_batch(await actor.events.remote(number))
        except ActorUnavailableError:
            log.warning("the fleet actor is away; Ray starts it again")
            await asyncio.sleep(0.5)
            return EventBatch(next_number=number, events=[])
        except RayActorError as error:
            raise Unavailable(f"the fleet actor died: {error}", reason="FLEET_LOST") from error

    async def stop(self, grace_s: float) -> None:
        """Stop the replicas and the actor, and leave the cluster. Nothing of the fleet is left on return."""
        await self._session.settle()
        if self._actor is not None:
            try:
                async with asyncio.timeout(grace_s + 10.0):
                    await self._actor.stop.remote(grace_s)
            except (TimeoutError, RayActorError, RayTaskError) as error:
                log.warning("the fleet did not stop in order: %s %s", type(error).__name__, error)
            await asyncio.to_thread(ray.kill, self._actor, no_restart=True)
            self._actor = None
        await self._session.close()

    def _fleet_actor(self) -> ray.actor.ActorHandle:
        if self._actor is None:
            raise Unavailable("the fleet is not started", reason="FLEET_LOST")
        return self._actor

    def _find_or_create(self) -> None:
        """Take the running fleet of the same settings, else make one; one of other settings is replaced."""
        self._actor = self._found_or_created()

    def _found_or_created(self) -> ray.actor.ActorHandle:
        name = f"pawl-fleet-{served_name(self._config)}"
        digest = _digest(self._config, self._token)
        try:
            found = ray.get_actor(name)
        except ValueError:
            return self._create(name, digest)
        try:
            address, its_digest = ray.get(found.describe.remote(), timeout=10)
            if its_digest == digest:
                log.info("found the fleet %s at %s, running with the same settings", name, address)
                return found
            log.warning("replacing the fleet %s, which runs with other settings", name)
        except (RayActorError, RayTaskError, GetTimeoutError) as error:
            log.warning("replacing the fleet %s, which does not answer: %s", name, error)
        ray.kill(found, no_restart=True)
        return self._create(name, digest)

    def _create(self, name: str, digest: str) -> ray.actor.ActorHandle:
        fleet = self._config.fleet
        plan = FleetPlan(
            config=self._config,
            token=self._token,
            name=name,
            digest=digest,
            # Chosen here once, so that the actor listens on the same port after Ray restarted it.
            port=fleet.fleet_port or _free_port(fleet.fleet_host),
            cores_per_replica=max(1, int(fleet.cpus_per_replica)),
            gpus_per_replica=gpus_per_replica(self._config),
            memory_bytes=memory_share(self._config),
            first_incarnation=self._first_incarnation,
        )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return FleetActor.options(
            name=name,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=16,
            scheduling_strategy=here,
        ).remote(encode_plan(plan))


def _digest(config: Config, token: str) -> str:
    """Same settings and token, same digest."""
    return hashlib.sha256(msgspec.json.encode([config, token])).hexdigest()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=family_of(host)) as listener:
        return int(listener.getsockname()[1])
