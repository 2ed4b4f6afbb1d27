"""The commands in the manifests and images are those of the CLI, and their settings fit the pods."""

from __future__ import annotations

import re

import pytest

from pawl_server.cli.arguments import build_parser, config_from
from pawl_server.config import Config, load_config, settings
from pawl_server.engine.spec import parse_ports
from tests.unit.deploy.manifests import (
    BUILDS,
    ROOT,
    Tree,
    commands,
    container,
    of_kind,
    pods,
    quantity,
    settings_variables,
)


def _parsed_config(command: list[str], environment: dict[str, str]) -> Config:
    """What `pawl …` would run with; the parser exits with 2 on a flag that it does not know."""
    assert command[0] == "pawl"
    return config_from(build_parser(all_help=False).parse_args(command[1:]), environment)


def _config_of(build: str, pod: str, name: str) -> Config:
    item = container(build, pod, name)
    assert item["envFrom"] == [{"configMapRef": {"name": "pawl-settings"}}]
    (command,) = commands(item)
    return _parsed_config(command, settings_variables(build))


def _calls(node: object) -> list[list[str]]:
    """Every program call below a node."""
    if isinstance(node, list):
        return [call for item in node for call in _calls(item)]
    if not isinstance(node, dict):
        return []
    found = commands(node) if isinstance(node.get("command"), list) else []
    return found + [call for value in node.values() for call in _calls(value)]


@pytest.mark.parametrize("build", BUILDS)
def test_every_pawl_command_parses(build: str) -> None:
    seen = set()
    for pod in pods(build).values():
        for call in _calls(pod.spec):
            if call[0] == "pawl":
                build_parser(all_help=False).parse_args(call[1:])
                seen.add(call[1])
            else:
                assert call[0] in {"ray", "sleep"}, call
    assert seen == {"frontend", "fleet", "drain"}


def test_a_flag_that_does_not_exist_would_fail() -> None:
    with pytest.raises(SystemExit):
        build_parser(all_help=False).parse_args(["frontend", "--flet", "x"])


@pytest.mark.parametrize("build", BUILDS)
def test_the_config_map_holds_settings(build: str) -> None:
    known = {setting.variable for setting in settings() if not setting.secret}
    variables = settings_variables(build)
    assert set(variables) <= known
    load_config(environment=variables)


@pytest.mark.parametrize("build", BUILDS)
def test_front_end_listens_where_the_manifest_says(build: str) -> None:
    frontend = _config_of(build, "frontend", "frontend").frontend
    default = Config().frontend
    assert (frontend.port, frontend.admin_port, frontend.metrics_port) == (
        default.port,
        default.admin_port,
        default.metrics_port,
    )
    assert (frontend.host, frontend.metrics_host, frontend.admin_host) == ("0.0.0.0", "0.0.0.0", "127.0.0.1")
    ports = {p["name"]: p["containerPort"] for p in container(build, "frontend", "frontend")["ports"]}
    assert ports == {"grpc": frontend.port, "metrics": frontend.metrics_port}


@pytest.mark.parametrize("build", BUILDS)
def test_fleet_and_engines_listen_where_the_manifest_says(build: str) -> None:
    config = _config_of(build, "head", "fleet")
    fleet = config.fleet
    ports = {p["name"]: p["containerPort"] for p in container(build, "head", "fleet")["ports"]}
    assert ports == {"fleet": fleet.fleet_port, "fleet-metrics": config.frontend.metrics_port}
    # The ports that `pawl fleet` has when nobody says any.
    usual = _usual_fleet_ports()
    assert (fleet.fleet_port, config.frontend.metrics_port) == usual
    assert (fleet.fleet, fleet.ray_address) == ("ray", "auto")
    assert (fleet.fleet_host, fleet.engine_host) == ("0.0.0.0", "0.0.0.0")
    engine = {p["name"]: p["containerPort"] for p in container(build, "worker", "ray-worker")["ports"]}
    assert engine["engine"] == parse_ports(fleet.engine_ports, "engine_ports")[0]
    assert engine["engine-metrics"] == parse_ports(fleet.engine_metrics_ports, "engine_metrics_ports")[0]


def _usual_fleet_ports() -> tuple[int, int]:
    from pawl_server.cli import server_commands

    parsed = build_parser(all_help=False).parse_args(["fleet"])
    config = config_from(parsed, {}, server_commands._FLEET_DEFAULTS)
    return config.fleet.fleet_port, config.frontend.metrics_port


@pytest.mark.parametrize("build", BUILDS)
def test_front_end_finds_the_fleet_and_shares_its_token(build: str) -> None:
    frontend, fleet = _config_of(build, "frontend", "frontend"), _config_of(build, "head", "fleet")
    name, _, port = frontend.fleet.fleet.partition(":")
    (service_port,) = of_kind(build, "Service")[name]["spec"]["ports"]
    assert service_port["port"] == int(port) == fleet.fleet.fleet_port
    assert frontend.security.internal_token_file == fleet.security.internal_token_file
    assert frontend.security.api_key_file, "a public listener without keys"
    for pod, item, path in (
        ("frontend", "frontend", frontend.security.internal_token_file),
        ("frontend", "frontend", frontend.security.api_key_file),
        ("head", "fleet", fleet.security.internal_token_file),
    ):
        folder = path.rpartition("/")[0]
        (mount,) = [m for m in container(build, pod, item)["volumeMounts"] if m["mountPath"] == folder]
        (volume,) = [v for v in pods(build)[pod].spec["volumes"] if v["name"] == mount["name"]]
        assert "secret" in volume
        assert mount["readOnly"] is True


@pytest.mark.parametrize("build", BUILDS)
def test_one_replica_fits_a_worker_and_only_one(build: str) -> None:
    config = _config_of(build, "head", "fleet")
    (group,) = of_kind(build, "RayCluster")["pawl"]["spec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == config.fleet.replicas
    limits = container(build, "worker", "ray-worker")["resources"]["limits"]
    cpus, gpus = quantity(limits["cpu"]), quantity(limits.get("nvidia.com/gpu", "0"))
    assert config.fleet.cpus_per_replica == cpus == config.engine.num_threads
    if config.model.device == "cuda":
        assert config.fleet.gpus_per_replica == gpus >= 1
    else:
        assert config.model.device == "cpu"
        assert gpus == 0
        # What a process sees as free is the machine's memory, not the container's.
        assert 0 < config.engine.kv_max_bytes <= quantity(limits["memory"]) / 2


@pytest.mark.parametrize("build", BUILDS)
def test_ray_starts_with_flags_of_ray(build: str) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts", reason="RAY'S FLAGS NOT CHECKED: ray is not installed")
    known = {option.removeprefix("--") for parameter in scripts.start.params for option in parameter.opts}
    cluster: Tree = of_kind(build, "RayCluster")["pawl"]["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= known
        (port,) = {p["tcpSocket"]["port"] for p in _probes(group) if "tcpSocket" in p} - {6379, 50060}
        assert str(port) == group["rayStartParams"]["node-manager-port"]


def _probes(group: Tree) -> list[Tree]:
    return [
        item[probe]
        for item in group["template"]["spec"]["containers"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    ]


def test_ray_version_is_the_pinned_one() -> None:
    (pinned,) = re.findall(r"(?m)^ray==(.+)$", (ROOT / "constraints.txt").read_text())
    for build in BUILDS:
        assert of_kind(build, "RayCluster")["pawl"]["spec"]["rayVersion"] == pinned
