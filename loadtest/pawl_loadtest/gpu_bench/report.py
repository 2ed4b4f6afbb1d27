"""What was measured, as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Row", "table"]


@dataclass(slots=True)
class Row:
    """One workload on one shape: output tokens per second by round, and what the bytes allow."""

    shape: str
    workload: str
    bound_tokens_per_s: float
    bound: dict[str, float]
    rates: dict[str, list[float]] = field(default_factory=dict)
    worst_margin: float = 0.0

    def fraction(self, name: str) -> float:
        """Median share of the bound."""
        return statistics.median(self.rates[name]) / self.bound_tokens_per_s

    def ratios(self, ours: str, theirs: str) -> list[float]:
        """Round by round, for both ran in the same minutes."""
        return [a / b for a, b in zip(self.rates[ours], self.rates[theirs], strict=True)]


def table(rows: Sequence[Row]) -> str:
    """A line for each engine: median, least and most output tokens per second, and the share of the bound."""
    lines = [f"{'shape':<17}{'workload':<30}{'engine':<34}{'tokens/s':>28}{'of the bound':>14}"]
    for row in rows:
        lines.extend(
            f"{row.shape:<17}{row.workload:<30}{name:<34}"
            f"{f'{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})':>28}"
            f"{row.fraction(name):>13.1%} "
            for name, rates in row.rates.items()
        )
        if len(row.rates) == 2:
            ours, theirs = row.rates
            ratios = row.ratios(ours, theirs)
            lines.append(
                f"{'':<47}{ours} / {theirs}: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            )
    return "\n".join(line.rstrip() for line in lines) + "\n"
