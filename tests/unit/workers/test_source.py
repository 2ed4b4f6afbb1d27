"""Where a checkpoint is found, and what its content is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pawl_workers.errors import CheckpointError
from pawl_workers.model.source import checkpoint_revision, resolve_checkpoint
from tests.fakes.checkpoints import make_llama


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders, the packaged model, and clear refusals of everything else."""
    folder = make_llama(tmp_path / "model")
    assert resolve_checkpoint(str(folder)) == folder.resolve()
    assert resolve_checkpoint("demo") == resolve_checkpoint(None)
    assert resolve_checkpoint("demo").name == "demo_model"
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_checkpoint(str(folder / "config.json"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="could not fetch nobody/nothing at main"):
        resolve_checkpoint("nobody/nothing", "main")


def test_revisions_follow_the_content(tmp_path: Path) -> None:
    """Equal folders have equal revisions, others do not; a hub snapshot's is its commit."""
    one, same, other = (make_llama(tmp_path / name, seed=seed) for name, seed in (("1", 0), ("2", 0), ("3", 1)))
    assert checkpoint_revision(one) == checkpoint_revision(same) != checkpoint_revision(other)
    before = checkpoint_revision(one)
    assert checkpoint_revision(make_llama(one, rms_norm_eps=1e-3)) != before
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert checkpoint_revision(make_llama(tmp_path / "snapshots" / commit)) == commit


def test_finding_a_checkpoint_needs_no_torch() -> None:
    """The front end uses it, and must not import torch."""
    code = "import sys, pawl_workers.model.source, pawl_workers.plan; sys.exit('torch' in sys.modules)"
    paths = [str(Path(__file__).parents[3] / name) for name in ("workers",)]
    result = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(paths)}, check=False)
    assert result.returncode == 0
