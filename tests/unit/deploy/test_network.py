"""Who reaches whom: Services select pods and ports that exist, and the NetworkPolicies let through that alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pawl_server.config import Config
from tests.unit.deploy.manifests import BUILDS, Tree, of_kind, pods

ADMIN_PORT = Config().frontend.admin_port


@dataclass(frozen=True, slots=True)
class Peer:
    """A pod of the namespace, or of another one."""

    labels: dict[str, str]
    namespace: str = "pawl"


def _selects(selector: Tree, labels: dict[str, str]) -> bool:
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def _is_peer(rule: Tree, peer: Peer) -> bool:
    if "ipBlock" in rule:
        return False
    if "namespaceSelector" in rule:
        labels = {"kubernetes.io/metadata.name": peer.namespace}
        if not _selects(rule["namespaceSelector"], labels):
            return False
    elif peer.namespace != "pawl":
        return False
    return _selects(rule.get("podSelector", {}), peer.labels)


def _lets_through(rules: list[Tree], side: str, peer: Peer, port: int) -> bool:
    for rule in rules:
        peers = rule.get(side)
        ports = rule.get("ports")
        if peers is not None and not any(_is_peer(item, peer) for item in peers):
            continue
        if ports is None or any(
            item["protocol"] == "TCP" and item["port"] <= port <= item.get("endPort", item["port"]) for item in ports
        ):
            return True
    return False


def reaches(build: str, source: Peer, target: Peer, port: int) -> bool:
    """Whether the policies let a TCP connection through: out of the source and into the target."""
    policies = [policy["spec"] for policy in of_kind(build, "NetworkPolicy").values()]
    for peer, other, direction, side in (
        (source, target, "Egress", "to"),
        (target, source, "Ingress", "from"),
    ):
        if peer.namespace != "pawl":
            continue
        about = [p for p in policies if direction in p["policyTypes"] and _selects(p["podSelector"], peer.labels)]
        rules = [rule for policy in about for rule in policy.get(direction.lower(), [])]
        if about and not _lets_through(rules, side, other, port):
            return False
    return True


@pytest.mark.parametrize("build", BUILDS)
def test_what_must_connect_can(build: str) -> None:
    frontend, head, worker = (Peer(pods(build)[name].labels) for name in ("frontend", "head", "worker"))
    client, prometheus = Peer({}, "shop"), Peer({}, "monitoring")
    dns = Peer({"k8s-app": "kube-dns"}, "kube-system")
    assert reaches(build, client, frontend, 50051)
    assert reaches(build, frontend, head, 50060)
    assert reaches(build, frontend, worker, 50100)
    assert reaches(build, frontend, worker, 50199)
    assert reaches(build, head, worker, 6380)
    assert reaches(build, worker, head, 6379)
    for target, port in ((frontend, 9400), (head, 9401), (worker, 9500)):
        assert reaches(build, prometheus, target, port)
    for pod in (frontend, head, worker):
        assert reaches(build, pod, dns, 53)


@pytest.mark.parametrize("build", BUILDS)
def test_what_must_not_connect_cannot(build: str) -> None:
    frontend, head, worker = (Peer(pods(build)[name].labels) for name in ("frontend", "head", "worker"))
    client, neighbour, prometheus = Peer({}, "shop"), Peer({"app": "other"}), Peer({}, "monitoring")
    for target, port in ((frontend, ADMIN_PORT), (frontend, 9400), (head, 50060), (head, 6379), (worker, 50100)):
        assert not reaches(build, client, target, port)
        assert not reaches(build, neighbour, target, port)
    # The process that faces the network is no Ray peer.
    assert not reaches(build, frontend, head, 6379)
    assert not reaches(build, frontend, worker, 6380)
    assert not reaches(build, frontend, client, 80)
    assert not reaches(build, prometheus, worker, 50100)
    assert not reaches(build, prometheus, frontend, ADMIN_PORT)


@pytest.mark.parametrize("build", BUILDS)
def test_the_admin_port_is_nowhere(build: str) -> None:
    for service in of_kind(build, "Service").values():
        for port in service["spec"]["ports"]:
            assert ADMIN_PORT not in (port["port"], port["targetPort"])
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    for pod in pods(build).values():
        for item in pod.containers:
            assert ADMIN_PORT not in [port["containerPort"] for port in item["ports"]]


@pytest.mark.parametrize("build", BUILDS)
def test_services_lead_somewhere(build: str) -> None:
    for name, service in of_kind(build, "Service").items():
        wanted = service["spec"]["selector"].items()
        (pod,) = [pod for pod in pods(build).values() if wanted <= pod.labels.items()]
        ports = {p["name"]: p["containerPort"] for item in pod.containers for p in item["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"], name


def test_prometheus_scrapes_each_kind_of_process() -> None:
    monitor = of_kind("gpu", "ServiceMonitor")["pawl"]["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    scraped = {
        name: service["spec"]["ports"]
        for name, service in of_kind("gpu", "Service").items()
        if wanted <= service["metadata"]["labels"].items()
    }
    assert set(scraped) == {"pawl-frontend-metrics", "pawl-fleet-metrics", "pawl-engine-metrics"}
    (endpoint,) = monitor["endpoints"]
    for ports in scraped.values():
        assert [port["name"] for port in ports] == [endpoint["port"]]


def test_only_the_gpu_overlay_reaches_the_internet() -> None:
    for build in BUILDS:
        out = [
            peer["ipBlock"]["cidr"]
            for policy in of_kind(build, "NetworkPolicy").values()
            for rule in policy["spec"].get("egress", [])
            for peer in rule["to"]
            if "ipBlock" in peer
        ]
        assert out == (["0.0.0.0/0"] if build == "gpu" else [])
