"""The benchmark of the scheduler measures what it says: steps in which everybody decodes, with and without a queue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pawl_loadtest.scheduler_bench import Case, Trace, decode_steps, main


@pytest.mark.parametrize("case", [Case(3, 0), Case(3, 5)])
def test_a_trace_gives_as_many_steps_as_wanted(case: Case) -> None:
    seconds = decode_steps(Trace(case), 40)
    assert len(seconds) == 40
    assert min(seconds) > 0


def test_prompts_are_the_same_for_everybody_who_is_measured() -> None:
    trace = Trace(Case(4, 2))
    assert list(trace.prompts()) == list(trace.prompts())
    assert len(list(trace.prompts())) == 6


def test_the_command_prints_a_line_per_case_and_writes_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    main(["--rounds", "2", "--steps", "3", "--running", "64", "--json", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["64", "0"]]
    (figures,) = json.loads(path.read_text())
    assert [len(steps) for steps in figures["rounds"]] == [3, 3]
