"""Metrics: names, closed labels, and the joined exposition."""

import urllib.error
import urllib.request

import pytest
from prometheus_client import generate_latest

from pawl_server.exposition import join_expositions, parse_exposition, serve_metrics
from pawl_server.metrics import PHASES, EngineMetrics, FleetMetrics, FrontendMetrics


def test_phases_sum_to_total() -> None:
    metrics = FrontendMetrics("m")
    metrics.request_phases(0.1, 0.2, 0.3, 0.05)
    value = metrics.registry.get_sample_value
    sums = {
        phase: value("pawl_request_duration_seconds_sum", {"model": "m", "phase": phase}) or 0.0 for phase in PHASES
    }
    total = sums.pop("total")
    assert abs(sum(sums.values()) - total) < 1e-9


def test_replicas_stay_apart_and_frontends_add_up() -> None:
    engines = [EngineMetrics("m", replica) for replica in (0, 1)]
    for number, engine in enumerate(engines):
        engine.output_tokens.inc(10 + number)
    frontends = [FrontendMetrics("m"), FrontendMetrics("m")]
    for frontend in frontends:
        frontend.request_ended("Generate", "stop")
        frontend.time_to_first_token.observe(0.03)
    registries = [part.registry for part in engines] + [part.registry for part in frontends]
    joined = join_expositions(generate_latest(registry).decode() for registry in registries).decode()
    assert 'pawl_output_tokens_total{model="m",replica="0"} 10.0' in joined
    assert 'pawl_output_tokens_total{model="m",replica="1"} 11.0' in joined
    assert 'pawl_requests_total{method="Generate",model="m",outcome="stop"} 2.0' in joined
    assert 'pawl_time_to_first_token_seconds_bucket{le="0.05",model="m"} 2.0' in joined
    assert joined.count("# TYPE pawl_output_tokens_total counter") == 1
    assert parse_exposition(joined)["pawl_output_tokens_total"] == 21.0


def test_label_values_are_escaped() -> None:
    fleet = FleetMetrics('a"b\\c')
    fleet.worker_up(0, up=True)
    text = generate_latest(fleet.registry).decode()
    assert join_expositions([text]).decode().strip() == text.strip()


def test_the_listener_serves_the_registry_and_nothing_else() -> None:
    metrics = FleetMetrics("m")
    metrics.worker_restarted(1, "died")
    server = serve_metrics("127.0.0.1", 0, metrics.registry)
    try:
        base = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(base + "/metrics", timeout=5) as answer:
            body = answer.read().decode()
        assert 'pawl_worker_restarts_total{model="m",reason="died",worker="1"} 1.0' in body
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(base + "/secret", timeout=5)
        assert refused.value.code == 404
        refused.value.close()
    finally:
        server.stop()
