"""`pawl doctor` says which kernels would serve a model, why, and whether it fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from pawl_server.cli.doctor import Finding, examine
from pawl_server.config import Config
from pawl_workers.kernels.native.library import load_library
from tests.fakes.checkpoints import make_llama


def examined(folder: Path) -> dict[str, Finding]:
    """Findings by name, the last of each."""
    config = Config().replace(model=str(folder), device="cpu", port=0, admin_port=0, metrics_port=0)
    return {finding.name: finding for finding in examine(config)}


def test_the_kernels_are_named(tmp_path: Path) -> None:
    found = examined(make_llama(tmp_path, tokenizer=True))
    assert found["kernels"] == Finding("ok", "kernels", "cpu: the fastest for float32 on cpu, heads of 16")
    assert (found["model"].level, found["memory"].level) == ("ok", "ok")


def test_a_machine_without_a_compiler_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It serves, but slower."""
    make_llama(tmp_path / "model")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    load_library.cache_clear()
    try:
        found = examined(tmp_path / "model")["kernels"]
    finally:
        load_library.cache_clear()
    assert found.level == "WARN"
    assert found.text.startswith("onednn: ")
    assert "not cpu: the cpu kernels are not built: there is no C compiler" in found.text
    assert len(caplog.records) == 1


def test_a_model_that_does_not_fit_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pawl_workers.start_plan.available_bytes", lambda device: 1 << 20)
    found = examined(make_llama(tmp_path))["memory"]
    assert found.level == "FAIL"
    assert "do not fit into 1.05 MB of memory" in found.text
