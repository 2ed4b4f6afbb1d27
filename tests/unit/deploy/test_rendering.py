"""Each overlay renders; our renderer agrees with kustomize where kubectl is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.unit.deploy.kustomize import render
from tests.unit.deploy.manifests import BUILDS, DEPLOY, Tree, manifests


def _key(manifest: Tree) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


@pytest.mark.parametrize("build", BUILDS)
def test_each_manifest_is_there_once_and_in_the_namespace(build: str) -> None:
    rendered = manifests(build)
    keys = [_key(manifest) for manifest in rendered]
    assert len(keys) == len(set(keys))
    for manifest in rendered:
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "pawl", _key(manifest)


def test_every_file_is_reached() -> None:
    listed: set[Path] = set()
    for kustomization in DEPLOY.glob("k8s/**/kustomization.yaml"):
        content = yaml.safe_load(kustomization.read_text())
        paths = [*content.get("resources", []), *(patch["path"] for patch in content.get("patches", []))]
        listed |= {(kustomization.parent / path).resolve() for path in paths} | {kustomization}
    assert set(DEPLOY.glob("k8s/**/*.yaml")) <= listed


@pytest.mark.parametrize("build", BUILDS)
def test_kubectl_renders_the_same(build: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("NOT COMPARED with kustomize: kubectl is not installed")
    done = subprocess.run(
        [kubectl, "kustomize", str(BUILDS[build])], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = {_key(m): m for m in yaml.safe_load_all(done.stdout)}
    assert theirs == {_key(m): m for m in manifests(build)}


def test_the_renderer_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("namePrefix: x-\n")
    with pytest.raises(ValueError, match="namePrefix"):
        render(tmp_path)


def test_the_renderer_refuses_a_patch_without_target(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: []\npatches: [{path: patch.yaml}]\n")
    (tmp_path / "patch.yaml").write_text("kind: Service\nmetadata: {name: gone}\n")
    with pytest.raises(ValueError, match="0 manifests"):
        render(tmp_path)
