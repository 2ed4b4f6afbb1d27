"""The benchmark of sampling compares before it times, and runs steps in which every row samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pawl_loadtest import sampling_bench
from pawl_loadtest.sampling_bench import SETTINGS, Case, main, measure, share_of_step
from pawl_workers.plan import SamplingSpec
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_agrees_with_transformers_and_is_timed(setting: str) -> None:
    outcome = measure(Case(setting, 3, 700), rounds=2, runs=1, scale=2.0)
    for values in (outcome.pawl, outcome.transformers, outcome.sort):
        assert len(values) == 2
        assert min(values) > 0


def test_a_sampler_that_keeps_other_tokens_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pawl is told to keep all tokens where transformers keeps one."""
    case = Case("top-k 1", 64, 700)
    monkeypatch.setitem(SETTINGS, "top-k 1", SamplingSpec(top_k=1))
    assert measure(case, rounds=1, runs=1, scale=0.1).case == case
    peer = sampling_bench.Transformers(case, torch.zeros(64, 1, dtype=torch.int64))
    monkeypatch.setitem(SETTINGS, "top-k 1", SamplingSpec())
    monkeypatch.setattr(sampling_bench, "Transformers", lambda case, history: peer)
    with pytest.raises(RuntimeError, match="transformers would not"):
        measure(case, rounds=1, runs=1, scale=0.1)


def test_the_share_is_that_of_steps_in_which_all_rows_sample(tmp_path: Path) -> None:
    worker = Worker.load(WorkerOptions(str(make_llama(tmp_path)), max_running=3, num_blocks=3, max_context=32))
    milliseconds, share = share_of_step(worker, 1, SETTINGS["logprobs 5"], 3, 4)
    assert milliseconds > 0
    assert 0 < share < 1


def test_the_command_prints_a_line_per_case_and_writes_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--rounds", "2", "--runs", "1", "--samples", "2", "--vocab-size", "300", "--threads", "1"]
    assert main([*arguments, "--json", str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(SETTINGS)
    figures = json.loads(path.read_text())
    assert [outcome["case"]["setting"] for outcome in figures] == list(SETTINGS)
