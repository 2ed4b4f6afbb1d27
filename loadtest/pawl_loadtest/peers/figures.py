"""A run as JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import msgspec

from pawl_loadtest.peers.machine import Machine
from pawl_loadtest.peers.rounds import Agreement, Outcome
from pawl_loadtest.peers.runs import JoinError, Piece, Run
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.peers.variants import VARIANTS
from pawl_loadtest.peers.workloads import Workload

__all__ = ["as_json", "read_run"]


def as_json(run: Run, settings: Mapping[str, str]) -> str:
    """All figures, every round's, and what follows from them."""
    machine = run.machine
    rows = []
    for outcome in run.outcomes:
        timed = [workload for workload in run.workloads if outcome.rates.get(workload.name)]
        rows.append(
            {
                "name": outcome.variant.name,
                "table": outcome.variant.table,
                "settings": dict(outcome.variant.settings),
                "precision": asdict(outcome.variant.precision(run.weights)),
                "facts": dict(outcome.facts),
                "failure": outcome.failure,
                "agreement": None if outcome.agreement is None else asdict(outcome.agreement),
                "rates": outcome.rates,
                "others": outcome.others,
                "pairs": outcome.pairs,
                "cpu": outcome.cpu,
                "machines": {
                    name: {number: asdict(machine) for number, machine in by.items()}
                    for name, by in outcome.machines.items()
                },
                "limit_shares": {
                    workload.name: {peak: run.limit_share(outcome, workload, peak) for peak in machine.peaks}
                    for workload in timed
                },
                "limit_shares_then": {
                    workload.name: {peak: run.limit_shares_then(outcome, workload, peak) for peak in machine.peaks}
                    for workload in timed
                },
                "binds": {
                    workload.name: {peak: run.least(outcome, workload, peak).binds for peak in machine.peaks}
                    for workload in timed
                },
            }
        )
    figures = {
        "shape": run.shape.name,
        "weights": run.weights,
        "rounds": run.rounds,
        "instructions": run.instructions,
        "settings": dict(settings),
        "tables": list(run.tables),
        "machine": asdict(machine),
        "pieces": [asdict(piece) for piece in run.pieces],
        "workloads": {workload.name: asdict(workload) | {"unit": workload.unit} for workload in run.workloads},
        "variants": rows,
        "notes": list(run.notes),
    }
    return json.dumps(figures, indent=2) + "\n"


class _Row(msgspec.Struct):
    name: str
    facts: dict[str, object]
    failure: str | None
    agreement: Agreement | None
    rates: dict[str, dict[int, float]]
    others: dict[str, dict[int, float]]
    pairs: dict[str, dict[int, list[float]]]
    machines: dict[str, dict[int, Machine]]
    cpu: dict[str, dict[int, dict[str, float]]] = {}


class _Figures(msgspec.Struct):
    shape: str
    weights: str
    tables: list[str]
    pieces: list[Piece]
    workloads: dict[str, Workload]
    variants: list[_Row]
    notes: list[str]


def read_run(path: Path) -> Run:
    """A run as `as_json` wrote it.

    Raises:
        JoinError: the file cannot be read, or holds something else.
    """
    try:
        figures = msgspec.json.decode(path.read_bytes(), type=_Figures)
    except (OSError, msgspec.MsgspecError) as error:
        raise JoinError(f"{path}: {error}; must be a file that --json wrote") from error
    known = {variant.name: variant for variant in VARIANTS}
    unknown = sorted({row.name for row in figures.variants} - set(known))
    if unknown or figures.shape not in SHAPES or not figures.pieces:
        raise JoinError(f"{path}: knows {', '.join(unknown) or figures.shape}, of another version of this benchmark")
    outcomes = [
        Outcome(
            known[row.name],
            row.facts,
            row.agreement,
            row.rates,
            row.others,
            row.pairs,
            row.cpu,
            row.machines,
            row.failure,
        )
        for row in figures.variants
    ]
    return Run(
        shape=SHAPES[figures.shape],
        weights=figures.weights,
        workloads=list(figures.workloads.values()),
        tables=figures.tables,
        pieces=figures.pieces,
        outcomes=outcomes,
        notes=figures.notes,
    )
