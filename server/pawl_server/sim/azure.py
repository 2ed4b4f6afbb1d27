"""Traces in the format in which Azure published its LLM inference: `TIMESTAMP,ContextTokens,GeneratedTokens`.

The files themselves are not part of pawl (CC-BY 4.0, github.com/Azure/AzurePublicDataset). Whoever has one can run
it; who has none gets rows drawn from lognormals with the medians and 90th percentiles of the published files.

Source: Patel et al., Splitwise, ISCA 2024 (the trace of 2023); Stojkovic et al., DynamoLLM, HPCA 2025 (of 2024).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

from pawl_server.sim.arrivals import Arrivals, OnOff
from pawl_server.sim.lengths import WORKLOADS

__all__ = ["TraceRow", "drawn_rows", "read_rows", "write_rows"]

_HEADER = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_START = datetime(2023, 11, 16, 18, 0, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request: seconds after the first, tokens of its prompt, tokens of its output."""

    due_s: float
    prompt_tokens: int
    output_tokens: int


def drawn_rows(
    arrivals: Arrivals | OnOff, count: int, seed: int, lengths: str = "azure-conversation"
) -> list[TraceRow]:
    """Rows with the lengths of a published trace, drawn: same arguments, same rows."""
    pairs = islice(zip(arrivals.due_times(), WORKLOADS[lengths].lengths(seed), strict=False), count)
    return [TraceRow(due, pair.prompt, pair.output) for due, pair in pairs]


def _parse_time(text: str) -> datetime:
    """Azure writes seven decimals of a second, more than a datetime holds."""
    whole, _, fraction = text.strip().removesuffix("+00:00").partition(".")
    moment = datetime.fromisoformat(whole).replace(tzinfo=UTC)
    return moment + timedelta(seconds=float(f"0.{fraction}")) if fraction else moment


def read_rows(path: Path) -> Iterator[TraceRow]:
    """Rows of a file, in order of time.

    Raises:
        ValueError: a line does not have the three columns, or goes back in time.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = tuple(next(reader, ()))
        if header != _HEADER:
            raise ValueError(f"{path}: the first line is {','.join(header)!r}, must be {','.join(_HEADER)!r}")
        first: datetime | None = None
        before = 0.0
        for number, line in enumerate(reader, start=2):
            try:
                moment, prompt, output = _parse_time(line[0]), int(line[1]), int(line[2])
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}, line {number}: {line!r} is not a time and two numbers of tokens") from error
            first = first or moment
            due_s = (moment - first).total_seconds()
            if due_s < before:
                raise ValueError(f"{path}, line {number}: {line[0]} is earlier than the line before")
            before = due_s
            if prompt > 0 and output > 0:
                yield TraceRow(due_s, prompt, output)


def write_rows(path: Path, rows: Iterable[TraceRow]) -> None:
    """Write rows in the published format."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_HEADER)
        for row in rows:
            moment = _START + timedelta(seconds=row.due_s)
            writer.writerow((moment.strftime("%Y-%m-%d %H:%M:%S.%f") + "0", row.prompt_tokens, row.output_tokens))
