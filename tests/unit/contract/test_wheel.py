"""The wheel: what is in it, and that it works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert tops - info == {"pawl", "pawl_server", "pawl_workers", "pawl_loadtest"}
    for wanted in (
        "pawl/py.typed",
        "pawl/v1/inference_pb2.py",
        "pawl_server/internal/v1/engine_pb2_grpc.py",
        "pawl_workers/demo_model/model.safetensors",
        "pawl_workers/demo_model/tokenizer.json",
        "pawl_workers/kernels/native/attention.c",
        "pawl_workers/kernels/native/attention_rows.c",
        "pawl_workers/kernels/native/vector.h",
    ):
        assert wanted in names
    assert not [name for name in names if "__pycache__" in name]


def test_it_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Unpacked beside nothing of ours: the SDK generates, the command line speaks, the model is found."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import pawl, pathlib\n"
        "from pawl.testing import FakeServer\n"
        "with FakeServer() as server, pawl.Client(server.target) as client:\n"
        "    print(client.generate('Hi').text)\n"
        "import pawl_server.cli\n"
        "from pawl_workers.model.source import resolve_checkpoint\n"
        "print(all(str(tmp) in str(path) for tmp in [pathlib.Path.cwd()]"
        " for path in [pawl.__file__, pawl_server.__file__, resolve_checkpoint('demo')]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == ["You said: Hi", "True"]
