"""Alerts that can fire: their metrics, labels and thresholds exist, and promtool agrees where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pawl_server.metrics import (
    OUTCOMES,
    STEP_PHASES,
    WAIT_REASONS,
    EngineMetrics,
    FleetMetrics,
    FrontendMetrics,
)
from tests.unit.deploy.manifests import DEPLOY, ROOT, Tree, of_kind
from tests.unit.deploy.promql import (
    Expression,
    expressions,
    grouped_labels_in,
    metric_names_in,
    selectors_in,
)

SEVERITIES = {"critical", "warning", "info"}
WANTED_ALERTS = {
    "TargetDown",
    "WorkerLost",
    "SchedulerStalled",
    "QueueGrowing",
    "TTFTSloBurnFast",
    "TTFTSloBurnSlow",
    "GapP99High",
    "PreemptionStorm",
    "KvSaturated",
    "RejectionRate",
    "ErrorRatio",
    "RestartLoop",
}
OF_PROMETHEUS = {"up": {"job", "instance"}}
OF_THE_TARGET = {"job", "instance", "namespace", "pod", "service"}
CLOSED = {
    "outcome": set(OUTCOMES),
    "source": {"computed", "cached", "recomputed"},
    "phase": set(STEP_PHASES),
    "kind": {"prefill", "decode", "mixed"},
}


def _exposed() -> dict[str, dict[str, set[str]]]:
    """Series of a process of each kind: {name: {label: values}}."""
    frontend, engine, fleet = FrontendMetrics("m"), EngineMetrics("m", 0), FleetMetrics("m")
    frontend.request_ended("Generate", "rejected")
    frontend.request_rejected("queue_full")
    frontend.rpc_started("pawl.v1.InferenceService", "Generate", "server_stream")
    frontend.rpc_ended("pawl.v1.InferenceService", "Generate", "server_stream", "OK", 0.1)
    frontend.build("0.1.0")
    engine.config(dtype="float32", kernels="cpu", block_size=32, num_blocks=8)
    fleet.worker_up(0, up=True)
    fleet.worker_restarted(0, "died")
    series: dict[str, dict[str, set[str]]] = {}
    for registry in (frontend.registry, engine.registry, fleet.registry):
        for family in text_string_to_metric_families(generate_latest(registry).decode()):
            for sample in family.samples:
                labels = series.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
    return series


EXPOSED = _exposed()
RULES: list[Tree] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
EXPRESSIONS = expressions()


def _source(name: str) -> str:
    return f"{name}: neither recorded nor exposed by pawl_server.metrics"


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda e: e.origin)
def test_every_metric_exists(expression: Expression) -> None:
    names = metric_names_in(expression.text)
    assert names, expression.text
    for name in names:
        assert name in EXPOSED or name in RECORDED or name in OF_PROMETHEUS, _source(name)


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda e: e.origin)
def test_every_label_exists(expression: Expression) -> None:
    names = metric_names_in(expression.text)
    known = {label for name in names for label in EXPOSED.get(name, {})} | OF_THE_TARGET
    if names & RECORDED:
        known.add("model")
    if "label_replace" in expression.text:
        known |= set(re.findall(r'label_replace\([^,]+, "(\w+)"', expression.text))
    assert grouped_labels_in(expression.text) <= known
    for name, matchers in selectors_in(expression.text):
        assert set(matchers) <= set(EXPOSED.get(name, {})) | OF_THE_TARGET, name
        for label, (operator, value) in matchers.items():
            allowed = _allowed_values(name, label)
            if allowed is None or not value or value.startswith("$"):
                continue
            values = value.split("|") if operator in ("=~", "!~") else [value]
            assert set(values) <= allowed, (name, label, value)


def _allowed_values(name: str, label: str) -> set[str] | None:
    if label == "reason":
        return {"pawl_requests_waiting": set(WAIT_REASONS)}.get(name) or EXPOSED[name]["reason"]
    if label == "le":
        return EXPOSED[name]["le"]
    return CLOSED.get(label)


def test_there_are_expressions_with_everything_that_is_checked() -> None:
    used = {name for expression in EXPRESSIONS for name in metric_names_in(expression.text)}
    assert len(used) > 25
    labels = {label for e in EXPRESSIONS for _, matchers in selectors_in(e.text) for label in matchers}
    assert {"le", "outcome", "reason", "source", "model"} <= labels


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("sum by (model) (rate(pawl_output_tokens_total[5m]))", {"pawl_output_tokens_total"}),
        ('a_total{le="b_total"} / on (c) group_left (d) e:f:sum offset 5m', {"a_total", "e:f:sum"}),
        ("sum(x) by (y) > bool 0.5e3 and absent(up)", {"x", "up"}),
        ('label_replace(pawl_a, "b", "$1", "c", "(.+)")', {"pawl_a"}),
        ("rate(a[$__rate_interval]) or vector(0)", {"a"}),
    ],
)
def test_metric_names_in(text: str, names: set[str]) -> None:
    assert metric_names_in(text) == names


def _bounds(metric: str) -> list[str]:
    """Bucket bounds of a histogram, as Prometheus sees them, rising."""
    return sorted(EXPOSED[f"{metric}_bucket"]["le"], key=float)


def test_thresholds_are_bucket_bounds_below_the_last() -> None:
    checked = Counter[str]()
    for rule in RULES:
        for name, matchers in selectors_in(rule["expr"]):
            if "le" in matchers:
                assert matchers["le"][1] in _bounds(name.removesuffix("_bucket"))[:-2], rule
                checked["le"] += 1
        for metric, threshold in re.findall(r"histogram_quantile\(.*?(\w+)_bucket.*?\) > ([\d.]+)", rule["expr"]):
            assert float(threshold) in [float(bound) for bound in _bounds(metric)[:-2]], rule
            checked["quantile"] += 1
    assert checked["le"] == 4
    assert checked["quantile"] == 1
    assert sum("histogram_quantile" in rule["expr"] for rule in RULES) == checked["quantile"]


def test_alerts_are_complete() -> None:
    names = Counter(rule["alert"] for rule in ALERTS)
    assert set(names) == WANTED_ALERTS
    assert names.total() == len(names)
    runbook = (ROOT / "docs" / "operations.md").read_text()
    headings = {line.lstrip("# ").strip() for line in runbook.splitlines() if line.startswith("#")}
    for rule in ALERTS:
        name = rule["alert"]
        assert rule["labels"] == {"severity": rule["labels"]["severity"]}
        assert rule["labels"]["severity"] in SEVERITIES
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert name in headings, f"docs/operations.md has no heading {name!r}"
        text = re.split(r"(?m)^#+ ", runbook.split(f"# {name}\n", 1)[1])[0]
        assert len(text.split()) >= 30, f"the runbook of {name} says next to nothing"


def test_recorded_names_follow_the_convention() -> None:
    assert RECORDED
    for name in RECORDED:
        assert re.fullmatch(r"[a-z_]+:pawl_[a-z_]+:[a-z0-9_]+", name)
    for name in EXPOSED:
        assert ":" not in name


def test_the_manifest_holds_the_same_rules() -> None:
    plain = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
    assert of_kind("gpu", "PrometheusRule")["pawl"]["spec"] == plain


def test_every_alert_is_tested_to_fire() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules_test.yaml").read_text())["tests"]
    fired = {c["alertname"] for t in tests for c in t.get("alert_rule_test", []) if c.get("exp_alerts")}
    assert fired == WANTED_ALERTS


def _promtool(*arguments: str) -> None:
    """Run promtool in the folder of the rules; skips without it."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("RULES NOT RUN: promtool is not installed")
    done = subprocess.run(
        [promtool, *arguments],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_runs_the_rules() -> None:
    _promtool("test", "rules", "rules_test.yaml")


def test_promtool_parses_every_expression(tmp_path: Path) -> None:
    rules = [
        {"record": f"dashboard:pawl:number{number}", "expr": text.replace("$__rate_interval", "1m")}
        for number, text in enumerate(expression.text for expression in EXPRESSIONS)
    ]
    path = tmp_path / "expressions.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "expressions", "rules": rules}]}))
    _promtool("check", "rules", str(path))


def test_the_adapter_serves_what_the_autoscaler_asks_for() -> None:
    adapter = yaml.safe_load((DEPLOY / "prometheus" / "adapter.yaml").read_text())
    served = {name for rule in adapter["rules"]["custom"] for name in metric_names_in(rule["seriesQuery"])}
    autoscaler = of_kind("gpu", "HorizontalPodAutoscaler")["pawl-frontend"]["spec"]
    assert {metric["pods"]["metric"]["name"] for metric in autoscaler["metrics"]} <= served
