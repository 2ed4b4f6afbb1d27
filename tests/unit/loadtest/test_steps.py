"""Recording steps of a real worker, and a cost model made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pawl_loadtest.steps import draw_shapes, main
from pawl_server.sim.__main__ import main as simulate
from pawl_server.sim.cost import load_cost
from pawl_server.sim.measured import read_steps


def test_shapes_stay_within_the_worker() -> None:
    shapes = draw_shapes(300, max_running=16, max_batch_tokens=64, max_context=256, seed=1)
    assert shapes == draw_shapes(300, max_running=16, max_batch_tokens=64, max_context=256, seed=1)
    for shape in shapes:
        assert 1 <= len(shape.tokens) <= 16
        assert sum(shape.tokens) <= 64
        assert all(before >= 1 and before + new <= 256 for new, before in zip(shape.tokens, shape.before, strict=True))
    assert any(max(shape.tokens) > 1 and min(shape.tokens) == 1 for shape in shapes)
    assert any(set(shape.tokens) == {1} and len(shape.tokens) > 4 for shape in shapes)
    assert any(min(shape.tokens) > 1 for shape in shapes)


def test_the_embedded_model_is_recorded_and_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded, cost = tmp_path / "steps.csv", tmp_path / "cost.json"
    sizes = ["--max-running", "4", "--max-batch-tokens", "64", "--max-context", "128", "--repeats", "1"]
    assert main(["--output", str(recorded), "--steps", "20", *sizes]) == 0
    assert "20 steps on cpu" in capsys.readouterr().out
    assert len(read_steps(recorded)) == 20
    assert simulate(["fit", str(recorded), "--output", str(cost)]) == 0
    assert load_cost(cost).source == "measured"
