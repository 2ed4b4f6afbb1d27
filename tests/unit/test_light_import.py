"""The base install: the SDK works without torch, ray, numpy, or anything of the server."""

from __future__ import annotations

import os
import subprocess
import sys

REFUSED = ["torch", "ray", "numpy", "msgspec", "transformers", "tokenizers", "grpc_health", "rich", "jinja2"]

PROGRAM = f"""
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {[*REFUSED, "pawl_server", "pawl_workers", "pawl_loadtest"]!r}:
            raise ImportError("refused: " + name)

sys.meta_path.insert(0, Refuse())
import pawl
with pawl.Client("127.0.0.1:1"), pawl.AdminClient("127.0.0.1:1"):
    pawl.AsyncClient("127.0.0.1:1")
from pawl.testing import FakeServer
with FakeServer() as server, pawl.Client(server.target) as client:
    client.wait_ready()
    print(client.generate("Hi").text)
print(sorted({{name.partition(".")[0] for name in sys.modules}} & {{"pawl", "pawl_server", "pawl_workers"}}))
"""


def test_the_sdk_needs_neither_torch_nor_ray_nor_numpy() -> None:
    """An import hook refuses them; importing, connecting and generating work all the same."""
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == ["You said: Hi", "['pawl']"]


def test_the_hook_refuses() -> None:
    """The check above can fail: the same hook does stop an import of the server."""
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM + "\nimport pawl_server"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 1
    assert "refused: pawl_server" in answer.stderr
