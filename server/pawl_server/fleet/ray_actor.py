"""What runs inside the fleet actor: the supervisor and its listener. The engine actors die with it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import Future

import msgspec
import ray

from pawl_server.config import Config
from pawl_server.fleet.hosted_fleet import HostedFleet
from pawl_server.fleet.ray_replica import RayLauncher
from pawl_server.fleet.replicas import encode_batch
from pawl_server.fleet.specs import engine_specs
from pawl_server.logs import set_up_logs

__all__ = ["FleetActor", "FleetPlan", "encode_plan"]

log = logging.getLogger(__name__)

_EVENTS_WAIT_S = 2.0


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
        memory_bytes: of the host for each replica on it, measured before any was started; 0 = all that is free.
        first_incarnation: see Supervisor.
    """

    config: Config
    token: str
    name: str
    digest: str
    port: int
    cores_per_replica: int
    gpus_per_replica: float
    memory_bytes: int = 0
    first_incarnation: int = 1

    def __repr__(self) -> str:
        return f"FleetPlan({self.name!r})"


_plan_decoder = msgspec.json.Decoder(FleetPlan)


def encode_plan(plan: FleetPlan) -> bytes:
    """JSON of a plan."""
    return msgspec.json.encode(plan)


class _FleetActor:
    """The fleet. Runs on a thread of its own, so that its life does not hang on calls from outside."""

    def __init__(self, plan_json: bytes) -> None:
        self._plan = _plan_decoder.decode(plan_json)
        self._ready: Future[HostedFleet] = Future()
        self._loop = asyncio.new_event_loop()
        set_up_logs(self._plan.config.log, "fleet")
        threading.Thread(target=self._work, name="pawl-fleet", daemon=True).start()

    def describe(self) -> tuple[str, str]:
        """Address and digest.

        Raises:
            RuntimeError: the fleet could not start.
        """
        return self._ready.result().address, self._plan.digest

    def events(self, number: int) -> bytes:
        """An EventBatch from `number` on, as JSON; may be empty after a while."""
        waiting = self._ready.result().events(number, _EVENTS_WAIT_S)
        return encode_batch(asyncio.run_coroutine_threadsafe(waiting, self._loop).result())

    def stop(self, grace_s: float) -> None:
        """Stop the replicas and the listener, unless the fleet could not start: then there are none."""
        if self._ready.exception() is None:
            asyncio.run_coroutine_threadsafe(self._ready.result().stop(grace_s), self._loop).result()

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._ready.set_result(self._loop.run_until_complete(self._start()))
        except Exception as error:
            log.exception("the fleet cannot start")
            self._ready.set_exception(RuntimeError(str(error)))
            return
        self._loop.run_forever()

    async def _start(self) -> HostedFleet:
        plan = self._plan
        launcher = RayLauncher(plan.name, plan.config.fleet.cpus_per_replica, plan.gpus_per_replica)
        launcher.sweep()
        specs = engine_specs(plan.config, plan.token, plan.cores_per_replica, memory_bytes=plan.memory_bytes)
        hosted = HostedFleet(plan.config, plan.token, specs, launcher, self._first_incarnation())
        await hosted.start(plan.port)
        return hosted

    def _first_incarnation(self) -> int:
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        return int(time.time()) if restarted else self._plan.first_incarnation


FleetActor = ray.remote(_FleetActor)
