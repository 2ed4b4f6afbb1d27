"""Figures as JSON and back, and pieces that are joined."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pawl_loadtest.peers.figures import as_json, read_run
from pawl_loadtest.peers.machine import Machine
from pawl_loadtest.peers.report import as_tables
from pawl_loadtest.peers.rounds import Agreement, Outcome
from pawl_loadtest.peers.runs import JoinError, Run, join
from pawl_loadtest.peers.variants import VARIANTS, Variant
from pawl_loadtest.peers.workloads import Workload
from tests.unit.loadtest.peers.pieces import AFTER, BEFORE, WORKLOAD, make_run, rates

AGREES = Agreement(1.0, None, None, True)
BY_NAME = {variant.name: variant for variant in VARIANTS}
PAWL, VLLM = BY_NAME["pawl"], BY_NAME["vllm"]


def _outcome(variant: Variant, *values: float, agreement: Agreement | None = AGREES) -> Outcome:
    return Outcome(variant, {"version": "x"}, agreement, rates(*values), rates(*(0.0 for _ in values)))


def _written(run: Run, path: Path) -> Path:
    path.write_text(as_json(run, {"shape": "x"}), encoding="utf-8")
    return path


def test_json_holds_every_round_and_what_follows_from_it(tmp_path: Path) -> None:
    run = make_run(_outcome(PAWL, 50.0, 60.0, 55.0), Outcome(VLLM, failure="ERROR: No matching distribution"))
    figures = json.loads(_written(run, tmp_path / "run.json").read_text(encoding="utf-8"))
    assert figures["rounds"] == 3
    assert [row["failure"] for row in figures["variants"]] == [None, "ERROR: No matching distribution"]
    pawl = figures["variants"][0]
    assert pawl["rates"] == {"1 x 32/128": {"0": 50.0, "1": 60.0, "2": 55.0}}
    assert pawl["others"] == {"1 x 32/128": {"0": 0.0, "1": 0.0, "2": 0.0}}
    assert pawl["binds"] == {"1 x 32/128": {"AVX2": "read weights", "AVX-512": "read weights"}}
    assert pawl["limit_shares"]["1 x 32/128"]["AVX2"] == run.limit_share(run.outcomes[0], WORKLOAD, "AVX2")
    assert figures["machine"]["peaks"] == {"AVX2": 100e9, "AVX-512": 200e9}
    assert figures["pieces"][0]["before"]["peaks"] == {"AVX2": 100e9, "AVX-512": 150e9}
    assert figures["pieces"][0]["after"]["gemm"] == figures["machine"]["gemm"] == 95e9


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    run = make_run(_outcome(PAWL, 50.0, 60.0), _outcome(VLLM, 20.0, 30.0, agreement=None), Outcome(VARIANTS[2]))
    read = read_run(_written(run, tmp_path / "run.json"))
    assert as_json(read, {"shape": "x"}) == as_json(run, {"shape": "x"})
    assert as_tables(read) == as_tables(run)


def test_pairs_and_what_the_machine_could_do_are_kept_and_joined(tmp_path: Path) -> None:
    served = BY_NAME["pawl over gRPC"]
    runs = [
        make_run(
            Outcome(PAWL, {}, AGREES, rates(5.0), machines={WORKLOAD.name: {0: machine}}),
            Outcome(served, {}, AGREES, rates(4.0), pairs={WORKLOAD.name: {0: [ratio, 1.0]}}),
            rounds=1,
        )
        for machine, ratio in ((BEFORE, 0.8), (AFTER, 0.9))
    ]
    paths = [_written(run, tmp_path / f"{number}.json") for number, run in enumerate(runs)]
    run = join([read_run(path) for path in paths])
    assert run.outcomes[0].machines == {WORKLOAD.name: {0: BEFORE, 1: AFTER}}
    assert run.outcomes[1].pairs == {WORKLOAD.name: {0: [0.8, 1.0], 1: [0.9, 1.0]}}


def test_more_rounds_and_other_workloads_are_joined_with_ratios_of_the_same_round() -> None:
    other = Workload(16, 128, 128)
    first = make_run(_outcome(PAWL, 50.0, 60.0), _outcome(VLLM, 25.0, 20.0), rounds=2)
    second = make_run(_outcome(PAWL, 40.0), rounds=1, started="2026-01-01T11:00:00+00:00")
    third = make_run(
        Outcome(PAWL, {}, AGREES, {other.name: {0: 300.0}}),
        Outcome(VLLM, {}, AGREES, {other.name: {0: 100.0}}),
        rounds=1,
        workloads=[other],
        tables=["coarse"],
    )
    run = join([first, second, third])
    assert run.rounds == 4
    assert run.outcomes[0].rates == {WORKLOAD.name: {0: 50.0, 1: 60.0, 2: 40.0}, other.name: {3: 300.0}}
    assert run.outcomes[1].rates == {WORKLOAD.name: {0: 25.0, 1: 20.0}, other.name: {3: 100.0}}
    assert list(run.tables) == ["exact", "fp16", "coarse"]
    text = as_tables(run)
    assert "2 rounds, 2026-01-01T10:00:00+00:00 to" in text
    assert "1 rounds, 2026-01-01T11:00:00+00:00 to" in text
    assert "2.50 (2.00-3.00)" in text
    assert "3.00 (3.00-3.00)" in text


def test_the_limit_of_joined_pieces_is_the_best_that_was_seen() -> None:
    faster = Machine(2, {"AVX2": 300e9, "AVX-512": 100e9}, 1e9, {"2147483648": 26e9}, "a note")
    run = join([make_run(_outcome(PAWL, 1.0)), make_run(_outcome(PAWL, 1.0), after=faster)])
    assert run.machine == Machine(2, {"AVX2": 300e9, "AVX-512": 200e9}, 95e9, {"2147483648": 30e9}, "a note")


def test_who_failed_in_one_piece_keeps_the_others_and_is_named() -> None:
    died = Outcome(VLLM, rates=rates(1.0), failure="it died")
    run = join([make_run(_outcome(PAWL, 5.0), died, rounds=1), make_run(_outcome(PAWL, 6.0), _outcome(VLLM, 3.0))])
    assert run.outcomes[1].rates == {WORKLOAD.name: {1: 3.0}}
    assert run.notes == ["vllm did not run in round 1: it died"]
    assert "vllm did not run in round 1: it died" in as_tables(run)
    assert "2.00 (2.00-2.00)" in as_tables(run)
    nobody = join([make_run(_outcome(PAWL, 5.0), died, rounds=1)] * 2)
    assert (nobody.outcomes[1].failure, nobody.notes) == ("it died", [])
    assert "vllm: did not run: it died" in as_tables(nobody)


def test_of_what_was_compared_the_worst_counts() -> None:
    differs = Agreement(0.5, 3, 0.2, False)
    runs = [make_run(_outcome(PAWL, 1.0, agreement=found)) for found in (None, AGREES, differs, AGREES)]
    assert join(runs).outcomes[0].agreement == differs


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.data())
def test_pieces_may_be_joined_in_steps(counts: Sequence[int], data: st.DataObject) -> None:
    pieces = [make_run(_outcome(PAWL, *(100.0 * i + j for j in range(n))), rounds=n) for i, n in enumerate(counts)]
    cut = data.draw(st.integers(1, len(pieces)))
    at_once, in_steps = join(pieces), join([join(pieces[:cut]), *pieces[cut:]])
    assert as_json(at_once, {}) == as_json(in_steps, {})
    values = [100.0 * i + j for i, n in enumerate(counts) for j in range(n)]
    assert at_once.outcomes[0].rates == {WORKLOAD.name: dict(enumerate(values))}


def test_pieces_of_unlike_machines_are_refused() -> None:
    with pytest.raises(JoinError, match="processor differs: a processor and another"):
        join([make_run(_outcome(PAWL, 1.0)), make_run(_outcome(PAWL, 1.0), processor="another")])


def test_files_of_anything_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(JoinError, match="No such file"):
        read_run(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(JoinError, match="must be a file that --json wrote"):
        read_run(path)
    path.write_text(as_json(make_run(_outcome(PAWL, 1.0), after=AFTER), {}).replace('"pawl"', '"gone"'), "utf-8")
    with pytest.raises(JoinError, match="knows gone, of another version"):
        read_run(path)
