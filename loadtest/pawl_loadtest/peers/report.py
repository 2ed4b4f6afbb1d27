"""Tables of what was measured: medians, spread, ratios round by round, shares of the machine's limit."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from pawl_loadtest.peers.cpu_time import ENGINE
from pawl_loadtest.peers.rounds import Agreement, Outcome
from pawl_loadtest.peers.runs import Piece, Run
from pawl_loadtest.peers.variants import BASE, OURS, TABLES
from pawl_loadtest.peers.workloads import Workload

__all__ = ["as_tables", "base_of", "spread"]

_SAME_ENGINE = OURS
_SERVED = "pawl over gRPC"
_MOST_OTHERS = 0.1  # cores


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
    first = run.pieces[0]
    lines = [
        f"{run.shape.name}, random weights exact in {run.weights}, greedy, exact lengths; {first.before.threads} "
        f"threads of {first.processor}, {run.rounds} rounds, taking turns; median (min-max)",
    ]
    for piece in run.pieces:
        lines += _when(piece, several=len(run.pieces) > 1)
    lines += [
        "limits are worked out with the best of these; (x): what takes most of the least time there is; right then: "
        "with what the machine could do right before and after each run, round by round",
        *([f"every engine is held to {first.cap.upper()}, though the processor may have more"] if first.cap else []),
        f"pawl's own multiply in {run.instructions}; the peak of attention is that of registers",
        "limits count the bytes that a weight has in the checkpoint, or as the engine's type has them"
        + ("" if run.kept_weight_bytes is None else f"; of pawl {run.kept_weight_bytes:g}"),
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
    return "\n".join([*lines, *run.notes, "", *_summary(run)])


def _when(piece: Piece, *, several: bool) -> list[str]:
    rounds = f"{piece.rounds} rounds, " if several else ""
    return [
        f"{rounds}{piece.started} to {piece.ended}, pawl's code {piece.code}, load average at the start "
        f"{piece.load_average:.2f}" + (" (not idle!)" if piece.load_average > 0.5 else ""),
        *(f"  before: {line}" for line in piece.before.lines()),
        *(f"  after:  {line}" for line in piece.after.lines()),
    ]


def _summary(run: Run) -> list[str]:
    """Pawl by each table and workload: over the best peer, what serving keeps of it, and its share of the limit."""
    peaks = run.machine.highest(run.weights, 2)
    limits = [text for peak in peaks for text in (f"of {peak} limit", "right then")]
    lines = [["in short", "pawl", "best peer", "pawl / it", "over gRPC", *limits]]
    for table in run.tables:
        rows = [outcome for outcome in run.outcomes if _belongs(outcome, table)]
        base = base_of(rows, table)
        for workload in run.workloads if base is not None else ():
            timed = [row for row in rows if row.rates.get(workload.name) and row.failure is None]
            if base is None or base not in timed:
                continue
            peers = [row for row in timed if row.variant.environment != _SAME_ENGINE]
            best = max(peers, key=lambda row: _middle(row, workload), default=None)
            served = next(
                (row for row in timed if row.variant.name == base.variant.name.replace("pawl", _SERVED)), None
            )
            lines.append(
                [
                    f"  {workload.name}, {table}",
                    f"{_middle(base, workload):.1f}",
                    "none" if best is None else f"{best.variant.name} {_middle(best, workload):.1f}",
                    "" if best is None else _ratio(best, base, workload),
                    "" if served is None else _ratio(served, base, workload),
                    *(
                        text
                        for peak in peaks
                        for text in (_of_limit(run, base, workload, peak), _then(run, base, workload, peak))
                    ),
                ]
            )
    return _aligned(lines)


def _middle(row: Outcome, workload: Workload) -> float:
    return statistics.median(row.rates[workload.name].values())


def _belongs(outcome: Outcome, table: str) -> bool:
    """A table's own rows and pawl's; in the tables before the last also those of higher precision."""
    order = list(TABLES)
    own, lowest = outcome.variant.table == table, table == order[-1]
    higher = order.index(outcome.variant.table) < order.index(table)
    return own or (higher and (not lowest or outcome.variant.environment == _SAME_ENGINE))


def _failures(rows: Sequence[Outcome]) -> list[str]:
    return [f"{row.variant.name}: did not run: {row.failure}" for row in rows if row.failure is not None]


def _part(run: Run, rows: Sequence[Outcome], base: Outcome | None, workload: Workload) -> list[str]:
    peaks = run.machine.highest(run.weights, 2)
    head = [f"{workload.name}, {workload.unit}", "median (min-max)", "ratio", *(f"of {peak} limit" for peak in peaks)]
    table = [[*head, "same tokens", "others' cores", "rounds"]]
    for row in rows:
        rates = row.rates.get(workload.name)
        if row.failure is not None or not rates:
            continue
        name = f"  {row.variant.name}"
        limits = [_of_limit(run, row, workload, peak) for peak in peaks]
        beside = [describe(row.agreement), _others(row.others.get(workload.name, {})), str(len(rates))]
        table.append([name, spread(list(rates.values())), _ratio(row, base, workload), *limits, *beside])
    return [*_aligned(table), *(line for row in rows for line in _cpu_time(row, workload))]


def _cpu_time(row: Outcome, workload: Workload) -> list[str]:
    """Where the CPU time of a served token goes, over all rounds."""
    runs = [by for by in row.cpu.get(workload.name, {}).values() if by]
    if row.failure is not None or not runs:
        return []
    parts = {part: statistics.mean(run[part] for run in runs) for part in runs[0]}
    total, tokens = sum(parts.values()), workload.counted_tokens
    listed = ", ".join(f"{part} {1e6 * seconds / tokens:,.0f}" for part, seconds in parts.items())
    beside = 100 * (1 - parts[ENGINE] / total) if total else 0.0
    return [f"  CPU time of {row.variant.name}, us a token: {listed}; {beside:.1f} % is not the engine's"]


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


def _then(run: Run, row: Outcome, workload: Workload, peak: str) -> str:
    shares = run.limit_shares_then(row, workload, peak)
    return f"{spread([100 * share for share in shares], 0)} %" if shares else ""


def _others(cores: Mapping[int, float]) -> str:
    """The most that processes beside the engine's took while it was timed."""
    if not cores:
        return ""
    most = max(cores.values())
    return f"{most:.2f}" + (" DISTURBED" if most > _MOST_OTHERS else "")


def _ratio(row: Outcome, base: Outcome | None, workload: Workload) -> str:
    """Of the rounds in which both were timed; of the pairs, where they took turns run by run."""
    if base is None or row is base:
        return "-"
    if row.variant.paired_with == base.variant.name and workload.name in row.pairs:
        paired = [100 * ratio for by in row.pairs[workload.name].values() for ratio in by]
        return f"{spread(paired, 0)} % of it, {len(paired)} pairs"
    ours, theirs = base.rates.get(workload.name, {}), row.rates[workload.name]
    ratios = [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]
    if not ratios:
        return "no common round"
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
