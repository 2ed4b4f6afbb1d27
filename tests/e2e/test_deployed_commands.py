"""The front end as the manifest starts, probes and stops it, with nothing but what its image installs."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pawl import Client, Unauthenticated
from pawl_server.frontend.auth import hash_key, new_key
from tests.fakes.servers import ROOT, RunningServer, environment, pawl, pawl_fleet
from tests.unit.deploy.manifests import commands, container

# On `sys.path` before everything else: refuses the imports that it lists.
BLOCKER = """\
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)

sys.meta_path.insert(0, Blocker())
"""


def _health(channel: grpc.Channel, service: str) -> int:
    """What a gRPC probe asks; the stub has no type for its calls."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed_with(extra: str) -> set[str]:
    """Distributions that `pawl-serve[extra]` brings, with all that these need (optional parts left in)."""
    found: set[str] = set()
    waiting = [
        requirement
        for requirement in importlib.metadata.requires("pawl-serve") or []
        if "extra ==" not in requirement or re.search(rf"extra == ['\"]{extra}['\"]", requirement)
    ]
    while waiting:
        name = _plain(re.split(r"[<>=!~\[;( ]", waiting.pop())[0])
        if name not in found:
            found.add(name)
            try:
                needs = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            waiting += [requirement for requirement in needs if "extra ==" not in requirement]
    return found


def _blocked_modules() -> set[str]:
    """Importable names of this environment that the front end's image has not."""
    kept = _installed_with("server") | {"pawl-serve", "pip", "setuptools"}
    blocked = set()
    for module, distributions in importlib.metadata.packages_distributions().items():
        if not {_plain(name) for name in distributions} & kept:
            blocked.add(module)
    return blocked


def _from_manifest(replaced: dict[str, str]) -> list[str]:
    """Arguments of the manifest's container, with the values of some flags replaced."""
    command = list(container("base", "frontend", "frontend")["command"])
    assert command[0] == "pawl"
    for flag, value in replaced.items():
        command[command.index(flag) + 1] = value
    return command[1:]


@pytest.fixture(scope="module")
def key() -> str:
    return new_key()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which Python finds only what the front end's image has."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "sitecustomize.py").write_text(f"BLOCKED = {sorted(_blocked_modules())!r}\n{BLOCKER}")
    return {"PYTHONPATH": f"{folder}:{environment()['PYTHONPATH']}"}


@pytest.fixture(scope="module")
def front_end(tmp_path_factory: pytest.TempPathFactory, image: dict[str, str], key: str) -> Iterator[RunningServer]:
    folder = Path(tmp_path_factory.mktemp("secrets"))
    (folder / "keys.toml").write_text(f'[[keys]]\nhash = "{hash_key(key)}"\ntenant = "shop"\n')
    (folder / "token").write_text("a shared secret of the test, long enough\n")
    (folder / "token").chmod(0o600)
    token = str(folder / "token")
    with pawl_fleet(f"--internal-token-file={token}") as fleet:
        arguments = _from_manifest(
            {
                "--fleet": fleet.fleet,
                "--host": "127.0.0.1",
                "--port": "0",
                "--admin-port": "0",
                "--metrics-host": "127.0.0.1",
                "--metrics-port": "0",
                "--api-key-file": str(folder / "keys.toml"),
                "--internal-token-file": token,
            }
        )
        with pawl(*arguments, variables=image) as server:
            yield server


def test_torch_and_ray_are_among_what_is_refused(image: dict[str, str]) -> None:
    blocked = _blocked_modules()
    assert {"torch", "ray", "safetensors", "transformers", "locust", "pytest"} <= blocked
    assert not {"grpc", "google", "msgspec", "tokenizers", "prometheus_client", "jinja2"} & blocked
    done = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment(image), capture_output=True, text=True, check=False
    )
    assert "torch is not in the image" in done.stderr


def test_the_front_end_serves_without_them(front_end: RunningServer, key: str) -> None:
    with Client(front_end.target, api_key=key) as client:
        client.wait_ready(timeout=60)
        assert client.generate("Once upon a time", max_tokens=4).usage.output_tokens == 4
    with Client(front_end.target) as stranger, pytest.raises(Unauthenticated):
        stranger.generate("Once upon a time", max_tokens=4)


def test_probes_are_answered_without_a_key(front_end: RunningServer) -> None:
    item = container("base", "frontend", "frontend")
    with grpc.insecure_channel(front_end.target) as channel:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            status = _health(channel, item[probe]["grpc"]["service"])
            assert status == health_pb2.HealthCheckResponse.SERVING


def test_the_pre_stop_hook_drains(front_end: RunningServer, key: str) -> None:
    calls = commands(container("base", "frontend", "frontend")["lifecycle"]["preStop"]["exec"])
    (drain,) = [call for call in calls if call[0] == "pawl"]
    drain[drain.index("--admin-target") + 1] = front_end.admin
    done = subprocess.run(
        [sys.executable, "-m", "pawl_server.cli", *drain[1:]],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with grpc.insecure_channel(front_end.target) as channel:
        assert _health(channel, "readiness") == health_pb2.HealthCheckResponse.NOT_SERVING
    assert front_end.stop() == 0
