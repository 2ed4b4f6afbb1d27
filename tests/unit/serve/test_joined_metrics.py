"""One /metrics over several processes."""

from __future__ import annotations

import urllib.request

import pytest

from pawl_server.exposition import parse_exposition, serve_metrics
from pawl_server.fleet.replicas import ReplicaChanged, ReplicaState, ReplicaStatus
from pawl_server.metrics import EngineMetrics, FrontendMetrics
from pawl_server.serve.joined_metrics import FleetGauges, JoinedMetrics


def test_front_ends_engines_and_fleet_are_joined_and_one_that_is_gone_is_left_out() -> None:
    engine, front_end = EngineMetrics("demo", 0), FrontendMetrics("demo")
    engine.output_tokens.inc(5)
    front_end.request_ended("Generate", "stop")
    servers = [serve_metrics("127.0.0.1", 0, metrics.registry) for metrics in (engine, front_end)]
    gauges = FleetGauges("demo", 2)
    address = f"127.0.0.1:{servers[0].port}"
    ready = ReplicaStatus(index=0, incarnation=2, state=ReplicaState.READY, metrics_address=address)
    lost = ReplicaStatus(index=1, incarnation=1, state=ReplicaState.BACKOFF, detail="died")
    gauges.fleet_event(ReplicaChanged(status=ready))
    gauges.fleet_event(ReplicaChanged(status=lost, restart_reason="died"))
    joined = JoinedMetrics(gauges, [f"127.0.0.1:{servers[1].port}"])
    port = joined.start("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            text = response.read().decode()
        totals = parse_exposition(text)
        assert totals["pawl_output_tokens_total"] == 5
        assert totals["pawl_requests_total"] == 1
        assert 'pawl_worker_up{model="demo",worker="0"} 1.0' in text
        assert 'pawl_worker_up{model="demo",worker="1"} 0.0' in text
        assert 'pawl_worker_restarts_total{model="demo",reason="died",worker="1"} 1.0' in text
        servers[0].stop()
        assert "pawl_output_tokens_total" not in parse_exposition(joined.exposition().decode())
    finally:
        joined.stop()
        servers[1].stop()


def test_a_port_in_use_is_an_error() -> None:
    holder = serve_metrics("127.0.0.1", 0, lambda: b"")
    joined = JoinedMetrics(FleetGauges("demo", 1), [])
    try:
        with pytest.raises(OSError, match="in use"):
            joined.start("127.0.0.1", holder.port)
    finally:
        joined.stop()
        holder.stop()
