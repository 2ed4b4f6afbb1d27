"""How many drafts each sequence gets: as many as are expected to pay for the time that they add to the step.

The j-th draft of a sequence is accepted with probability p^j, where p is how often its drafts were right so far. It
adds a token's cost to the step, and is worth it when p^j tokens for that cost are more than the step gives without
drafts: its tokens / its seconds. Both come from a model of the step's time that is fitted as the steps go by. A
sequence whose drafts do not pay is tried again, ever more seldom while it fails.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pawl_server.scheduler.budget import StepLoad, StepTimeModel
from pawl_server.scheduler.ngram import NgramIndex
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.slots import NEVER, IntArray, SlotTable

__all__ = ["Drafting", "Proposals", "Proposer", "Speculation"]

_WEIGHT = 0.15  # of one draft's outcome in what is believed of its sequence
_COMMON_WEIGHT = 0.02  # and in what is believed of a new one
_LEAST_BELIEF, _MOST_BELIEF = 0.02, 0.98
_MOST_WAIT_FOUND_NOTHING = 4  # tokens until the next look, after as many that found nothing
_FIRST_STEPS, _MEASURED_STEPS = 32, 8  # with drafts and without: learning takes time, too
_LEAST_WAIT, _MOST_WAIT = 16, 256  # tokens until drafts that do not pay are tried again


class Proposer(Protocol):
    """Guesses how one sequence goes on."""

    def propose(self, tokens: array[int], most: int) -> list[int]:
        """Tokens that may follow, at most `most`; none when it has no idea. `tokens` only grow from call to call."""
        ...


@dataclass(slots=True)
class Drafting:
    """What is known of one sequence's drafts.

    Attributes:
        proposer: of this sequence.
        belief: probability that a draft is right when the one before it was.
        num_missed: looks in a row that found nothing.
        wait: tokens between two tries while drafts do not pay; 0 = the next one is made at once.
        try_at: length from which on drafts that do not seem to pay are tried again.
    """

    proposer: Proposer
    belief: float
    num_missed: int = 0
    wait: int = 0
    try_at: int = 0


@dataclass(slots=True)
class Proposals:
    """Drafts for a step, and who is not to be asked again for a while.

    Attributes:
        drafts: token ids by row.
        found: (row, number) of what was proposed, before anything of it was cut.
        missed: rows for which nothing was found.
        declined: rows whose drafts would not pay.
    """

    drafts: dict[int, list[int]] = field(default_factory=dict)
    found: list[tuple[int, int]] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    declined: list[int] = field(default_factory=list)


class Speculation:
    """Decides who drafts how much. `propose` changes nothing; `launched`, `settled` and `observe` do.

    Args:
        most_drafts: of one sequence in one step.
        make_proposer: called once for each sequence that drafts.
    """

    def __init__(
        self, most_drafts: int, make_proposer: Callable[[SequenceState], Proposer] = lambda _: NgramIndex()
    ) -> None:
        if most_drafts < 1:
            raise ValueError(f"most_drafts = {most_drafts}: must be at least 1")
        self.most_drafts = most_drafts
        self.model = StepTimeModel()
        self._make_proposer = make_proposer
        self._num_steps = [0, 0]  # without drafts and with some
        self._common = 0.5  # belief in the drafts of a sequence of which nothing is known

    def propose(self, slots: SlotTable, rows: IntArray, load: StepLoad, most: int) -> Proposals:
        """Draft for a step.

        Args:
            slots: the running sequences.
            rows: of those that may draft: they decode, and all their tokens are known.
            load: of the step without drafts, in which everybody gives one token.
            most: tokens that all drafts together may have.
        """
        proposals = Proposals()
        rows = rows[slots.length[rows] >= slots.draft_at[rows]]
        if not len(rows) or most < 1:
            return proposals
        rate = load.num_tokens / seconds if (seconds := self.model.predict(load)) > 0 else 0.0
        _, token, pair, read = self.model.coefficients
        for row in rows.tolist():
            length, sequence = int(slots.length[row]), slots.owner(row)
            drafting = sequence.drafting or self._begin(sequence)
            number = self._number(drafting.belief, rate * (token + read + pair * length))
            if length < drafting.try_at and (not number or drafting.try_at == NEVER):
                proposals.declined.append(row)
                continue
            number = min(max(number, 1), most, int(slots.stop_at[row]) - length - 1)
            ids = drafting.proposer.propose(sequence.tokens, number) if number > 0 else []
            if ids:
                proposals.drafts[row] = ids
                proposals.found.append((row, len(ids)))
                most -= len(ids)
            else:
                proposals.missed.append(row)
        return proposals

    def _begin(self, sequence: SequenceState) -> Drafting:
        sequence.drafting = Drafting(self._make_proposer(sequence), self._common)
        return sequence.drafting

    def _number(self, belief: float, cost: float) -> int:
        """Drafts of which each is expected to give more than `cost` tokens."""
        if cost >= belief:
            return 0
        return min(self.most_drafts, int(math.log(cost) / math.log(belief))) if cost > 0 else self.most_drafts

    def launched(self, slots: SlotTable, proposals: Proposals) -> None:
        """A step with these proposals is launched."""
        for row in proposals.missed:
            drafting = slots.owner(row).drafting
            if drafting is not None:
                drafting.num_missed = min(drafting.num_missed + 1, _MOST_WAIT_FOUND_NOTHING)
                slots.draft_at[row] = slots.length[row] + drafting.num_missed
        for row in proposals.declined:
            drafting = slots.owner(row).drafting
            if drafting is not None:
                slots.draft_at[row] = drafting.try_at

    def settled(self, sequence: SequenceState, num_drafts: int, num_accepted: int) -> None:
        """A step with drafts of a sequence is committed.

        Args:
            sequence: may have ended with it.
            num_drafts: how many there were.
            num_accepted: how many of them; -1 where the step came to nothing for this sequence.
        """
        drafting = sequence.drafting
        if drafting is None:
            return
        if num_accepted < 0:  # its drafts broke the step: never again
            drafting.try_at = NEVER
            return
        drafting.num_missed = 0
        hits, misses = num_accepted, int(num_accepted < num_drafts)
        drafting.belief = _learn(drafting.belief, hits, misses, _WEIGHT)
        self._common = _learn(self._common, hits, misses, _COMMON_WEIGHT)
        if misses and not hits:
            drafting.wait = min(max(_LEAST_WAIT, 2 * drafting.wait), _MOST_WAIT)
        elif not misses:
            drafting.wait = 0
        drafting.try_at = sequence.num_tokens + drafting.wait

    def observe(self, load: StepLoad, seconds: float, *, drafted: bool) -> None:
        """Learn from a measured step in which nobody was in mid-prompt: the first ones, and then every eighth."""
        self._num_steps[drafted] += 1
        if self._num_steps[drafted] <= _FIRST_STEPS or self._num_steps[drafted] % _MEASURED_STEPS == 0:
            self.model.observe(load, seconds)


def _learn(belief: float, hits: int, misses: int, weight: float) -> float:
    """Belief after so many drafts that were right, and one or none that was not."""
    belief = 1.0 - (1.0 - belief) * (1.0 - weight) ** hits
    return min(max(belief * (1.0 - weight) ** misses, _LEAST_BELIEF), _MOST_BELIEF)
