"""The rendered manifests, typed loosely, and the pods in them: what the policy tests walk over."""

from __future__ import annotations

import functools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.unit.deploy.kustomize import render

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
BUILDS = {
    "base": DEPLOY / "k8s" / "base",
    "cpu-dev": DEPLOY / "k8s" / "overlays" / "cpu-dev",
    "gpu": DEPLOY / "k8s" / "overlays" / "gpu",
}

# Manifests are data of many shapes; schemas are checked elsewhere, and a wrong key here fails the test.
Tree = dict[str, Any]

_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod template and the manifest it stands in."""

    owner: str
    name: str
    labels: dict[str, str]
    spec: Tree

    @property
    def containers(self) -> list[Tree]:
        """Its containers, init containers included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@functools.cache
def manifests(build: str) -> tuple[Tree, ...]:
    """What an overlay renders to."""
    return tuple(render(BUILDS[build]))


def of_kind(build: str, kind: str) -> dict[str, Tree]:
    """Manifests of a kind by name."""
    return {m["metadata"]["name"]: m for m in manifests(build) if m["kind"] == kind}


def pods(build: str) -> dict[str, Pod]:
    """Pod templates: `frontend`, `head` and `worker`."""
    frontend = of_kind(build, "Deployment")["pawl-frontend"]["spec"]["template"]
    cluster = of_kind(build, "RayCluster")["pawl"]["spec"]
    (group,) = cluster["workerGroupSpecs"]
    head, worker = cluster["headGroupSpec"]["template"], group["template"]
    return {
        "frontend": Pod("Deployment", "frontend", frontend["metadata"]["labels"], frontend["spec"]),
        "head": Pod("RayCluster", "head", _with_ray_labels(head, "head"), head["spec"]),
        "worker": Pod("RayCluster", "worker", _with_ray_labels(worker, "worker"), worker["spec"]),
    }


def _with_ray_labels(template: Tree, node_type: str) -> dict[str, str]:
    """The labels that KubeRay adds."""
    return {**template["metadata"]["labels"], "ray.io/cluster": "pawl", "ray.io/node-type": node_type}


def container(build: str, pod: str, name: str) -> Tree:
    """A container by name."""
    (found,) = [c for c in pods(build)[pod].containers if c["name"] == name]
    return dict(found)


def settings_variables(build: str) -> dict[str, str]:
    """The variables of the ConfigMap."""
    return dict(of_kind(build, "ConfigMap")["pawl-settings"]["data"])


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number: 500m, 1Gi."""
    match = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text))
    assert match, f"{text!r} is no quantity"
    return float(match[1]) * _UNITS[match[2]]


def commands(node: Tree) -> list[list[str]]:
    """The program calls of a container's command or an exec action: `sh -c` taken apart at `&&`."""
    command = [*node.get("command", []), *node.get("args", [])]
    if command[:2] == ["/bin/sh", "-c"]:
        parts = [shlex.split(part) for part in command[2].split("&&")]
        return [part[1:] if part[0] == "exec" else part for part in parts]
    return [command] if command else []
