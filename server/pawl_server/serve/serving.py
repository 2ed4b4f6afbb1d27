"""`pawl serve`: fleet, front ends and one /metrics, started in order, watched, and ended in order.

Owns the order of start (checks, fleet and first front end, replicas ready, other front ends, metrics, READY) and of
the end (front ends drain, replicas stop, Ray goes). Every process it started is gone when it returns.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack

from pawl.errors import ServerError, Unavailable
from pawl_server.addresses import host_port
from pawl_server.config import Config
from pawl_server.engine.link.auth import new_token
from pawl_server.fleet.opening import Fleet, make_fleet
from pawl_server.fleet.specs import served_name
from pawl_server.serve.checks import check_internal_listeners, check_port, exposure_warning
from pawl_server.serve.events import Output, ServerAddresses
from pawl_server.serve.fleet_life import FleetLife
from pawl_server.serve.frontend_process import FrontendProcess
from pawl_server.serve.internal_token import given_token
from pawl_server.serve.joined_metrics import FleetGauges, JoinedMetrics
from pawl_server.serve.orders import FrontendOrder
from pawl_server.serve.ready_file import remove_ready_file, write_ready_file
from pawl_server.serve.signals import StopSignals

__all__ = ["serve"]

log = logging.getLogger(__name__)

_FRONTEND_START_S = 60.0
_REPLICA_GRACE_S = 5.0  # its streams have ended by then; it has a step to finish


async def serve(config: Config, output: Output) -> int:
    """Run the whole server until SIGINT or SIGTERM; returns the exit code.

    Raises:
        PawlError: it could not start, or lost a part that it cannot replace; everything is stopped again.
        ModuleNotFoundError: an optional package that this needs is not installed.
    """
    remove_ready_file(config.frontend.ready_file)
    given = given_token(config.security)
    check_internal_listeners(config, given, admin=True)
    frontend = config.frontend
    check_port(frontend.host, frontend.port, "--port")
    check_port(frontend.admin_host, frontend.admin_port, "--admin-port")
    check_port(frontend.metrics_host, frontend.metrics_port, "--metrics-port")
    check_port(config.fleet.fleet_host, config.fleet.fleet_port, "--fleet-port")
    token = given or new_token()
    server = _Server(config, token, make_fleet(config, token), output)
    with StopSignals() as signals:
        running = asyncio.create_task(server.run(), name="pawl-serve")
        stopping = asyncio.create_task(signals.stop.wait())
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        asked = not running.done()
        if asked:
            log.info("draining: running requests may finish within %.0f s", frontend.drain_grace_s)
            running.cancel()
        await asyncio.wait({running})
        await _end(server, frontend.drain_grace_s if asked else 0.0, signals)
        stopping.cancel()
    remove_ready_file(frontend.ready_file)
    if not running.cancelled():
        running.result()  # raises what ended it
    return 0


async def _end(server: _Server, grace_s: float, signals: StopSignals) -> None:
    """End the server in order; at once when a second signal comes."""
    orderly = asyncio.create_task(server.end(grace_s), name="pawl-drain")
    at_once = asyncio.create_task(signals.at_once.wait())
    await asyncio.wait({orderly, at_once}, return_when=asyncio.FIRST_COMPLETED)
    if not orderly.done():
        log.warning("stopping at once: running requests are cut off")
        server.hurry()
        await asyncio.wait({orderly})
    at_once.cancel()
    orderly.result()


class _Server:
    """What `pawl serve` has started."""

    def __init__(self, config: Config, token: str, fleet: Fleet, output: Output) -> None:
        self._config = config
        self._token = token
        self._fleet = fleet
        self._output = output
        self._gauges = FleetGauges(served_name(config), config.fleet.replicas)
        self._front_ends: list[FrontendProcess] = []
        self._metrics: JoinedMetrics | None = None
        self._in_hurry = False

    async def run(self) -> None:
        """Start everything and watch it; ends with an error or by being cancelled.

        Raises:
            PawlError: a part could not start, or was lost for good.
        """
        self._output.begin("serve", self._fleet.kind)
        async with AsyncExitStack() as stack:
            await self._fleet.start()
            life = FleetLife(self._fleet, self._config.fleet.replicas, self._gauges, self._output)
            following = await stack.enter_async_context(life.followed())
            starting = asyncio.create_task(self._start_front(life))
            await _first_of(following, starting)
            addresses = starting.result()
            if warning := exposure_warning(self._config):
                self._output.warning(warning)
            write_ready_file(self._config.frontend.ready_file, addresses)
            self._output.ready(addresses)
            await _first_of(following, asyncio.create_task(self._front_end_lost()))

    async def end(self, grace_s: float) -> None:
        """Drain the front ends within the grace, then stop the replicas and Ray."""
        grace_s = 0.0 if self._in_hurry else grace_s
        codes = await asyncio.gather(*(front_end.stop(grace_s) for front_end in self._front_ends))
        if any(codes):
            log.warning("front ends ended with exit codes %s", ", ".join(map(str, codes)))
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.stop)
        await self._fleet.stop(0.0 if self._in_hurry else _REPLICA_GRACE_S)

    def hurry(self) -> None:
        """Let the running `end` wait for nobody."""
        self._in_hurry = True
        for front_end in self._front_ends:
            front_end.kill()

    async def _start_front(self, life: FleetLife) -> ServerAddresses:
        """Start the front ends, the first beside the replicas, and the metrics; returns where clients connect."""
        settings = self._config.frontend
        child = self._config.replace(metrics_host="127.0.0.1", metrics_port=0, ready_file="")
        early = asyncio.create_task((await self._launch_front_end(child)).ready())
        replicas = asyncio.create_task(life.all_ready())
        try:
            await asyncio.wait({early, replicas}, return_when=asyncio.FIRST_COMPLETED)
            if early.done():
                early.result()  # a front end that fails need not wait for the replicas
            await replicas
            first = await _within(early, _FRONTEND_START_S)
        finally:
            early.cancel()
            replicas.cancel()
        metrics_of = [first.metrics]
        # The others share the first one's port; operators reach each at an admin port of its own.
        beside = child.replace(port=_port(first.grpc), admin_port=0)
        for _ in range(1, settings.frontends):
            other = asyncio.create_task((await self._launch_front_end(beside)).ready())
            metrics_of.append((await _within(other, _FRONTEND_START_S)).metrics)
        self._metrics = JoinedMetrics(self._gauges, metrics_of)
        try:
            port = self._metrics.start(settings.metrics_host, settings.metrics_port)
        except OSError as error:
            raise Unavailable(
                f"cannot serve metrics on {host_port(settings.metrics_host, settings.metrics_port)}: {error.strerror}"
                " (--metrics-port)",
                reason="PORT_IN_USE",
            ) from error
        return ServerAddresses(
            grpc=first.grpc,
            admin=first.admin,
            metrics=f"http://{host_port(settings.metrics_host, port)}/metrics",
            fleet=self._fleet.address,
            model=served_name(self._config),
            process_id=first.process_id,
        )

    async def _launch_front_end(self, config: Config) -> FrontendProcess:
        order = FrontendOrder(config=config, fleet_address=self._fleet.address, token=self._token)
        front_end = FrontendProcess(order)
        self._front_ends.append(front_end)
        await front_end.launch()
        return front_end

    async def _front_end_lost(self) -> None:
        """Wait for the end of any front end.

        Raises:
            ServerError: always, when it comes.
        """
        ends = [asyncio.create_task(front_end.ended()) for front_end in self._front_ends]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        raise ServerError(
            f"a front end ended by itself with exit code {done.pop().result()}; its log is above",
            reason="FRONTEND_LOST",
        )


async def _within(answer: asyncio.Task[ServerAddresses], timeout_s: float) -> ServerAddresses:
    """The answer of a front end whose replicas are ready.

    Raises:
        PawlError: it refused, failed, or was not ready in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError:
        raise Unavailable(f"the front end was not ready within {timeout_s:g} s", reason="FRONTEND_FAILED") from None


async def _first_of(following: asyncio.Task[None], work: asyncio.Task[object]) -> None:
    """Wait for `work`, unless the fleet fails first.

    Raises:
        PawlError: of whichever failed.
    """
    try:
        await asyncio.wait({following, work}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
        work.result()
    finally:
        if not work.done():
            work.cancel()
            await asyncio.wait({work})


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
