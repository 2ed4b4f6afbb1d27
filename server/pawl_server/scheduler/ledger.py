"""What is in flight: one entry per launched step, settled or voided as a whole. Counters are derived from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from pawl_server.scheduler.sequence import SequenceState, Status
from pawl_server.scheduler.slots import BoolArray, IntArray, SlotTable
from pawl_workers.plan import StepResult

__all__ = ["LedgerEntry", "StaleResultError"]


class StaleResultError(RuntimeError):
    """A result that is not that of the oldest step in flight. A defect of the executor, never of a request."""


@dataclass(slots=True)
class LedgerEntry:
    """A launched step, in parallel arrays over its sequences, [S].

    Attributes:
        step: number of the step.
        epoch: incarnation of the worker.
        rows: of the slot table.
        generations: of the rows at launch; another one now means that their owner has left.
        num_tokens: tokens computed.
        num_samples: tokens that come out at least, 0 in mid-prompt.
        forks: row and sequence of those that begin with what a row computes in this step.
        drafts: by row, how many of its tokens are drafts.
        stale: by row, those who lost their KV since; what was sampled for them still counts.
    """

    step: int
    epoch: int
    rows: IntArray
    generations: IntArray
    num_tokens: IntArray
    num_samples: IntArray
    forks: list[tuple[int, SequenceState]] = field(default_factory=list)
    drafts: dict[int, int] = field(default_factory=dict)
    stale: dict[int, SequenceState] = field(default_factory=dict)

    def rejected(self, result: StepResult) -> IntArray:
        """How many of the tokens computed count as not computed, [S]: drafts that are not what was sampled.

        Where drafts broke the step for their row it gave no token, and nothing of it counts.

        Raises:
            StaleResultError: a row gave more tokens than its drafts allow.
        """
        rejected = np.zeros_like(self.num_tokens)
        given = Counter(result.rows)
        for place in np.flatnonzero(np.isin(self.rows, list(self.drafts))).tolist():
            row = int(self.rows[place])
            rejected[place] = 1 + self.drafts[row] - given[row]
        if (rejected < 0).any():
            raise StaleResultError(f"step {self.step} gave more tokens than it had drafts")
        return rejected

    def alive(self, slots: SlotTable) -> BoolArray:
        """Which of its sequences still run where they ran, [S]."""
        return np.asarray(slots.generation[self.rows] == self.generations, dtype=np.bool_)

    def holds(self, row: int, slots: SlotTable) -> bool:
        """Whether the sequence that runs in a row now is computed by this step."""
        found = np.flatnonzero(self.rows == row)
        return len(found) > 0 and bool(self.generations[found[0]] == slots.generation[row])

    def members(self, slots: SlotTable) -> list[SequenceState]:
        """The sequences of the step that have not ended."""
        running = [slots.owner(row) for row in self.rows[self.alive(slots)].tolist()]
        return running + [sequence for sequence in self.stale.values() if sequence.status is not Status.ENDED]

    def drain(self) -> None:
        """Nothing is owed any more to those who lost their KV since."""
        for sequence in self.stale.values():
            sequence.num_stale -= 1
        self.stale.clear()
