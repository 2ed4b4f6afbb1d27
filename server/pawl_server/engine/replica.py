"""One engine as a Ray actor. The only file of the engine that imports Ray.

Owns the thread on which the engine's event loop runs. No token passes here: Ray places, starts and watches. The
stream of `run` is the death sentinel, and a dead replica is rebuilt whole (`max_restarts=0`).
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Iterator

import ray

from pawl_server.addresses import is_any
from pawl_server.config import LogSettings
from pawl_server.engine.engine import Engine
from pawl_server.engine.life import Tell, describe_failure, live
from pawl_server.engine.load import LoadWorker, load_torch_worker
from pawl_server.engine.spec import EngineEvent, EngineProgress, decode_spec, encode
from pawl_server.logs import set_up_logs

__all__ = ["EngineReplica", "ReplicaActor"]

log = logging.getLogger(__name__)

_PROGRESS_PERIOD_S = 0.2


class EngineReplica:
    """`run` it once. An actor that is asked nothing else has its main thread asleep in this call.

    Ray wakes the main thread of an actor that waits for calls a hundred times a second, each time from a step's thread
    that then holds up the other ones; and calls could come only if it did (docs/decisions/0003). So the engine is
    asked to end over its own link. Ray takes a class with a coroutine among its methods for one that waits for calls.
    """

    def __init__(self, load_worker: LoadWorker = load_torch_worker) -> None:
        self._load_worker = load_worker
        self._events: queue.SimpleQueue[EngineEvent | None] = queue.SimpleQueue()
        self._told = -_PROGRESS_PERIOD_S

    @ray.method(num_returns="streaming")  # type: ignore[untyped-decorator]
    def run(self, spec_json: bytes) -> Iterator[bytes]:
        """Start the engine and tell what happens to it, as JSON, until it has ended.

        Yields:
            EngineProgress of its start, EngineReady, and after an error of its own EngineFailed.
        """
        threading.Thread(target=self._work, args=(spec_json,), name="pawl-engine", daemon=True).start()
        while (event := self._events.get()) is not None:
            yield encode(event)

    def _work(self, spec_json: bytes) -> None:
        try:
            spec = decode_spec(spec_json)
            set_up_logs(LogSettings(log_level=spec.log_level, log_format=spec.log_format), f"engine-{spec.replica}")
            if not spec.advertise_host and is_any(spec.host):
                spec = spec.advertised_as(ray.util.get_node_ip_address())
            asyncio.run(_live(Engine(spec, self._tell, self._load_worker), self._tell))
        except BaseException as error:
            log.exception("the engine ends")
            self._events.put(describe_failure(error))
        finally:
            self._events.put(None)

    def _tell(self, event: EngineEvent) -> None:
        """Pass an event on, but not each of the thousands of tensors of a second: each is a message of Ray's."""
        now = time.monotonic()
        if isinstance(event, EngineProgress) and event.done != event.total:
            if now - self._told < _PROGRESS_PERIOD_S:
                return
            self._told = now
        self._events.put(event)


async def _live(engine: Engine, tell: Tell) -> None:
    try:
        await live(engine, tell)
    finally:
        await engine.stop()


ReplicaActor = ray.remote(max_restarts=0, max_task_retries=0)(EngineReplica)
