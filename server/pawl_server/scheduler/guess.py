"""What a sequence is guessed to go on with, and on what the guess rests."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Final, Protocol

__all__ = ["MOST_EVIDENCE", "NOTHING", "Guess", "Proposer"]

MOST_EVIDENCE: Final = 8
"""Kinds of evidence that are told apart."""


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens that may follow.

    Attributes:
        token_ids: in order; none when there is no idea.
        evidence: what the first of them rests on, 1 to MOST_EVIDENCE: guesses with the same are right equally often.
        certain: nothing else may follow.
    """

    token_ids: list[int]
    evidence: int = 1
    certain: bool = False


NOTHING: Final = Guess([])


class Proposer(Protocol):
    """Guesses how one sequence goes on."""

    def propose(self, tokens: array[int], most: int) -> Guess:
        """Guess at most `most` tokens. `tokens` are all of the sequence, and only grow from call to call."""
        ...
