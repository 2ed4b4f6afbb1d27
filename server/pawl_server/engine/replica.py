"""One engine as a Ray actor. The only file of the engine that imports Ray.

Owns the thread on which the engine's event loop runs. No token passes here: Ray places, starts and watches; the
`ObjectRef` of `run` is the death sentinel, and a dead replica is rebuilt whole (`max_restarts=0`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

import ray

from pawl_server.addresses import is_any
from pawl_server.collector import collector_at_rest
from pawl_server.config import LogSettings
from pawl_server.engine.engine import Engine
from pawl_server.engine.load import LoadWorker, load_torch_worker
from pawl_server.engine.process import describe_failure
from pawl_server.engine.spec import EngineAddresses, EngineProgress, EngineSpec, decode_spec, encode
from pawl_server.logs import set_up_logs

__all__ = ["EngineReplica", "ReplicaActor"]

log = logging.getLogger(__name__)


class EngineReplica:
    """`start`, then `run` for as long as it lives; `progress` and `stop` answer beside them.

    Bytes in and out are JSON (`pawl_server.engine.spec`). Errors are plain RuntimeErrors with the root cause in
    words, so that whoever receives one needs no class of ours.
    """

    def __init__(self, load_worker: LoadWorker = load_torch_worker) -> None:
        self._load_worker = load_worker
        self._started: Future[EngineAddresses] = Future()
        self._ended: Future[None] = Future()
        self._progress: dict[str, EngineProgress] = {}
        self._stop: Callable[[], object] | None = None

    def start(self, spec_json: bytes) -> bytes:
        """Start the engine; returns its EngineAddresses.

        Raises:
            RuntimeError: it could not start; the message has the root cause.
        """
        spec = decode_spec(spec_json)
        set_up_logs(LogSettings(log_level=spec.log_level, log_format=spec.log_format), f"engine-{spec.replica}")
        if not spec.advertise_host and is_any(spec.host):
            spec = spec.advertised_as(ray.util.get_node_ip_address())
        threading.Thread(target=self._work, args=(spec,), name="pawl-engine", daemon=True).start()
        return encode(self._started.result())

    def run(self) -> None:
        """Return when the engine was stopped.

        Raises:
            RuntimeError: it ended by itself; the message has the root cause.
        """
        self._ended.result()

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def progress(self) -> list[bytes]:
        """The latest EngineProgress of each step of the start so far, in order."""
        return [encode(event) for event in list(self._progress.values())]

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        """Stop the engine; returns when it is stopped. Front ends see their streams break.

        Without effect before `start` has returned: kill the actor instead.
        """
        if self._stop is not None and not self._ended.done():
            self._stop()
            self._ended.exception()

    def _work(self, spec: EngineSpec) -> None:
        try:
            asyncio.run(self._serve(spec))
        except BaseException as error:
            log.exception("replica %d ends", spec.replica)
            failure = describe_failure(error)
            cause = RuntimeError(f"{failure.reason}: {failure.message}")
            for future in (self._started, self._ended):
                if not future.done():
                    future.set_exception(cause)
        else:
            self._ended.set_result(None)

    async def _serve(self, spec: EngineSpec) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        engine = Engine(spec, self._on_progress, self._load_worker)
        with collector_at_rest():
            addresses = await engine.start()
        self._stop = lambda: loop.call_soon_threadsafe(stop.set)
        self._started.set_result(addresses)
        running, stopping = asyncio.create_task(engine.run()), asyncio.create_task(stop.wait())
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await engine.stop()
        if running.done():
            running.result()

    def _on_progress(self, event: EngineProgress) -> None:
        self._progress[event.step] = event


ReplicaActor = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 2})(EngineReplica)
