"""Workloads: reproducible, of the shape they claim, and none of them starves anybody."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import pytest

from pawl_server.sim.arrivals import Arrivals, OnOff
from pawl_server.sim.azure import drawn_rows, read_rows, write_rows
from pawl_server.sim.policies import POLICIES
from pawl_server.sim.scenarios import SCENARIOS, bundled_cost, replica_limits
from pawl_server.sim.simulator import simulate
from pawl_server.sim.streams import Segment
from pawl_server.sim.summary import Objective, summarize
from pawl_server.sim.trace import SimulatedRequest, Trace

COST = bundled_cost("llama-8b-h100-analytic")


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("name", list(SCENARIOS))
def test_nobody_starves_in(name: str, policy: str) -> None:
    """Every request ends, none is refused, and the same seed gives the same log and figures."""
    scenario = SCENARIOS[name]
    trace = scenario.make(60, scenario.rate, 3)
    limits = replica_limits(scenario.pool_tokens)
    run = simulate(trace, limits, COST, POLICIES[policy])
    assert set(run.record.reasons) == set(range(60))
    assert set(run.record.reasons.values()) <= {"eos", "max_tokens", "aborted"}
    again = simulate(scenario.make(60, scenario.rate, 3), limits, COST, POLICIES[policy])
    assert again.digest == run.digest
    summary = summarize(run, Objective())
    assert summary.num_finished + summary.num_aborted == 60
    assert summary.num_refused == 0
    waited_s = (run.record.first_token_ns - run.record.arrived_ns)[run.record.finished] / 1e9
    assert waited_s.max() < 60


@pytest.mark.parametrize(("name", "held_back"), [("conversation", True), ("agents", False)])
def test_a_gap_target_is_held_and_starves_no_prompt(name: str, held_back: bool) -> None:
    """Reading KV costs time here, for which the budget's own model of a step has no term: it must not derail it."""
    scenario = SCENARIOS[name]
    trace, limits = scenario.make(300, scenario.rate, 0), replica_limits(scenario.pool_tokens)
    production, target = (
        summarize(simulate(trace, limits, COST, POLICIES[policy]), Objective())
        for policy in ("production", "gap-target")
    )
    most_s = 1.05 * POLICIES["gap-target"].target_gap_s
    assert (production.gap_p99_s > most_s) == held_back
    assert target.gap_p99_s <= most_s
    assert target.first_token_p99_s < 1.2 * production.first_token_p99_s


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_a_workload_is_a_function_of_its_seed(name: str) -> None:
    make = SCENARIOS[name].make
    assert make(60, 5.0, 1) == make(60, 5.0, 1)
    assert make(60, 5.0, 1) != make(60, 5.0, 2)
    assert len(make(60, 5.0, 1).requests) == 60


def test_turns_quote_all_before_them() -> None:
    requests = SCENARIOS["multi-turn"].make(100, 5.0, 0).requests
    turns = [(request, requests[request.follows]) for request in requests if request.follows >= 0]
    assert len(turns) > 50
    for request, before in turns:
        assert request.prompt[: len(before.prompt)] == before.prompt
        assert request.prompt_tokens > before.prompt_tokens


def test_adversaries_are_told_from_chats() -> None:
    def groups(name: str) -> list[str]:
        return [request.group for request in SCENARIOS[name].make(600, 5.0, 0).requests]

    assert groups("long-prompts").count("adversary") == 1
    assert 200 < groups("liars").count("adversary") < 400
    assert groups("prefix-burst").count("adversary") == 120
    assert 300 < groups("abort-storm").count("adversary") < 500
    flood = SCENARIOS["flood"].make(600, 5.0, 0).requests
    assert {request.tenant for request in flood if request.group == "chat"} == {"quiet 1", "quiet 2", "quiet 3"}
    assert {request.tenant for request in flood if request.group == "adversary"} == {"flood"}


def test_on_off_arrivals_keep_the_rate_and_come_in_spells() -> None:
    times = list(islice(OnOff(10.0, 2.0, 6.0, seed=4).due_times(), 40_000))
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(10.0, rel=0.1)
    quiet_s = sum(gap for a, b in pairwise(times) if (gap := b - a) > 1.0)
    assert 0.65 < quiet_s / times[-1] < 0.85  # off three quarters of the time


def test_azure_rows_survive_a_file(tmp_path: Path) -> None:
    rows = drawn_rows(Arrivals(3.0, seed=1), 50, 1)
    path = tmp_path / "trace.csv"
    write_rows(path, rows)
    first = rows[0].due_s
    back = list(read_rows(path))
    assert [(row.prompt_tokens, row.output_tokens) for row in back] == [
        (row.prompt_tokens, row.output_tokens) for row in rows
    ]
    assert [row.due_s for row in back] == pytest.approx([row.due_s - first for row in rows], abs=2e-6)


def test_azure_files_as_published(tmp_path: Path) -> None:
    """Seven decimals in 2023, a zone in 2024."""
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0299600,110,27\n2023-11-16 18:17:05,12,0\n"
    )
    assert [(round(row.due_s, 6), row.prompt_tokens, row.output_tokens) for row in read_rows(path)] == [
        (0.0, 4808, 10), (0.05, 110, 27),
    ]  # fmt: skip
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 00:00:00.003820+00:00,2162,5\n")
    assert [row.prompt_tokens for row in read_rows(path)] == [2162]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("TIME,A,B\n", "the first line"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:01,1,2\n2023-11-16 18:00:00,1,2\n", "earlier"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        list(read_rows(path))


def test_impossible_traces_are_refused() -> None:
    one = SimulatedRequest(arrival_s=0.0, prompt=(Segment(0, 1),), output_tokens=1, max_output_tokens=1, follows=0)
    with pytest.raises(ValueError, match="comes later"):
        Trace("bad", [one])
    with pytest.raises(ValueError, match="at least one token"):
        Trace("bad", [SimulatedRequest(arrival_s=0.0, prompt=(), output_tokens=1, max_output_tokens=1)])
