"""One front-end process from start to exit code: listeners, fleet, readiness, signals, drain.

Owns the order in which these come up and go down; everything else is `core` and the services.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Set
from dataclasses import dataclass

from prometheus_client import generate_latest

from pawl.errors import Unavailable
from pawl_server.addresses import host_port
from pawl_server.config import Config
from pawl_server.exposition import MetricsServer, serve_metrics
from pawl_server.fleet.watch import FleetWatch
from pawl_server.frontend.admin_service import package_version
from pawl_server.frontend.core import Core
from pawl_server.frontend.drain import drain
from pawl_server.frontend.health import Health
from pawl_server.frontend.server import ADMIN_SERVICES, PUBLIC_SERVICES, admin_listener, public_listener
from pawl_server.internal.v1 import fleet_pb2

__all__ = ["FrontendAddresses", "run_frontend"]

log = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0  # for answers that are on their way when the listeners close


@dataclass(frozen=True, slots=True)
class FrontendAddresses:
    """Where a front end listens, each as host:port."""

    grpc: str
    admin: str
    metrics: str


class _Stop:
    """When to end: SIGTERM, SIGINT or the caller's event; a second signal hurries the drain."""

    def __init__(self, asked: asyncio.Event | None) -> None:
        self.asked = asked or asyncio.Event()
        self.hurry = asyncio.Event()
        self._own = asked is None
        self._installed: list[signal.Signals] = []

    def _on_signal(self) -> None:
        (self.hurry if self.asked.is_set() else self.asked).set()

    def __enter__(self) -> _Stop:
        if self._own:
            for number in (signal.SIGTERM, signal.SIGINT):
                # A parent that shields its child from the terminal's Ctrl-C knows why.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
                    self._installed.append(number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._installed:
            asyncio.get_running_loop().remove_signal_handler(number)


async def run_frontend(
    config: Config,
    fleet_address: str,
    token: str,
    on_ready: Callable[[FrontendAddresses], None],
    stop: asyncio.Event | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit code.

    The listeners are open at once, and health says NOT_SERVING until a replica is ready.

    Args:
        config: all settings.
        fleet_address: host:port of the fleet.
        token: shared token of the internal listeners.
        on_ready: called once, when requests can be served for the first time.
        stop: ends the front end when set; given = signals are the caller's business.

    Raises:
        PawlError: it could not start: a port is in use, or a file is missing or wrong.
    """
    news: list[Callable[[], None]] = []

    def tell() -> None:
        for each in news:
            each()

    core = Core(config, token, tell)
    health = Health(lambda: core.serving, [*PUBLIC_SERVICES, *ADMIN_SERVICES])
    news.append(health.news.set)
    async with contextlib.AsyncExitStack() as stack:
        stop_asked = stack.enter_context(_Stop(stop))
        stack.push_async_callback(core.close)
        listeners = [public_listener(core, health), admin_listener(core, health)]
        metrics = await asyncio.to_thread(_serve_metrics, core)
        stack.push_async_callback(asyncio.to_thread, metrics.stop)
        core.metrics.build(package_version())
        await health.look()  # before anyone can ask: the library's servicer begins with SERVING
        for listener in listeners:
            await listener.server.start()
            stack.push_async_callback(listener.server.stop, _STOP_GRACE_S)
        addresses = FrontendAddresses(listeners[0].address, listeners[1].address, host_port(metrics.host, metrics.port))
        views: asyncio.Queue[fleet_pb2.WatchReplicasResponse] = asyncio.Queue()
        tasks = {
            asyncio.create_task(health.run(), name="health"),
            asyncio.create_task(_follow(core, views), name="fleet views"),
        }
        for task in tasks:
            stack.push_async_callback(_cancelled, task)
        await stack.enter_async_context(FleetWatch(fleet_address, token, core.instance_id, views.put_nowait))
        await _until_stopped(core, stop_asked.asked, tasks, news, lambda: on_ready(addresses))
        await drain(core, config.frontend.drain_grace_s, stop_asked.hurry)
    return 0


async def _until_stopped(
    core: Core,
    stop: asyncio.Event,
    tasks: Set[asyncio.Task[None]],
    news: list[Callable[[], None]],
    ready: Callable[[], None],
) -> None:
    """Announce readiness once, then wait for the end, or for that of a task without which nothing can be served.

    Raises:
        PawlError: the model's files cannot be read, so that it would never be ready.
        Exception: whatever a task failed with.
    """
    changed = asyncio.Event()
    news.append(changed.set)
    stopped = asyncio.create_task(stop.wait())
    announced = False
    try:
        while not stop.is_set():
            if not announced and core.serving:
                announced = True
                ready()
            if not announced and core.model_error is not None:
                raise core.model_error
            changed.clear()
            waiting = asyncio.create_task(changed.wait())
            # The timeout is for progress, which sends no news.
            await asyncio.wait(
                {stopped, waiting, *tasks}, timeout=None if announced else 0.25, return_when=asyncio.FIRST_COMPLETED
            )
            waiting.cancel()
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        stopped.cancel()


async def _follow(core: Core, views: asyncio.Queue[fleet_pb2.WatchReplicasResponse]) -> None:
    """Hand the fleet's lists on, one after the other and only the latest."""
    while True:
        view = await views.get()
        while not views.empty():
            view = views.get_nowait()
        await core.on_fleet(view)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def _serve_metrics(core: Core) -> MetricsServer:
    settings = core.config.frontend
    try:
        # A function, since the registry is replaced once the fleet has named the model.
        return serve_metrics(
            settings.metrics_host, settings.metrics_port, lambda: generate_latest(core.metrics.registry)
        )
    except OSError as error:
        where = host_port(settings.metrics_host, settings.metrics_port)
        text = f"cannot serve metrics on {where}: {error.strerror or error}"
        raise Unavailable(text, reason="PORT_IN_USE") from error
