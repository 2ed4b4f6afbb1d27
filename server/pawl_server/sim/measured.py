"""Recorded steps as files: CSV with the columns `seconds,tokens,contexts`, or JSON with a list of such objects.

`tokens` are the tokens that each sequence of the step computed, `contexts` what each held afterwards; in a CSV they
are numbers between spaces. `python -m pawl_loadtest.steps` records them from a worker.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

from pawl_server.sim.cost import MeasuredStep, shape_of

__all__ = ["RecordedStep", "read_steps", "write_steps"]


class RecordedStep(TypedDict):
    """One step as it is written."""

    seconds: float
    tokens: list[int]
    contexts: list[int]


def _measured(step: RecordedStep) -> MeasuredStep:
    tokens, contexts = step["tokens"], step["contexts"]
    if len(tokens) != len(contexts) or not tokens:
        raise ValueError(f"{len(tokens)} tokens and {len(contexts)} contexts: there is one of each per sequence")
    if any(not 1 <= new <= context for new, context in zip(tokens, contexts, strict=True)):
        raise ValueError("a sequence computes at least one token, and holds all that it computed")
    return MeasuredStep(shape_of(tokens, contexts), float(step["seconds"]))


def _csv_steps(path: Path) -> Iterable[RecordedStep]:
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            yield RecordedStep(
                seconds=float(line["seconds"]),
                tokens=[int(word) for word in line["tokens"].split()],
                contexts=[int(word) for word in line["contexts"].split()],
            )


def read_steps(path: Path) -> list[MeasuredStep]:
    """Read recorded steps; the name's ending says the format.

    Raises:
        ValueError: naming the step that cannot be understood.
    """
    steps: Iterable[RecordedStep] = (
        json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else _csv_steps(path)
    )
    measured: list[MeasuredStep] = []
    try:
        measured.extend(_measured(step) for step in steps)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: step {len(measured) + 1} cannot be understood: {error!r}") from error
    return measured


def write_steps(path: Path, steps: Sequence[RecordedStep]) -> None:
    """Write recorded steps; the name's ending says the format."""
    if path.suffix == ".json":
        path.write_text(json.dumps(list(steps)) + "\n", encoding="utf-8")
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("seconds", "tokens", "contexts"))
        for step in steps:
            writer.writerow(
                (repr(step["seconds"]), " ".join(map(str, step["tokens"])), " ".join(map(str, step["contexts"])))
            )
