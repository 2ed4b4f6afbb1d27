"""Drafts under a constraint: what it leaves no choice about, and else what fits of a guess from the text so far."""

from __future__ import annotations

from array import array

from pawl_server.engine.grammar.masks import MaskBuilder
from pawl_server.scheduler.guess import NOTHING, Guess, Proposer
from pawl_server.scheduler.sequence import SequenceState

__all__ = ["GrammarProposer"]


class GrammarProposer:
    """Guesses how one constrained sequence goes on.

    Where the constraint forces the text (names and signs of a JSON schema), llguidance lets nothing be chosen but the
    tokens in which the tokenizer writes it, so that these are certain.

    Args:
        masks: with the matcher of the sequence.
        sequence: asked for only while no step of it is in flight.
        guesses: from the text so far.
    """

    def __init__(self, masks: MaskBuilder, sequence: SequenceState, guesses: Proposer) -> None:
        self._masks, self._sequence, self._guesses = masks, sequence, guesses

    def propose(self, tokens: array[int], most: int) -> Guess:
        """Guess at most `most` tokens, each of which the constraint allows after those before it."""
        matcher = self._masks.look_ahead(self._sequence)
        if matcher is None:
            return NOTHING
        if forced := matcher.compute_ff_tokens()[:most]:
            return Guess(forced, certain=True)
        guess = self._guesses.propose(tokens, most)
        if not guess.token_ids:
            return guess
        return Guess(guess.token_ids[: matcher.validate_tokens(guess.token_ids)], guess.evidence)
