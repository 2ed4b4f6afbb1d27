"""Tables and JSON of what was measured: medians, spread, ratios round by round, shares of the machine's limit."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pawl_loadtest.peers.bounds import Bound, bound
from pawl_loadtest.peers.machine import Machine
from pawl_loadtest.peers.rounds import Agreement, Outcome
from pawl_loadtest.peers.shapes import Shape
from pawl_loadtest.peers.variants import BASE, TABLES
from pawl_loadtest.peers.workloads import Workload

__all__ = ["Run", "as_json", "as_tables", "base_of", "spread"]

_SAME_ENGINE = "pawl"
_MOST_OTHERS = 0.1  # cores


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that was measured, and on what."""

    shape: Shape
    weights: str
    rounds: int
    workloads: Sequence[Workload]
    tables: Sequence[str]
    before: Machine
    after: Machine
    load_average: float
    outcomes: Sequence[Outcome]

    @property
    def machine(self) -> Machine:
        """The better of what was measured before the first round and after the last."""
        return self.before.better(self.after)

    def least(self, outcome: Outcome, workload: Workload, peak: str) -> Bound:
        """The least time that the variant's own bytes and operations take."""
        return bound(self.shape, workload, outcome.variant.precision(self.weights), self.machine.limits(peak))

    def limit_share(self, outcome: Outcome, workload: Workload, peak: str) -> float:
        """The least seconds over those it took (median)."""
        least = self.least(outcome, workload, peak).seconds
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
        *(f"before: {line}" for line in run.before.lines()),
        *(f"after:  {line}" for line in run.after.lines()),
        "limits are worked out with the better of the two; (x): what takes most of the least time there is",
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
    head = [f"{workload.name}, {workload.unit}", "median (min-max)", "ratio", *(f"of {peak} limit" for peak in peaks)]
    table = [[*head, "same tokens", "others' cores"]]
    for row in rows:
        rates = row.rates.get(workload.name)
        if row.failure is not None or not rates:
            continue
        name = f"  {row.variant.name}"
        limits = [_of_limit(run, row, workload, peak) for peak in peaks]
        others = _others(row.others.get(workload.name, ()))
        table.append([name, spread(rates), _ratio(row, base, workload), *limits, describe(row.agreement), others])
    return _aligned(table)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("   ".join(cells))
    return lines


def _of_limit(run: Run, row: Outcome, workload: Workload, peak: str) -> str:
    return f"{100 * run.limit_share(row, workload, peak):.0f} % ({run.least(row, workload, peak).binds})"


def _others(cores: Sequence[float]) -> str:
    """The most that processes beside the engine's took while it was timed."""
    if not cores:
        return ""
    return f"{max(cores):.2f}" + (" DISTURBED" if max(cores) > _MOST_OTHERS else "")


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
        binds = {
            name: {peak: run.least(outcome, workload, peak).binds for peak in run.machine.peaks}
            for name, workload in ((workload.name, workload) for workload in run.workloads)
            if name in shares
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
                "others": outcome.others,
                "limit_shares": shares,
                "binds": binds,
            }
        )
    figures = {
        "shape": run.shape.name,
        "weights": run.weights,
        "rounds": run.rounds,
        "settings": dict(settings),
        "machine": _machine(run.machine) | {"load_average": run.load_average},
        "machine_before": _machine(run.before),
        "machine_after": _machine(run.after),
        "workloads": {workload.name: asdict(workload) | {"unit": workload.unit} for workload in run.workloads},
        "variants": rows,
    }
    return json.dumps(figures, indent=2) + "\n"


def _machine(machine: Machine) -> dict[str, object]:
    return {
        "threads": machine.threads,
        "peaks": dict(machine.peaks),
        "gemm": machine.gemm,
        "read": dict(machine.read),
        "note": machine.note,
    }
