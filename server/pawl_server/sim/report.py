"""Runs side by side: a table for the terminal, Markdown for a page, JSON for a program."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

from rich.table import Table

from pawl_server.sim.summary import Summary

__all__ = ["as_json", "as_markdown", "as_table"]


def _ms(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{1e3 * seconds:.0f}"


def _s(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


_COLUMNS: Sequence[tuple[str, Callable[[Summary], str]]] = (
    ("workload", lambda s: s.workload),
    ("policy", lambda s: s.policy),
    ("TTFT p50 s", lambda s: _s(s.first_token_p50_s)),
    ("p99 s", lambda s: _s(s.first_token_p99_s)),
    ("max s", lambda s: _s(s.first_token_max_s)),
    ("gap p50 ms", lambda s: _ms(s.gap_p50_s)),
    ("p99 ms", lambda s: _ms(s.gap_p99_s)),
    ("longest s", lambda s: _s(s.longest_gap_s)),
    ("goodput /s", lambda s: f"{s.goodput:.2f}"),
    ("good %", lambda s: _percent(s.good_share)),
    ("recomputed %", lambda s: _percent(s.recomputed_share)),
    ("preempted", lambda s: f"{s.preemptions:.3f}"),
    ("most", lambda s: str(s.most_preemptions)),
    ("blocked %", lambda s: _percent(s.blocked_share)),
    ("hits %", lambda s: _percent(s.hit_rate)),
    ("KV %", lambda s: _percent(s.occupancy)),
    ("tenant gap", lambda s: f"{s.tenant_gap:.0f}" if s.tenant_gap else "-"),
    ("us/step", lambda s: f"{s.scheduler_us:.0f}"),
)


def as_table(summaries: Sequence[Summary]) -> Table:
    """For a terminal."""
    table = Table(box=None, pad_edge=False)
    for number, (title, _) in enumerate(_COLUMNS):
        table.add_column(title, justify="left" if number < 2 else "right", no_wrap=number < 2)
    for number, summary in enumerate(summaries):
        last = number + 1 == len(summaries) or summaries[number + 1].workload != summary.workload
        table.add_row(*(text(summary) for _, text in _COLUMNS), end_section=last)
    return table


def as_markdown(summaries: Sequence[Summary]) -> str:
    """For a page: all but the last column, which differs from run to run."""
    columns = _COLUMNS[:-1]
    lines = [" | ".join(title for title, _ in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(text(summary) for _, text in columns) for summary in summaries]
    return "".join(f"| {line} |\n" for line in lines)


def as_json(summaries: Sequence[Summary], settings: dict[str, str]) -> str:
    """Every figure, and the settings that gave them."""
    runs = [dataclasses.asdict(summary) for summary in summaries]
    return json.dumps({"settings": settings, "runs": runs}, indent=2)
