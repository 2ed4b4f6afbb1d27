"""`python -m pawl_server.sim`: the table, the pictures, the files, the exit codes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pawl_server.sim.__main__ import main
from pawl_server.sim.cost import load_cost, shape_of
from pawl_server.sim.measured import RecordedStep, write_steps
from pawl_server.sim.policies import POLICIES


def test_it_prints_a_table_and_saves_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    arguments = ["--workload", "flood", "--workload", "liars", "--requests", "60", "--plots", str(tmp_path / "plots")]
    assert main([*arguments, "--json", str(figures), "--markdown", str(page)]) == 0
    printed = capsys.readouterr().out
    for word in ("flood", "liars", *POLICIES, "TTFT p50 s", "goodput /s"):
        assert word in printed
    runs = json.loads(figures.read_text())["runs"]
    assert [(run["workload"], run["policy"]) for run in runs] == [(w, p) for w in ("flood", "liars") for p in POLICIES]
    assert all(run["num_finished"] == 60 for run in runs)
    assert len(page.read_text().splitlines()) == 2 + len(runs)
    for name in ("flood", "liars"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_it_runs_a_trace_in_azures_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "drawn.csv"
    assert main(["draw", "--requests", "40", "--output", str(trace)]) == 0
    assert main(["run", "--azure", str(trace), "--policy", "production", "--requests", "30"]) == 0
    assert "drawn" in capsys.readouterr().out


def test_it_fits_a_cost_model_and_says_how_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    steps = []
    for _ in range(60):
        tokens = [draw.randint(1, 50) for _ in range(draw.randint(1, 8))]
        contexts = [count + draw.randint(0, 500) for count in tokens]
        shape = shape_of(tokens, contexts)
        seconds = (1e-3 + 1e-5 * shape.num_tokens) * draw.uniform(0.98, 1.02)
        steps.append(RecordedStep(seconds=seconds, tokens=tokens, contexts=contexts))
    write_steps(tmp_path / "steps.csv", steps)
    cost = tmp_path / "cost.json"
    assert main(["fit", str(tmp_path / "steps.csv"), "--output", str(cost), "--machine", "this one"]) == 0
    assert "12 held out" in capsys.readouterr().out
    assert load_cost(cost).token_s == pytest.approx(1e-5, rel=0.1)
    assert main(["--cost", str(cost), "--workload", "conversation", "--requests", "20"]) == 0


def test_limits_can_be_set_and_decide(tmp_path: Path) -> None:
    """Of whoever came first in `urgent`, the higher class takes blocks unless it may not."""
    first_token_s = {}
    for below in ("5", "0"):
        figures = tmp_path / f"{below}.json"
        arguments = ["--workload", "urgent", "--policy", "production", "--requests", "150", "--rate", "40"]
        assert main([*arguments, "--set", f"preempt_below={below}", "--json", str(figures)]) == 0
        (run,) = json.loads(figures.read_text())["runs"]
        first_token_s[below] = run["first_token_p99_s"]
        assert (run["most_preemptions"] > 0) == (below == "5")
    assert first_token_s["5"] < 0.8 * first_token_s["0"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--set", "no_such_limit=1"], "must be NAME=VALUE with one of ageing_s"),
        (["--set", "watermark"], "must be NAME=VALUE"),
        (["--set", "max_bypass=many"], "max_bypass"),
        (["--set", "max_running=0"], "max_running = 0"),
        (["--cost", "unheard-of"], "neither a file nor one of"),
        (["--cost", "missing.json"], "missing.json"),
        (["fit", "missing.csv", "--output", "x.json"], "missing.csv"),
        (["--azure", "missing.csv"], "missing.csv"),
    ],
)
def test_wrong_usage_says_what_is_wrong(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err
