"""What was measured, in one piece or several.

Pieces of one machine can be joined: more rounds of the same, other workloads, other engines. Each round keeps its
number, so that ratios are those of figures that were taken in the same round.
"""

from __future__ import annotations

import hashlib
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from pawl_loadtest.peers.bounds import Bound, Precision, bound
from pawl_loadtest.peers.machine import Machine
from pawl_loadtest.peers.rounds import Outcome
from pawl_loadtest.peers.shapes import Shape
from pawl_loadtest.peers.variants import OURS, TABLES, VARIANTS
from pawl_loadtest.peers.workloads import Workload

__all__ = ["JoinError", "Piece", "Run", "code_digest", "join", "processor"]

_SOURCES = ("pawl", "pawl_server", "pawl_workers")
_SUFFIXES = {".py", ".c", ".h"}


class JoinError(ValueError):
    """Pieces that are not of one benchmark."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One stretch of measuring.

    Attributes:
        started: when, UTC, ISO 8601; `ended` likewise.
        processor: its name.
        instructions: what pawl's linear layers computed in, a name of a peak.
        code: a digest of pawl's sources.
        load_average: of the minute before.
        before: what the machine could do before the first round, and `after` the last.
        cap: of `CAPS`, that every engine was held to; None = to none.
    """

    started: str
    ended: str
    rounds: int
    processor: str
    instructions: str
    code: str
    load_average: float
    before: Machine
    after: Machine
    cap: str | None = None

    @property
    def machine(self) -> Machine:
        """The better of the two."""
        return self.before.better(self.after)


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that was measured, and on what; `notes` are what a reader must know beside it.

    `kept_weight_bytes`: bytes that pawl's limits count for a weight; None = as many as it has in the checkpoint.
    """

    shape: Shape
    weights: str
    workloads: Sequence[Workload]
    tables: Sequence[str]
    pieces: Sequence[Piece]
    outcomes: Sequence[Outcome]
    notes: Sequence[str] = ()
    kept_weight_bytes: float | None = None

    @property
    def rounds(self) -> int:
        """Of all pieces."""
        return sum(piece.rounds for piece in self.pieces)

    @property
    def machine(self) -> Machine:
        """The best that was measured before or after any piece."""
        return reduce(Machine.better, (piece.machine for piece in self.pieces))

    @property
    def instructions(self) -> str:
        """The peak that pawl's own linear layers are held to."""
        return self.pieces[0].instructions

    def least(self, outcome: Outcome, workload: Workload, peak: str) -> Bound:
        """The least time that the variant's own bytes and operations take."""
        precision = self._precision(outcome)
        return bound(self.shape, workload, precision, self.machine.limits(peak, precision.tile_products))

    def _precision(self, outcome: Outcome) -> Precision:
        variant, found = outcome.variant, outcome.variant.precision(self.weights)
        if self.kept_weight_bytes is None or variant.environment != OURS or variant.weight_bytes is not None:
            return found
        return replace(found, weight_bytes=self.kept_weight_bytes)

    def limit_share(self, outcome: Outcome, workload: Workload, peak: str) -> float:
        """The least seconds over those it took (median)."""
        least = self.least(outcome, workload, peak).seconds
        return least * statistics.median(outcome.rates[workload.name].values()) / workload.counted_tokens

    def limit_shares_then(self, outcome: Outcome, workload: Workload, peak: str) -> list[float]:
        """Round by round, the least seconds over those it took, by what the machine could do right around that run."""
        precision = self._precision(outcome)
        return [
            bound(self.shape, workload, precision, machine.limits(peak, precision.tile_products)).seconds
            * outcome.rates[workload.name][number]
            / workload.counted_tokens
            for number, machine in sorted(outcome.machines.get(workload.name, {}).items())
        ]


def processor() -> str:
    """The name of this machine's processor, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def code_digest() -> str:
    """Changes when a source of the client, the server or the workers does."""
    digest = hashlib.sha256()
    for package in _SOURCES:
        spec = find_spec(package)
        for folder in [] if spec is None else spec.submodule_search_locations or []:
            for source in sorted(path for path in Path(folder).rglob("*") if path.suffix in _SUFFIXES):
                digest.update(f"{package}/{source.relative_to(folder)}".encode() + source.read_bytes())
    return digest.hexdigest()[:12]


def join(runs: Sequence[Run]) -> Run:
    """One run of several, rounds numbered on.

    Raises:
        JoinError: they differ in shape, weights, processor, threads, or what pawl or all of them computed in.
    """
    first = runs[0]
    for run in runs[1:]:
        for name, ours, theirs in zip(_IDENTITY, _identity(first), _identity(run), strict=True):
            if ours != theirs:
                raise JoinError(f"{name} differs: {ours} and {theirs}; join pieces of one machine and one model")
    outcomes: dict[str, Outcome] = {}
    notes: list[str] = []
    done = 0
    for run in runs:
        notes += run.notes
        for outcome in run.outcomes:
            name = outcome.variant.name
            if outcome.failure is not None:
                notes.append(f"{name} did not run in {_rounds(done, run.rounds)}: {outcome.failure}")
            outcomes[name] = _merged(outcomes.get(name), outcome, done)
        done += run.rounds
    failed = {outcome.variant.name for outcome in outcomes.values() if outcome.failure is not None}
    return Run(
        shape=first.shape,
        weights=first.weights,
        workloads=list(dict.fromkeys(workload for run in runs for workload in run.workloads)),
        tables=[table for table in TABLES if any(table in run.tables for run in runs)],
        pieces=[piece for run in runs for piece in run.pieces],
        outcomes=[outcomes[variant.name] for variant in VARIANTS if variant.name in outcomes],
        notes=[note for note in dict.fromkeys(notes) if note.partition(" did not run")[0] not in failed],
    )


_IDENTITY = ("shape", "weights", "processor", "threads", "instructions", "cap")


def _identity(run: Run) -> tuple[object, ...]:
    piece = run.pieces[0]
    return run.shape.name, run.weights, piece.processor, piece.before.threads, piece.instructions, piece.cap


def _rounds(done: int, count: int) -> str:
    return f"round {done + 1}" if count == 1 else f"rounds {done + 1} to {done + count}"


def _merged(before: Outcome | None, new: Outcome, done: int) -> Outcome:
    """What did not fail counts; of what was compared with the reference, the worst."""
    shifted = Outcome(new.variant, new.facts, new.agreement, failure=new.failure)
    if new.failure is None:
        shifted.rates, shifted.others = _shifted(new.rates, done), _shifted(new.others, done)
        shifted.pairs, shifted.cpu = _shifted(new.pairs, done), _shifted(new.cpu, done)
        shifted.machines = _shifted(new.machines, done)
    if before is None or before.failure is not None:
        return shifted
    if shifted.failure is not None:
        return before
    shifted.rates, shifted.others = _united(before.rates, shifted.rates), _united(before.others, shifted.others)
    shifted.pairs, shifted.cpu = _united(before.pairs, shifted.pairs), _united(before.cpu, shifted.cpu)
    shifted.machines = _united(before.machines, shifted.machines)
    compared = [found for found in (before.agreement, new.agreement) if found is not None]
    shifted.agreement = min(compared, key=lambda found: (found.agrees, found.share), default=None)
    return shifted


_Figure = TypeVar("_Figure")
_ByRound = dict[str, dict[int, _Figure]]


def _shifted(figures: _ByRound[_Figure], done: int) -> _ByRound[_Figure]:
    return {name: {done + number: value for number, value in by.items()} for name, by in figures.items()}


def _united(before: _ByRound[_Figure], new: _ByRound[_Figure]) -> _ByRound[_Figure]:
    return {name: before.get(name, {}) | new.get(name, {}) for name in dict.fromkeys([*new, *before])}
