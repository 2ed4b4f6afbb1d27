"""`pawl fleet`: the fleet alone, for front ends that run elsewhere."""

from __future__ import annotations

import asyncio
import logging

from pawl.errors import Unavailable
from pawl_server.addresses import host_port
from pawl_server.config import Config
from pawl_server.exposition import serve_metrics
from pawl_server.fleet.opening import Fleet, make_fleet
from pawl_server.fleet.specs import served_name
from pawl_server.serve.checks import check_internal_listeners, check_port
from pawl_server.serve.events import Output, ServerAddresses
from pawl_server.serve.fleet_life import FleetLife
from pawl_server.serve.internal_token import given_token, token_for_fleet
from pawl_server.serve.joined_metrics import FleetGauges
from pawl_server.serve.ready_file import remove_ready_file, write_ready_file
from pawl_server.serve.signals import StopSignals

__all__ = ["run_fleet"]

log = logging.getLogger(__name__)

_REPLICA_GRACE_S = 5.0


async def run_fleet(config: Config, output: Output) -> int:
    """Run a fleet until SIGINT or SIGTERM; returns the exit code.

    Front ends drain before it is told to stop; replicas get a short grace.

    Raises:
        PawlError: it could not start, or is lost; everything is stopped again.
        ModuleNotFoundError: an optional package that this needs is not installed.
    """
    remove_ready_file(config.frontend.ready_file)
    check_internal_listeners(config, given_token(config.security))
    frontend = config.frontend
    check_port(frontend.metrics_host, frontend.metrics_port, "--metrics-port")
    check_port(config.fleet.fleet_host, config.fleet.fleet_port, "--fleet-port")
    token, token_file = token_for_fleet(config.security)
    fleet = make_fleet(config, token, outlived=True)
    with StopSignals() as signals:
        running = asyncio.create_task(_run(config, fleet, output, str(token_file or "")), name="pawl-fleet")
        stopping = asyncio.create_task(signals.stop.wait())
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        running.cancel()
        await asyncio.wait({running})
        await fleet.stop(_REPLICA_GRACE_S)
        stopping.cancel()
    remove_ready_file(frontend.ready_file)
    if not running.cancelled():
        running.result()  # raises what ended it
    return 0


async def _run(config: Config, fleet: Fleet, output: Output, token_file: str) -> None:
    output.begin("fleet", fleet.kind)
    gauges = FleetGauges(served_name(config), config.fleet.replicas)
    host = config.frontend.metrics_host
    try:
        metrics = serve_metrics(host, config.frontend.metrics_port, gauges.metrics.registry)
    except OSError as error:
        raise Unavailable(f"cannot serve metrics on {host}: {error}", reason="PORT_IN_USE") from error
    try:
        await fleet.start()
        life = FleetLife(fleet, config.fleet.replicas, gauges, output)
        async with life.followed() as following:
            waiting = asyncio.create_task(life.all_ready())
            await asyncio.wait({following, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if not following.done():
                addresses = ServerAddresses(
                    fleet=fleet.address,
                    metrics=f"http://{host_port(host, metrics.port)}/metrics",
                    model=served_name(config),
                    token_file=token_file,
                )
                write_ready_file(config.frontend.ready_file, addresses)
                output.ready(addresses)
            await following
    finally:
        await asyncio.to_thread(metrics.stop)
