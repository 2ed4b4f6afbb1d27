"""Renders our kustomizations without kustomize: resources, patches and images, as much as the overlays use.

Refuses whatever it does not know, so that an overlay cannot say more than the tests see.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import yaml

__all__ = ["Manifest", "render"]

Node = str | int | float | bool | None | list["Node"] | dict[str, "Node"]
Manifest = dict[str, Node]

_KNOWN = {"apiVersion", "kind", "resources", "patches", "images"}


def render(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization.

    Raises:
        ValueError: it uses something that this renderer does not know, or a patch does not fit.
    """
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(kustomization) - _KNOWN:
        raise ValueError(f"{folder}: {sorted(unknown)} is not rendered here")
    manifests: list[Manifest] = []
    for resource in kustomization.get("resources", ()):
        path = folder / resource
        if path.is_dir():
            manifests += render(path.resolve())
        else:
            manifests += [document for document in yaml.safe_load_all(path.read_text()) if document]
    for patch in kustomization.get("patches", ()):
        _patch(manifests, patch, folder)
    for image in kustomization.get("images", ()):
        for manifest in manifests:
            _set_image(manifest, image)
    return manifests


def _patch(manifests: list[Manifest], patch: dict[str, Node], folder: Path) -> None:
    body = yaml.safe_load((folder / str(patch["path"])).read_text())
    if isinstance(body, list):
        target = _find(manifests, cast("dict[str, str]", patch["target"]))
        for operation in body:
            _operate(target, operation)
        return
    target = _find(manifests, {"kind": body["kind"], "name": body["metadata"]["name"]})
    _merge(target, body)


def _find(manifests: list[Manifest], wanted: dict[str, str]) -> Manifest:
    def name(manifest: Manifest) -> Node:
        return cast("Manifest", manifest["metadata"])["name"]

    found = [m for m in manifests if m["kind"] == wanted["kind"] and name(m) == wanted["name"]]
    if len(found) != 1:
        raise ValueError(f"{len(found)} manifests are {wanted}")
    return found[0]


def _merge(target: Manifest, patch: Manifest) -> None:
    for key, value in patch.items():
        if isinstance(value, list):
            raise ValueError(f"{key}: how lists merge depends on the kind: use a JSON 6902 patch")  # noqa: TRY004
        below = target.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            _merge(below, value)
        elif value is None:
            target.pop(key, None)
        else:
            target[key] = copy.deepcopy(value)


def _operate(target: Manifest, operation: dict[str, Node]) -> None:
    path = [part.replace("~1", "/").replace("~0", "~") for part in str(operation["path"]).split("/")[1:]]
    node: Node = target
    for part in path[:-1]:
        node = node[int(part)] if isinstance(node, list) else cast("Manifest", node)[part]
    last, kind = path[-1], operation["op"]
    value = copy.deepcopy(operation.get("value"))
    if isinstance(node, list):
        if kind == "add":
            node.insert(len(node) if last == "-" else int(last), value)
        elif kind == "replace":
            node[int(last)] = value
        elif kind == "remove":
            del node[int(last)]
        else:
            raise ValueError(f"operation {kind!r} is not rendered here")
        return
    fields = cast("Manifest", node)
    if kind in ("replace", "remove") and last not in fields:
        raise ValueError(f"{operation['path']}: nothing to {kind}")
    if kind not in ("add", "replace", "remove"):
        raise ValueError(f"operation {kind!r} is not rendered here")
    if kind == "remove":
        del fields[last]
    else:
        fields[last] = value


def _set_image(node: Node, image: dict[str, str]) -> None:
    """Change `image` of every container below a node."""
    if isinstance(node, list):
        for item in node:
            _set_image(item, image)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                for container in value:
                    _rename(cast("Manifest", container), image)
            else:
                _set_image(value, image)


def _rename(container: Manifest, image: dict[str, str]) -> None:
    name, _, tag = str(container["image"]).partition(":")
    if name == image["name"]:
        container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
