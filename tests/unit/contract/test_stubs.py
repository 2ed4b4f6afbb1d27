"""The committed stubs are those of the protos, and the protos keep their promises."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = [("pawl/v1", "client"), ("pawl_server/internal/v1", "server")]


@pytest.mark.parametrize(("package", "folder"), PACKAGES)
def test_stubs_are_fresh(package: str, folder: str, tmp_path: Path) -> None:
    """Generating again changes nothing."""
    protos = sorted(path.relative_to(ROOT / "protos") for path in (ROOT / "protos" / package).glob("*.proto"))
    assert protos
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "protos"]
    outputs = [f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
    subprocess.run([*command, *outputs, *map(str, protos)], cwd=ROOT, check=True, timeout=60)
    for made in (tmp_path / package).glob("*.py"):
        committed = ROOT / folder / package / made.name
        assert committed.read_text() == made.read_text(), f"{committed} is stale: run `make protos`"


@pytest.mark.parametrize("package", [package for package, _ in PACKAGES])
def test_every_field_is_commented(package: str) -> None:
    """Every message, field, enum value, service and call has a comment right above it."""
    for path in (ROOT / "protos" / package).glob("*.proto"):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            text = line.strip()
            if text.startswith(("//", "syntax", "package", "import", "}", "oneof")) or not text:
                continue
            assert lines[number - 1].strip().startswith("//"), f"{path.name}:{number + 1}: {text}"


def test_every_scalar_choice_has_presence() -> None:
    """Sampling parameters can tell unset from zero."""
    from pawl.v1 import types_pb2

    for field in types_pb2.SamplingParams.DESCRIPTOR.fields:
        if not field.is_repeated:
            assert field.has_presence, field.name
