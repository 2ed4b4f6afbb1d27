"""What every pod must have: probes, resources, a closed-down security context, time to drain."""

from __future__ import annotations

import re

import pytest

from pawl_server.fleet.opening import prepare_local_ray
from tests.unit.deploy.manifests import BUILDS, Tree, commands, container, manifests, of_kind, pods, quantity

ALL_PODS = [(build, name) for build in BUILDS for name in ("frontend", "head", "worker")]


@pytest.mark.parametrize(("build", "name"), ALL_PODS)
def test_pods_run_as_nobody_special(build: str, name: str) -> None:
    pod = pods(build)[name]
    context = pod.spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] >= 1000
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod.spec["automountServiceAccountToken"] is False
    assert pod.spec["serviceAccountName"] in of_kind(build, "ServiceAccount")
    for forbidden in ("hostNetwork", "hostPID", "hostIPC"):
        assert forbidden not in pod.spec
    for volume in pod.spec["volumes"]:
        assert set(volume) - {"name"} <= {"emptyDir", "secret", "configMap"}, volume
        assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], volume


@pytest.mark.parametrize(("build", "name"), ALL_PODS)
def test_service_links_are_off(build: str, name: str) -> None:
    # The link of a Service pawl-fleet would be PAWL_FLEET_PORT=tcp://…: a setting's variable.
    assert pods(build)[name].spec["enableServiceLinks"] is False


@pytest.mark.parametrize(("build", "name"), ALL_PODS)
def test_containers_are_closed_down(build: str, name: str) -> None:
    for item in pods(build)[name].containers:
        context = item["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in context
        mounts = {mount["mountPath"] for mount in item["volumeMounts"]}
        assert "/tmp" in mounts
        home = [variable["value"] for variable in item["env"] if variable["name"] == "HOME"]
        assert home == ["/tmp"], "a read-only root file system: HOME must be writable"
        if name != "frontend":
            assert "/dev/shm" in mounts


@pytest.mark.parametrize(("build", "name"), ALL_PODS)
def test_containers_have_resources(build: str, name: str) -> None:
    for item in pods(build)[name].containers:
        requests, limits = item["resources"]["requests"], item["resources"]["limits"]
        assert quantity(requests["cpu"]) > 0
        assert requests["memory"] == limits["memory"]
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
        if item["name"].startswith("ray-"):
            # KubeRay tells Ray the limit.
            assert requests["cpu"] == limits["cpu"]


@pytest.mark.parametrize(("build", "name"), ALL_PODS)
def test_containers_have_probes(build: str, name: str) -> None:
    for item in pods(build)[name].containers:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            handlers = set(item[probe]) & {"grpc", "tcpSocket", "httpGet", "exec"}
            assert len(handlers) == 1, (item["name"], probe)
        startup = item["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 60


@pytest.mark.parametrize("build", BUILDS)
def test_front_end_probes_ask_the_health_service(build: str) -> None:
    item = container(build, "frontend", "frontend")
    asked = {probe: item[probe]["grpc"]["service"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"startupProbe": "liveness", "livenessProbe": "liveness", "readinessProbe": "readiness"}
    (grpc_port,) = [port["containerPort"] for port in item["ports"] if port["name"] == "grpc"]
    assert {item[probe]["grpc"]["port"] for probe in asked} == {grpc_port}


def _seconds_before_sigterm(item: Tree) -> tuple[float, list[list[str]]]:
    calls = commands(item["lifecycle"]["preStop"]["exec"])
    return sum(float(call[1]) for call in calls if call[0] == "sleep"), calls


@pytest.mark.parametrize("build", BUILDS)
def test_front_end_has_time_to_drain(build: str) -> None:
    item = container(build, "frontend", "frontend")
    waits, calls = _seconds_before_sigterm(item)
    assert waits >= 5, "the endpoints must be gone before the drain begins"
    drain = next(call for call in calls if call[:2] == ["pawl", "drain"])
    command = item["command"]
    admin = f"{_flag(command, '--admin-host')}:{_flag(command, '--admin-port')}"
    assert _flag(drain, "--admin-target") == admin
    grace = float(_flag(command, "--drain-grace-s"))
    assert pods(build)["frontend"].spec["terminationGracePeriodSeconds"] >= waits + grace + 10


@pytest.mark.parametrize("build", BUILDS)
def test_worker_has_time_to_stop(build: str) -> None:
    _, ((*_, grace),) = _seconds_before_sigterm(container(build, "worker", "ray-worker"))
    assert pods(build)["worker"].spec["terminationGracePeriodSeconds"] >= float(grace) + 10


def _flag(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


@pytest.mark.parametrize(("build", "name"), ALL_PODS)
def test_images_have_a_tag(build: str, name: str) -> None:
    for item in pods(build)[name].containers:
        tag = item["image"].rpartition(":")[2]
        assert re.fullmatch(r"dev|\d+\.\d+\.\d+", tag), item["image"]


@pytest.mark.parametrize("build", BUILDS)
def test_ray_asks_for_a_token_and_notices_dead_nodes_as_our_own_ray_does(build: str) -> None:
    cluster = of_kind(build, "RayCluster")["pawl"]["spec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "pawl-ray-token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["headGroupSpec"]["rayStartParams"]["include-dashboard"] == "false"
    ours: dict[str, str] = {}
    prepare_local_ray(ours)
    health = {name: value for name, value in ours.items() if name.startswith("RAY_health_check_")}
    head = {variable["name"]: variable.get("value") for variable in container(build, "head", "ray-head")["env"]}
    assert health
    assert health.items() <= head.items()
    fleet = {variable["name"]: variable for variable in container(build, "head", "fleet")["env"]}
    assert fleet["RAY_AUTH_MODE"]["value"] == "token"
    assert fleet["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == cluster["authOptions"]["secretName"]


@pytest.mark.parametrize("build", BUILDS)
def test_the_fleet_can_find_the_raylet(build: str) -> None:
    # Ray looks for the raylet's process and for its sockets under /tmp/ray.
    head = pods(build)["head"]
    assert head.spec["shareProcessNamespace"] is True
    shared = [{m["name"]: m["mountPath"] for m in item["volumeMounts"]} for item in head.containers]
    assert all(mounts["tmp"] == "/tmp" and mounts["shm"] == "/dev/shm" for mounts in shared)


@pytest.mark.parametrize("build", BUILDS)
def test_secrets_are_references_only(build: str) -> None:
    assert not [m for m in manifests(build) if m["kind"] == "Secret"]


@pytest.mark.parametrize("build", BUILDS)
def test_budgets_let_nodes_drain_and_keep_something_up(build: str) -> None:
    budgets = of_kind(build, "PodDisruptionBudget")
    assert budgets["pawl-frontend"]["spec"]["maxUnavailable"] == 1
    # For pods of a kind without scale subresource, Kubernetes takes a whole number of minAvailable alone.
    engine = budgets["pawl-engine"]["spec"]
    assert "maxUnavailable" not in engine
    (group,) = of_kind(build, "RayCluster")["pawl"]["spec"]["workerGroupSpecs"]
    assert engine["minAvailable"] == group["replicas"] - 1
    for budget in budgets.values():
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        assert [pod for pod in pods(build).values() if wanted <= pod.labels.items()]


def test_namespace_is_restricted() -> None:
    labels = of_kind("base", "Namespace")["pawl"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_autoscaler_scales_before_requests_are_refused() -> None:
    from pawl_server.config import Config

    autoscaler = of_kind("gpu", "HorizontalPodAutoscaler")["pawl-frontend"]["spec"]
    deployment = of_kind("gpu", "Deployment")[autoscaler["scaleTargetRef"]["name"]]
    assert "replicas" not in deployment["spec"], "it would undo the autoscaler with every apply"
    assert 2 <= autoscaler["minReplicas"] < autoscaler["maxReplicas"]
    targets = {
        m["pods"]["metric"]["name"]: quantity(m["pods"]["target"]["averageValue"]) for m in autoscaler["metrics"]
    }
    settings = Config().frontend
    assert targets["pawl_frontend_requests_queued"] <= 0.7 * settings.max_queued_requests
    assert targets["pawl_frontend_streams_open"] <= 0.7 * settings.max_concurrent_streams
    assert autoscaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300
