"""The fleet under Ray, as `pawl serve` and `pawl fleet` see it: a local Ray or a cluster, and one named actor in it.

Owns the local Ray that it starts and the fleet actor's life. What runs inside the actor is in `ray_actor`.
Ray places, starts and watches; no token passes here.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import signal
import socket
import threading

import msgspec
import psutil
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pawl.errors import Unavailable
from pawl_server.addresses import family_of
from pawl_server.config import Config
from pawl_server.fleet import own_ray
from pawl_server.fleet.ray_actor import NAMESPACE, FleetActor, FleetPlan, encode_plan
from pawl_server.fleet.replicas import EventBatch, decode_batch
from pawl_server.fleet.specs import memory_share, num_cores, served_name

__all__ = ["RayFleet"]

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 100 << 20  # nothing of ours goes through it
_LEFTOVER_S = 5.0


class RayFleet:
    """A fleet inside Ray. `start`, then `stop`.

    Args:
        config: the settings; `ray_address` empty = a Ray of our own, on this machine.
        token: the shared token.
        first_incarnation: see Supervisor.
    """

    def __init__(self, config: Config, token: str, first_incarnation: int = 1) -> None:
        self._first_incarnation = first_incarnation
        self._config = config
        self._token = token
        self._starts_ray = not config.fleet.ray_address
        self._actor: ray.actor.ActorHandle | None = None
        self._opening: asyncio.Task[None] | None = None
        self.kind = "Ray" if self._starts_ray else f"Ray at {config.fleet.ray_address}"
        self.address = ""

    async def start(self) -> None:
        """Start or join Ray, start or find the fleet actor; the replicas begin to start.

        Raises:
            Unavailable: Ray cannot be started or joined, or the fleet's port is in use.
        """
        try:
            # Shielded: its threads cannot be stopped half-way, so `stop` waits for them.
            self._opening = asyncio.create_task(self._open(), name="pawl-ray-open")
            await asyncio.shield(self._opening)
        except Exception as error:  # Ray raises bare ones, too: its node took too long to register
            where = "start a local Ray" if self._starts_ray else f"join Ray at {self._config.fleet.ray_address}"
            raise Unavailable(
                f"cannot {where}: {error}; `--fleet local` works without Ray", reason="RAY_FAILED"
            ) from error
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
        """Stop the replicas, the actor, and Ray if it is ours. Nothing is left on return."""
        _reclaim_signals()
        if self._opening is not None:
            await asyncio.wait({self._opening})
            self._opening.exception()  # seen: whoever called `start` may be gone
        if self._actor is not None:
            try:
                async with asyncio.timeout(grace_s + 10.0):
                    await self._actor.stop.remote(grace_s)
            except (TimeoutError, RayActorError, RayTaskError) as error:
                log.warning("the fleet did not stop in order: %s %s", type(error).__name__, error)
            await asyncio.to_thread(ray.kill, self._actor, no_restart=True)
            self._actor = None
        await asyncio.to_thread(self._disconnect)

    async def _open(self) -> None:
        await asyncio.to_thread(self._connect)
        _reclaim_signals()
        self._actor = await asyncio.to_thread(self._find_or_create)

    def _fleet_actor(self) -> ray.actor.ActorHandle:
        if self._actor is None:
            raise Unavailable("the fleet is not started", reason="FLEET_LOST")
        return self._actor

    def _connect(self) -> None:
        if not self._starts_ray:
            ray.init(
                self._config.fleet.ray_address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        fleet = self._config.fleet
        own_ray.set_environment()
        ray.init(
            "local",
            # Counts of reservations, not of threads: two replicas fit on one core if they are asked for.
            num_cpus=max(num_cores(), math.ceil(fleet.replicas * fleet.cpus_per_replica)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            namespace=NAMESPACE,
        )
        own_ray.end_idle_helpers()

    def _find_or_create(self) -> ray.actor.ActorHandle:
        """The running fleet of the same settings, else a new one; one of other settings is replaced."""
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
        cores = num_cores() // fleet.replicas if self._starts_ray else int(fleet.cpus_per_replica)
        plan = FleetPlan(
            config=self._config,
            token=self._token,
            name=name,
            digest=digest,
            # Chosen here once, so that the actor listens on the same port after Ray restarted it.
            port=fleet.fleet_port or _free_port(fleet.fleet_host),
            cores_per_replica=max(1, cores),
            gpus_per_replica=self._gpus_per_replica(),
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

    def _gpus_per_replica(self) -> float:
        asked = self._config.fleet.gpus_per_replica
        if asked >= 0:
            return asked
        device = self._config.model.device
        found = float(ray.cluster_resources().get("GPU", 0.0))
        return 1.0 if device == "cuda" or (device == "auto" and found >= 1) else 0.0

    def _disconnect(self) -> None:
        started = psutil.Process().children(recursive=True) if self._starts_ray and ray.is_initialized() else []
        ray.shutdown()
        _, left = psutil.wait_procs(started, timeout=_LEFTOVER_S)
        for process in left:
            log.warning("killing %d (%s), left over by Ray", process.pid, process.name())
            process.kill()
        psutil.wait_procs(left, timeout=_LEFTOVER_S)


def _reclaim_signals() -> None:
    """Undo what `ray.init` does to this process's signals.

    Its handler of crashes takes SIGTERM for one: it prints a stack trace, sets an alarm that aborts the process
    3 s later (exit by SIGABRT in the middle of a drain), and only then calls the handler from before.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # signals are the main thread's business
    signal.alarm(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)
            signal.siginterrupt(number, False)


def _digest(config: Config, token: str) -> str:
    """Same settings and token, same digest."""
    return hashlib.sha256(msgspec.json.encode([config, token])).hexdigest()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=family_of(host)) as listener:
        return int(listener.getsockname()[1])
