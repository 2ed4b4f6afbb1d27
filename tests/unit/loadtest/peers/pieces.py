"""Made-up figures of a run in one piece."""

from __future__ import annotations

from collections.abc import Sequence

from pawl_loadtest.peers.machine import Machine
from pawl_loadtest.peers.rounds import Outcome
from pawl_loadtest.peers.runs import Piece, Run
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.peers.workloads import Workload

WORKLOAD = Workload(1, 32, 128)
BEFORE = Machine(2, {"AVX2": 100e9, "AVX-512": 150e9}, 90e9, {"2147483648": 30e9}, "a note")
AFTER = Machine(2, {"AVX2": 80e9, "AVX-512": 200e9}, 95e9, {"2147483648": 25e9}, "a note")


def rates(*values: float) -> dict[str, dict[int, float]]:
    """Of the one workload, round by round."""
    return {WORKLOAD.name: dict(enumerate(values))}


def make_run(
    *outcomes: Outcome,
    rounds: int = 3,
    workloads: Sequence[Workload] = (WORKLOAD,),
    tables: Sequence[str] = ("exact", "fp16"),
    processor: str = "a processor",
    after: Machine = AFTER,
    started: str = "2026-01-01T10:00:00+00:00",
    cap: str | None = None,
) -> Run:
    """One piece of these outcomes."""
    ended = "2026-01-01T10:05:00+00:00"
    piece = Piece(started, ended, rounds, processor, "AVX-512", "0123", 0.9, BEFORE, after, cap)
    return Run(SHAPES["smollm2-135m"], "bfloat16", workloads, tables, [piece], outcomes)
