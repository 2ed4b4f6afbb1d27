"""One /metrics for the whole of `pawl serve`: front ends, engines and fleet joined at each scrape.

Owns the fetching; a process that does not answer in time is left out of that scrape, and serving goes on.
"""

from __future__ import annotations

import http.client
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import generate_latest

from pawl_server.exposition import MetricsServer, join_expositions, serve_metrics
from pawl_server.fleet.replicas import FleetEvent, ReplicaChanged, ReplicaState, ReplicaStatus
from pawl_server.metrics import FleetMetrics

__all__ = ["FleetGauges", "JoinedMetrics", "fetch_exposition"]

log = logging.getLogger(__name__)

_FETCH_TIMEOUT_S = 2.0


class FleetGauges:
    """FleetMetrics, filled from the fleet's events."""

    def __init__(self, model: str, num_replicas: int) -> None:
        self.metrics = FleetMetrics(model)
        self.statuses: dict[int, ReplicaStatus] = {}
        for index in range(num_replicas):
            self.metrics.worker_up(index, up=False)

    def fleet_event(self, event: FleetEvent) -> None:
        """Take an event in."""
        if not isinstance(event, ReplicaChanged):
            return
        status = event.status
        self.statuses[status.index] = status
        self.metrics.worker_up(status.index, up=status.state is ReplicaState.READY)
        if event.restart_reason:
            self.metrics.worker_restarted(status.index, event.restart_reason)


class JoinedMetrics:
    """The joined exposition.

    Args:
        gauges: the fleet's own; also says where the engines' expositions are.
        front_ends: host:port of the front ends' expositions.
    """

    def __init__(self, gauges: FleetGauges, front_ends: Iterable[str]) -> None:
        self._gauges = gauges
        self._front_ends = list(front_ends)
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="pawl-scrape")
        self._server: MetricsServer | None = None

    def start(self, host: str, port: int) -> int:
        """Serve it; returns the port.

        Raises:
            OSError: the port is in use.
        """
        self._server = serve_metrics(host, port, self.exposition)
        return self._server.port

    def exposition(self) -> bytes:
        """What a scrape gets."""
        engines = [s.metrics_address for s in list(self._gauges.statuses.values()) if s.metrics_address]
        texts = self._pool.map(fetch_exposition, [*self._front_ends, *engines])
        own = generate_latest(self._gauges.metrics.registry).decode()
        return join_expositions([own, *(text for text in texts if text)])

    def stop(self) -> None:
        """Close the listener."""
        if self._server is not None:
            self._server.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)


def fetch_exposition(address: str) -> str:
    """The exposition at host:port; empty if it does not answer."""
    connection = http.client.HTTPConnection(address, timeout=_FETCH_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        return response.read().decode() if response.status == http.client.OK else ""
    except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
        log.debug("no metrics from %s: %s", address, error)
        return ""
    finally:
        connection.close()
