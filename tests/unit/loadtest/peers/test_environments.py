"""Environments of the peers: made once, and a failure that names its reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pawl_loadtest.peers import environments
from pawl_loadtest.peers.environments import Environment, EnvironmentUnavailable, interpreter


def test_an_environment_is_made_once_and_a_failure_names_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "_TORCH", "torch==0")
    known = {
        "plain": Environment("json", ()),
        "missing": Environment("json", (("--no-index", "pawl-peer-that-is-not-there"),)),
    }
    monkeypatch.setattr(environments, "ENVIRONMENTS", known)
    said: list[str] = []
    python = interpreter("plain", tmp_path, said.append)
    assert python.is_file()
    assert python == interpreter("plain", tmp_path, said.append)
    assert said == [f"installing plain into {tmp_path / 'plain'}"]
    with pytest.raises(EnvironmentUnavailable, match="ERROR: No matching distribution found"):
        interpreter("missing", tmp_path, said.append)
    assert interpreter("pawl", tmp_path, said.append) == Path(sys.executable)


def test_what_a_peer_asks_for_is_installed_but_for_what_is_left_out(tmp_path: Path) -> None:
    needs = tmp_path / "needs.txt"
    arguments = ["hypothesis[numpy]==6", "sortedcontainers", str(needs)]
    subprocess.run([sys.executable, "-c", environments._NEEDS, *arguments], check=True, timeout=60)
    names = {line.split(">")[0].split("=")[0] for line in needs.read_text().splitlines()}
    assert "numpy" in names
    assert not {"sortedcontainers", "pandas"} & names  # left out; of an extra that was not asked for
    assert ";" not in needs.read_text()
