"""Tables and JSON of what was measured: medians, spread, ratios round by round, shares of the machine's limit."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pawl_loadtest.peers.bounds import bound
from pawl_loadtest.peers.machine import Machine
from pawl_loadtest.peers.rounds import Agreement, Outcome
from pawl_loadtest.peers.shapes import Shape
from pawl_loadtest.peers.variants import BASE, TABLES
from pawl_loadtest.peers.workloads import Workload

__all__ = ["Run", "as_json", "as_tables", "base_of", "spread"]

_SAME_ENGINE = "pawl"


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that was measured, and on what."""

    shape: Shape
    weights: str
    rounds: int
    workloads: Sequence[Workload]
    tables: Sequence[str]
    machine: Machine
    load_average: float
    outcomes: Sequence[Outcome]

    def limit_share(self, outcome: Outcome, workload: Workload, peak: str) -> float:
        """The least seconds that the variant's own bytes and operations take, over those it took (median)."""
        limits = self.machine.limits(peak)
        least = bound(self.shape, workload, outcome.variant.precision(self.weights), limits).seconds
        return least * statistics.median(outcome.rates[workload.name]) / workload.counted_tokens


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def base_of(outcomes: Sequence[Outcome], table: str) -> Outcome | None:
    """The variant of pawl that a table compares with: its own, or that of the nearest higher precision that ran."""
    order = list(TABLES)
    for name in reversed(order[: order.index(table) + 1]):
        for outcome in outcomes:
            if outcome.variant.name == BASE[name] and outcome.failure is None:
                return outcome
    return None


def as_tables(run: Run) -> str:
    """One table for each precision, one part for each workload; whoever did not run is named with the reason."""
    lines = [
        f"{run.shape.name}, random weights exact in {run.weights}, greedy, exact lengths;"
        f" {run.machine.threads} threads, {run.rounds} rounds, taking turns; median (min-max)",
        *run.machine.lines(),
        f"load average at the start: {run.load_average:.2f}" + (" (not idle!)" if run.load_average > 0.5 else ""),
    ]
    for table in run.tables:
        rows = [outcome for outcome in run.outcomes if _belongs(outcome, table)]
        base = base_of(rows, table)
        if not rows or (table != "exact" and all(row.failure for row in rows if row.variant.table == table)):
            lines += ["", f"== {table}: {TABLES[table]}: nobody ran", *_failures(rows)]
            continue
        name = "nobody" if base is None else base.variant.name
        lines += ["", f"== {table}: {TABLES[table]}; ratios are {name} / the row's, round by round"]
        for workload in run.workloads:
            lines += ["", *_part(run, rows, base, workload)]
        lines += _failures(rows)
    return "\n".join(lines)


def _belongs(outcome: Outcome, table: str) -> bool:
    """A table's own rows and pawl's; in the tables before the last also those of higher precision."""
    order = list(TABLES)
    own, lowest = outcome.variant.table == table, table == order[-1]
    higher = order.index(outcome.variant.table) < order.index(table)
    return own or (higher and (not lowest or outcome.variant.environment == _SAME_ENGINE))


def _failures(rows: Sequence[Outcome]) -> list[str]:
    return [f"{row.variant.name}: did not run: {row.failure}" for row in rows if row.failure is not None]


def _part(run: Run, rows: Sequence[Outcome], base: Outcome | None, workload: Workload) -> list[str]:
    peaks = list(run.machine.peaks)
    head = f"{workload.name}, {workload.unit}"
    lines = [
        f"{head:<34}{'median (min-max)':>30}{'ratio':>24}" + "".join(f"{f'of {peak} limit':>18}" for peak in peaks)
        + f"{'same tokens':>24}"
    ]  # fmt: skip
    for row in rows:
        rates = row.rates.get(workload.name)
        if row.failure is not None or not rates:
            continue
        shares = "".join(f"{100 * run.limit_share(row, workload, peak):>16.0f} %" for peak in peaks)
        lines.append(
            f"  {row.variant.name:<32}{spread(rates):>30}{_ratio(row, base, workload):>24}{shares}"
            f"{describe(row.agreement):>24}"
        )
    return lines


def _ratio(row: Outcome, base: Outcome | None, workload: Workload) -> str:
    if base is None or row is base:
        return "-"
    ours, theirs = base.rates[workload.name], row.rates[workload.name]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    if row.variant.environment == _SAME_ENGINE:
        return f"{100 / statistics.median(ratios):.0f} % of it"
    return spread(ratios, 2)


def describe(agreement: Agreement | None) -> str:
    """Share of equal tokens; where the first difference is, and a mark when it is no tie."""
    if agreement is None:
        return "not checked"
    text = f"{100 * agreement.share:.0f} %"
    if agreement.first_difference is not None:
        text += f", from {agreement.first_difference}"
        text += f" ({agreement.margin:.1g})" + ("" if agreement.agrees else " DIFFERS")
    return text


def as_json(run: Run, settings: Mapping[str, str]) -> str:
    """All figures, every round's."""
    rows = []
    for outcome in run.outcomes:
        shares = {
            workload.name: {peak: run.limit_share(outcome, workload, peak) for peak in run.machine.peaks}
            for workload in run.workloads
            if outcome.rates.get(workload.name)
        }
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
                "limit_shares": shares,
            }
        )
    figures = {
        "shape": run.shape.name,
        "weights": run.weights,
        "rounds": run.rounds,
        "settings": dict(settings),
        "machine": {
            "threads": run.machine.threads,
            "peaks": dict(run.machine.peaks),
            "gemm": run.machine.gemm,
            "read": dict(run.machine.read),
            "note": run.machine.note,
            "load_average": run.load_average,
        },
        "workloads": {workload.name: asdict(workload) | {"unit": workload.unit} for workload in run.workloads},
        "variants": rows,
    }
    return json.dumps(figures, indent=2) + "\n"
