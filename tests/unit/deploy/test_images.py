"""The Dockerfiles, as far as they can be checked without building: paths, extras, commands, user."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from pathlib import Path

import pytest

from pawl_server.cli.arguments import build_parser, config_from
from tests.unit.deploy.manifests import BUILDS, DEPLOY, ROOT, pods

DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def _instructions(path: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) with continued lines joined and comments dropped."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def _of(path: Path, instruction: str) -> list[str]:
    return [rest for word, rest in _instructions(path) if word == instruction]


def _packages(extra: str) -> set[str]:
    """Distributions that an extra installs, extras of our own included."""
    found = set()
    for requirement in EXTRAS[extra]:
        own = re.fullmatch(r"pawl-serve\[(.+)\]", requirement)
        if own:
            found |= {name for part in own[1].split(",") for name in _packages(part)}
        else:
            found.add(re.split(r"[<>=!\[ ]", requirement)[0].lower())
    return found


def _sent_to_docker(path: str) -> bool:
    """Whether .dockerignore lets a path through; the last matching line decides."""
    sent = True
    for raw in (ROOT / ".dockerignore").read_text().splitlines():
        line = raw.strip()
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if any(fnmatch.fnmatch(part, pattern) for part in (path, path.split("/", maxsplit=1)[0])):
                sent = line.startswith("!")
    return sent


def test_there_are_two() -> None:
    assert [path.name for path in DOCKERFILES] == ["frontend.Dockerfile", "worker.Dockerfile"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_copied_paths_exist_and_are_sent(path: Path) -> None:
    copied = [word for rest in _of(path, "COPY") for word in rest.split()[:-1] if not word.startswith("--")]
    assert "pyproject.toml" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert _sent_to_docker(source), f"{source} is kept back by .dockerignore"
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {package.split("/")[0] for package in packages} <= set(copied)
    readme, licenses = PROJECT["project"]["readme"], PROJECT["project"]["license-files"]
    assert {readme, *licenses} <= set(copied)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_secrets_and_history_stay_out(path: Path) -> None:
    assert path.exists()
    for kept_back in (".git", ".venv", "tests", "docs", "deploy", "runs"):
        assert not _sent_to_docker(kept_back)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_the_base_is_pinned_and_supported(path: Path) -> None:
    for base in _of(path, "FROM"):
        match = re.match(r"python:(\d+)\.(\d+)\.(\d+)-slim-\w+", base)
        assert match, base
        assert (int(match[1]), int(match[2])) >= (3, 11)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_nobody_is_root_and_numbers_agree_with_the_pods(path: Path) -> None:
    (user,) = _of(path, "USER")
    assert user == "10001:10001"
    for build in BUILDS:
        for pod in pods(build).values():
            assert f"{pod.spec['securityContext']['runAsUser']}:{pod.spec['securityContext']['runAsGroup']}" == user


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_installs_are_constrained(path: Path) -> None:
    installs = [rest for rest in _of(path, "RUN") if "pip install" in rest]
    assert installs
    assert all("--constraint /tmp/constraints.txt" in rest for rest in installs)


def test_the_front_end_has_neither_torch_nor_ray() -> None:
    (extra,) = re.findall(r"\.whl\)\[(\w+)\]", (DEPLOY / "docker" / "frontend.Dockerfile").read_text())
    assert not {"torch", "ray"} & _packages(extra)
    assert "torch" not in " ".join(_of(DEPLOY / "docker" / "frontend.Dockerfile", "RUN"))
    (extra,) = re.findall(r"\.whl\)\[(\w+)\]", (DEPLOY / "docker" / "worker.Dockerfile").read_text())
    assert {"torch", "ray", "safetensors", "tokenizers"} <= _packages(extra)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_the_command_is_one_of_ours(path: Path) -> None:
    (entry,), (command,) = _of(path, "ENTRYPOINT"), _of(path, "CMD")
    assert json.loads(entry) == ["pawl"]
    assert "pawl" in PROJECT["project"]["scripts"]
    config = config_from(build_parser(all_help=False).parse_args(json.loads(command)), {})
    exposed = {int(port) for port in _of(path, "EXPOSE")[0].split()}
    assert exposed == {config.frontend.port, config.frontend.metrics_port}
    assert config.frontend.host == "0.0.0.0"
    assert config.frontend.admin_host == "127.0.0.1"
