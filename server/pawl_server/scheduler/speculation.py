"""How many drafts each sequence gets: as many as make the step give most tokens a second, often none.

A guess costs nothing until it is computed, and whether it was right is seen when the tokens have come, computed or not.
So while drafts do not pay nothing is risked to find out whether they would: guesses are still made, now and then, and
only compared; looking for them takes a hundredth of the time. What a draft costs, and a step with drafts, comes from a
model of the step's time that is fitted as the steps go by.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pawl_server.scheduler.acceptance import Acceptance
from pawl_server.scheduler.budget import StepLoad, StepTimeModel
from pawl_server.scheduler.draft_choice import FloatArray, choose_drafts
from pawl_server.scheduler.guess import NOTHING, Guess, Proposer
from pawl_server.scheduler.ngram import NgramIndex
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.slots import NEVER, IntArray, SlotTable

__all__ = ["Drafter", "Drafting", "Proposals", "Speculation"]

_WINDOW, _COMMON_WINDOW = 7.0, 50.0  # tries after which one weighs 1/e, of one sequence and of all
_MOST_WAIT_FOUND_NOTHING = 4  # tokens until the next look, after as many that found nothing
_MOST_WAIT = 16  # tokens until the next look, while what is found would not pay
_ASK_S, _LOOK_S = 1e-4, 5e-5  # about what it takes a step to ask at all, and a look with its new tokens
_LOOKS_SHARE = 0.01  # of the steps' time that looks may take while they do not save more than that
_LOOKS_WINDOW = 32.0  # steps after which it counts for 1/e what looks saved
_MOST_LOOKS_S = 2e-3  # that they may save up
_NO_LIMIT = 1 << 30
_LEAST_STEPS = 3  # measured before anything is drafted
_FIRST_STEPS, _MEASURED_STEPS = 32, 16  # with drafts and without: learning takes time, too


@dataclass(slots=True)
class Drafting:
    """What is known of one sequence's guesses.

    Attributes:
        proposer: of this sequence.
        acceptance: how often it was right.
        guess: the last one, until it is compared with what came.
        made_at: length of the sequence that it continues.
        num_missed: looks in a row that found nothing.
        wait: tokens until the next look, after one whose guess was hopeless.
        barred: whether its drafts broke a step.
    """

    proposer: Proposer
    acceptance: Acceptance
    guess: Guess = NOTHING
    made_at: int = 0
    num_missed: int = 0
    wait: int = 1
    barred: bool = False


@dataclass(slots=True)
class Proposals:
    """Drafts for a step, and what else was looked for.

    Attributes:
        drafts: token ids by row.
        chosen: (row, number) of them, before anything was cut for want of blocks.
        guesses: what was found, by row, whether any of it is computed or not.
        missed: rows for which nothing was found.
        hopeless: rows whose guess would not pay if the step had drafts of others, either.
        saved_s: seconds that the drafts are expected to save, what looking for them takes not counted.
    """

    drafts: dict[int, list[int]] = field(default_factory=dict)
    chosen: list[tuple[int, int]] = field(default_factory=list)
    guesses: dict[int, Guess] = field(default_factory=dict)
    missed: list[int] = field(default_factory=list)
    hopeless: set[int] = field(default_factory=set)
    saved_s: float = 0.0

    @property
    def num_looks(self) -> int:
        """Sequences that were asked."""
        return len(self.missed) + len(self.guesses)


class Drafter(Protocol):
    """Decides who drafts what."""

    @property
    def num_looks(self) -> int:
        """Sequences that the next step may ask; with 0 it need not ask any."""
        ...

    def propose(self, slots: SlotTable, rows: IntArray, load: StepLoad, most: int) -> Proposals:
        """Draft for a step that may not be launched.

        Args:
            slots: the running sequences.
            rows: of those that may draft: they decode, all their tokens are known, and `draft_at` is reached.
            load: of the step without drafts, in which everybody gives one token.
            most: tokens that all drafts together may have.
        """
        ...

    def launched(self, slots: SlotTable, proposals: Proposals) -> None:
        """A step with these proposals is launched."""
        ...

    def broke(self, sequence: SequenceState) -> None:
        """A step came to nothing for a sequence because of its drafts."""
        ...

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a measured step in which nobody was in mid-prompt."""
        ...


class Speculation:
    """The `Drafter` of a served replica. Until some steps are measured nothing is drafted.

    Args:
        most_drafts: of one sequence in one step.
        make_proposer: called once for each sequence that is asked for guesses.
    """

    def __init__(
        self, most_drafts: int, make_proposer: Callable[[SequenceState], Proposer] = lambda _: NgramIndex()
    ) -> None:
        if most_drafts < 1:
            raise ValueError(f"most_drafts = {most_drafts}: must be at least 1")
        self.most_drafts = most_drafts
        self.model = StepTimeModel()
        self.make_proposer = make_proposer
        self._num_steps = [0, 0]  # without drafts and with some
        self._common = Acceptance(_COMMON_WINDOW)
        self._net_s = 0.0  # what a step's looks saved of late, on average, less what they took
        self._looks_s = _MOST_LOOKS_S  # that are left of what they may take
        self._asked_s = 0.0  # what they took in the step that was launched last

    @property
    def num_looks(self) -> int:
        """As many as there are while looks save time; else as many as a hundredth of the time is enough for."""
        return _NO_LIMIT if self._net_s >= 0 else max(0, int((self._looks_s - _ASK_S) / _LOOK_S))

    def propose(self, slots: SlotTable, rows: IntArray, load: StepLoad, most: int) -> Proposals:
        """Draft for a step. What has become of earlier guesses is learnt, whether the step is launched or not."""
        proposals, num_looks = Proposals(), min(most, self.num_looks)
        if num_looks < 1 or not len(rows):
            return proposals
        if len(rows) > num_looks:  # who waited longest is asked first
            waited = slots.length[rows] - slots.draft_at[rows]
            rows = rows[np.argsort(-waited, kind="stable")[:num_looks]]
        for row in rows.tolist():
            length, sequence = int(slots.length[row]), slots.owner(row)
            drafting, tokens = sequence.drafting or self._begin(sequence), sequence.tokens
            self._compare(drafting, tokens)
            number = min(self.most_drafts, int(slots.stop_at[row]) - length - 1)
            guess = drafting.proposer.propose(tokens, number) if number > 0 and not drafting.barred else NOTHING
            if guess.token_ids:
                proposals.guesses[row] = guess
            else:
                proposals.missed.append(row)
        if proposals.guesses and self.model.num_steps >= _LEAST_STEPS:
            self._choose(proposals, slots, load, most)
        return proposals

    def _begin(self, sequence: SequenceState) -> Drafting:
        sequence.drafting = Drafting(self.make_proposer(sequence), Acceptance(_WINDOW, self._common))
        return sequence.drafting

    def _compare(self, drafting: Drafting, tokens: array[int]) -> None:
        """See what became of the last guess, computed or not, as far as the tokens have come."""
        guess, drafting.guess = drafting.guess, NOTHING
        come = tokens[drafting.made_at : drafting.made_at + len(guess.token_ids)].tolist()
        if come and not guess.certain:
            right = [token_id == guessed for token_id, guessed in zip(come, guess.token_ids, strict=False)]
            num_right = [*right, False].index(False)
            wrong = num_right < len(come)
            drafting.acceptance.learn(guess.evidence, num_right, wrong=wrong)
            self._common.learn(guess.evidence, num_right, wrong=wrong)
            if not wrong:
                drafting.wait = 1

    def _choose(self, proposals: Proposals, slots: SlotTable, load: StepLoad, most: int) -> None:
        rows, chances = list(proposals.guesses), self._chances(proposals, slots)
        num_tokens, step_s, fixed_s = load.num_tokens, self.model.predict(load), self.model.drafts_s
        _, token, pair, read = self.model.coefficients
        seconds: FloatArray = token + read + pair * slots.length[rows].astype(np.float64)
        counts = choose_drafts(chances, seconds, num_tokens=num_tokens, step_s=step_s, fixed_s=fixed_s, most=most)
        if counts.any():
            gained = float(chances[np.arange(self.most_drafts) < counts[:, None]].sum())
            proposals.saved_s = gained * step_s / num_tokens - fixed_s - float(counts @ seconds)
        hopeless = chances[:, 0] * step_s < seconds * num_tokens
        for row, count, is_hopeless in zip(rows, counts.tolist(), hopeless.tolist(), strict=True):
            if count:
                proposals.drafts[row] = proposals.guesses[row].token_ids[:count]
                proposals.chosen.append((row, count))
            elif is_hopeless:
                proposals.hopeless.add(row)

    def _chances(self, proposals: Proposals, slots: SlotTable) -> FloatArray:
        """Probability that each token of each guess is accepted, [G, most_drafts]."""
        first, later = np.zeros(len(proposals.guesses)), np.zeros(len(proposals.guesses))
        lengths = np.zeros(len(proposals.guesses))
        for place, (row, guess) in enumerate(proposals.guesses.items()):
            drafting = slots.owner(row).drafting
            lengths[place] = len(guess.token_ids)
            if guess.certain:
                first[place] = later[place] = 1.0
            elif drafting is not None:
                first[place], later[place] = drafting.acceptance.first(guess.evidence), drafting.acceptance.later()
        places = np.arange(self.most_drafts)
        chances = first[:, None] * later[:, None] ** places
        chances[places >= lengths[:, None]] = 0.0
        return chances

    def launched(self, slots: SlotTable, proposals: Proposals) -> None:
        """A step with these proposals is launched: who was asked in vain is not asked again for a while."""
        self._asked_s = _ASK_S + proposals.num_looks * _LOOK_S
        self._looks_s -= self._asked_s
        self._net_s += (proposals.saved_s - self._asked_s - self._net_s) / _LOOKS_WINDOW
        for row in proposals.missed:
            drafting = slots.owner(row).drafting
            if drafting is not None:
                drafting.num_missed = min(drafting.num_missed + 1, _MOST_WAIT_FOUND_NOTHING)
                slots.draft_at[row] = NEVER if drafting.barred else slots.length[row] + drafting.num_missed
        for row, guess in proposals.guesses.items():
            drafting = slots.owner(row).drafting
            if drafting is None:
                continue
            drafting.guess, drafting.made_at, drafting.num_missed = guess, int(slots.length[row]), 0
            if row in proposals.hopeless:
                slots.draft_at[row] = slots.length[row] + drafting.wait
                drafting.wait = min(2 * drafting.wait, _MOST_WAIT)
            else:
                drafting.wait = 1

    def broke(self, sequence: SequenceState) -> None:
        """A step came to nothing for a sequence because of its drafts: it gets none any more."""
        if sequence.drafting is not None:
            sequence.drafting.barred = True

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a measured step: the first ones with drafts and without, and then every sixteenth."""
        self._looks_s = min(max(self._looks_s, 0.0) + _LOOKS_SHARE * seconds, _MOST_LOOKS_S)
        self._num_steps[load.has_drafts] += 1
        if self._num_steps[load.has_drafts] <= _FIRST_STEPS or self._num_steps[load.has_drafts] % _MEASURED_STEPS == 0:
            self.model.observe(load, max(0.0, seconds - self._asked_s))
        self._asked_s = 0.0
