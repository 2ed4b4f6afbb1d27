"""What the commands print: tables, JSON and one-line errors.

Owns formatting. Tables are drawn by rich on a terminal where it is installed, as aligned text everywhere else, so
that pipes see every character.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TextIO

from pawl.errors import PawlError

__all__ = ["describe", "print_json", "print_table", "printable", "size_text", "to_plain"]


def to_plain(value: object) -> object:
    """A value of the SDK as what JSON has: objects, lists, strings, numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    return [to_plain(item) for item in value]


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    json.dump(to_plain(value), sys.stdout, ensure_ascii=False, indent=2)
    sys.stdout.write("\n")


def printable(data: bytes) -> str:
    """A token's bytes, visible: quoted, with control characters escaped."""
    return repr(data.decode("utf-8", "backslashreplace"))


def size_text(num_bytes: int) -> str:
    """A number of bytes in the largest unit of which there is one."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}" if unit != "B" else f"{num_bytes} B"


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], stream: TextIO | None = None) -> None:
    """A table; numbers are aligned to the right."""
    out = stream or sys.stdout
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    right = [bool(rows) and all(isinstance(row[column], int | float) for row in rows) for column in range(len(headers))]
    if out.isatty() and _print_rich(headers, cells, right, out):
        return
    widths = [max(len(row[column]) for row in [list(headers), *cells]) for column in range(len(headers))]
    for row in [list(headers), *cells]:
        aligned = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        )
        out.write("  ".join(aligned).rstrip() + "\n")


def _print_rich(headers: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool], out: TextIO) -> bool:
    try:
        from rich.box import SIMPLE_HEAD  # noqa: PLC0415 (optional)
        from rich.console import Console  # noqa: PLC0415 (optional)
        from rich.table import Table  # noqa: PLC0415 (optional)
        from rich.text import Text  # noqa: PLC0415 (optional)
    except ImportError:
        return False
    table = Table(box=SIMPLE_HEAD)
    for header, number in zip(headers, right, strict=True):
        table.add_column(header, justify="right" if number else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # Text: no markup is read in what users wrote
    Console(file=out).print(table)
    return True


def describe(error: PawlError) -> str:
    """An error on one line: its reason, its sentence, and the fields that the sentence does not name."""
    parts = [f"{error.reason}: {error}"]
    parts += [f"{v.field}: {v.message}" for v in error.violations if v.field not in error.message]
    if error.retry_after is not None:
        parts.append(f"try again in {error.retry_after:.3g} s")
    return "; ".join(" ".join(part.split()) for part in parts)
