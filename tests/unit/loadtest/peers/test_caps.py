"""Engines held to fewer instructions: each library is told, and this process is as it was afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pawl_loadtest.peers.caps import CAPS, held_to
from pawl_loadtest.peers.environments import ENVIRONMENTS
from pawl_loadtest.peers.machine import instructions
from pawl_loadtest.peers.report import as_tables
from pawl_loadtest.peers.rounds import Outcome
from pawl_loadtest.peers.runs import JoinError, join
from pawl_loadtest.peers.variants import VARIANTS
from tests.unit.loadtest.peers.pieces import make_run, rates


def test_every_library_is_told_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX")
    monkeypatch.delenv("PAWL_CPU_INSTRUCTIONS", raising=False)
    before = dict(os.environ)
    with held_to("avx2", tmp_path):
        assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"
        assert os.environ["PAWL_CPU_INSTRUCTIONS"] == "avx2"
        assert os.environ["VLLM_CACHE_ROOT"] == str(tmp_path / "vllm-cache-avx2")
        assert instructions("bfloat16") in {"AVX2", "gemm"}
    assert dict(os.environ) == before
    with held_to(None, tmp_path):
        assert dict(os.environ) == before


def test_what_is_compiled_otherwise_has_an_environment() -> None:
    for cap in CAPS.values():
        assert set(cap.environments.values()) <= set(ENVIRONMENTS)
        assert set(cap.environments) <= set(ENVIRONMENTS)


def test_figures_under_a_cap_are_told_apart() -> None:
    outcome = Outcome(VARIANTS[0], rates=rates(50.0))
    held, free = make_run(outcome, rounds=1, cap="avx2"), make_run(outcome, rounds=1)
    assert "every engine is held to AVX2" in as_tables(held)
    assert "is held to" not in as_tables(free)
    with pytest.raises(JoinError, match="cap differs: avx2 and None"):
        join([held, free])
