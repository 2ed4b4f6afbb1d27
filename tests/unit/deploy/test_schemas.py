"""Every manifest against its schema: Kubernetes' own, KubeRay's CRD, and small ones of ours for the rest."""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.unit.deploy.manifests import BUILDS, DEPLOY, ROOT, Tree, manifests, of_kind

CUSTOM_SCHEMAS: dict[str, Tree] = json.loads((Path(__file__).parent / "data" / "custom_kinds.json").read_text())
OLDEST_KUBERNETES = "1.30"
CRD_FILE = "ray.io_rayclusters.yaml"


def _core(build: str) -> list[Tree]:
    return [m for m in manifests(build) if m["kind"] not in CUSTOM_SCHEMAS and m["kind"] != "RayCluster"]


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, "1.33"])
@pytest.mark.parametrize("build", ["base", "gpu"])
def test_core_kinds(build: str, version: str) -> None:
    core = _core(build)
    assert len(core) >= 15
    for manifest in core:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_strict_means_that_a_misspelt_field_fails() -> None:
    budget = copy.deepcopy(of_kind("base", "PodDisruptionBudget")["pawl-frontend"])
    budget["spec"]["minAvailabel"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(budget, OLDEST_KUBERNETES, strict=True)


def test_custom_kinds() -> None:
    found = [m for m in manifests("gpu") if m["kind"] in CUSTOM_SCHEMAS]
    found.append(yaml.safe_load((DEPLOY / "prometheus" / "keda.yaml").read_text()))
    assert {m["kind"] for m in found} == set(CUSTOM_SCHEMAS)
    for manifest in found:
        jsonschema.validate(manifest, CUSTOM_SCHEMAS[manifest["kind"]])


@functools.cache
def _ray_cluster_validator() -> jsonschema.Draft202012Validator:
    """Of KubeRay's CRD, with unknown fields refused. PAWL_TEST_CRDS names the folder that holds it."""
    folder = Path(os.environ.get("PAWL_TEST_CRDS", ROOT.parent / "shared" / "crds"))
    path = folder / CRD_FILE
    if not path.exists():
        pytest.skip(f"RAYCLUSTER NOT VALIDATED: no {CRD_FILE} in {folder} (set PAWL_TEST_CRDS to KubeRay's crds)")
    document = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [v for v in document["spec"]["versions"] if v["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    # The API server's part of a manifest: the CRD leaves it open.
    metadata: Tree = {"name": {}, "namespace": {}, "labels": {}, "annotations": {}}
    schema["properties"]["metadata"] = {"type": "object", "properties": metadata}
    _close(schema)
    return jsonschema.Draft202012Validator(schema)


def _close(schema: Tree) -> None:
    """Refuse unknown fields in every object that lists its fields."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
        for below in schema["properties"].values():
            _close(below)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            _close(schema[key])


@pytest.mark.parametrize("build", BUILDS)
def test_ray_cluster(build: str) -> None:
    errors = list(_ray_cluster_validator().iter_errors(of_kind(build, "RayCluster")["pawl"]))
    assert not errors, [f"{error.json_path}: {error.message}" for error in errors]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("headGroupSpecs",), {}),
        (("authOptions", "mode"), "tokn"),
        (("workerGroupSpecs", 0, "template", "spec", "enableServicelinks"), False),
        (("workerGroupSpecs", 0, "replicas"), "two"),
    ],
)
def test_the_closed_crd_refuses(path: tuple[str | int, ...], value: object) -> None:
    validator = _ray_cluster_validator()
    cluster = copy.deepcopy(of_kind("base", "RayCluster")["pawl"])
    node = cluster["spec"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert list(validator.iter_errors(cluster))
