"""A run as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

from pawl_loadtest.measure import Summary

__all__ = ["as_json", "as_table"]

_ROWS = (
    ("time to first token", "time_to_first_token_s"),
    ("gap between deltas", "gap_s"),
    ("end to end", "end_to_end_s"),
    ("dispatch lateness", "dispatch_lateness_s"),
)


def as_table(summary: Summary) -> str:
    """Throughput on top, then one line of percentiles (in milliseconds) per measure."""
    lines = [
        f"requests        {summary.num_requests}  ({summary.num_errors} failed)  in {summary.duration_s:.2f} s",
        f"throughput      {summary.requests_per_s:.2f} requests/s"
        f"  {summary.output_tokens_per_s:.1f} output tokens/s"
        f"  {summary.prompt_tokens_per_s:.1f} prompt tokens/s"
        f"  {100 * summary.cached_share:.0f} % of prompts cached",
        f"{'milliseconds':<22}" + "".join(f"{name:>10}" for name in ("p50", "p90", "p95", "p99")),
    ]
    for label, attribute in _ROWS:
        values: dict[str, float] = getattr(summary, attribute)
        lines.append(f"{label:<22}" + "".join(_milliseconds(value) for value in values.values()))
    lines += [f"  {count} x {error}" for error, count in sorted(summary.errors.items())]
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{'-':>10}" if math.isnan(seconds) else f"{1000 * seconds:>10.1f}"


def as_json(summary: Summary, **facts: object) -> str:
    """The same figures with full precision; what was not measured is null."""
    figures = {**facts, **asdict(summary)}
    return json.dumps(_without_nan(figures), indent=2)


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
