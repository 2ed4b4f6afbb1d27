"""How often guesses turn out right: estimated for each sequence, from what is seen of all where it has shown little.

Counts of right ones and of tries fade with each new try, as in an exponentially weighted mean, and what a sequence has
shown is shrunk towards the others' share by as much as one try weighs (the mean of a Beta posterior).
"""

from __future__ import annotations

from pawl_server.scheduler.guess import MOST_EVIDENCE

__all__ = ["Acceptance"]

_PRIOR_SHARE = 0.3  # of first guesses that are right, and of later ones, where nobody has shown anything
_PRIOR_TRIES = 1.0  # as which the share of those above weighs
_LEAST, _MOST = 0.01, 0.98


class Acceptance:
    """Shares of guesses that were right.

    The first token of a guess is right or not by what it rests on; a later one, given that those before it are right,
    is mostly right whatever that was, for the text is being repeated.

    Args:
        window: tries after which one weighs 1/e.
        others: what is believed while little is known; None = a share that does not depend on anything.
    """

    __slots__ = ("_keep", "_others", "_right", "_tries")

    def __init__(self, window: float, others: Acceptance | None = None) -> None:
        self._keep = 1.0 - 1.0 / window
        self._others = others
        # By evidence; at 0 those of later tokens.
        self._right = [0.0] * (MOST_EVIDENCE + 1)
        self._tries = [0.0] * (MOST_EVIDENCE + 1)

    def learn(self, evidence: int, num_right: int, *, wrong: bool) -> None:
        """A guess is known to be right for `num_right` tokens, after which one was `wrong` or no more was compared."""
        if num_right or wrong:
            self._count(evidence, right=num_right > 0)
        for _ in range(num_right - 1):
            self._count(0, right=True)
        if num_right and wrong:
            self._count(0, right=False)

    def first(self, evidence: int) -> float:
        """Probability that the first token of such a guess is right."""
        return min(max(self.share(evidence), _LEAST), _MOST)

    def later(self) -> float:
        """Probability that a later token is right if those before it are."""
        return min(max(self.share(0), _LEAST), _MOST)

    def _count(self, kind: int, *, right: bool) -> None:
        self._tries[kind] = self._tries[kind] * self._keep + 1.0
        self._right[kind] = self._right[kind] * self._keep + right

    def share(self, kind: int) -> float:
        """What is believed of first tokens with that evidence, or for 0 of later ones."""
        believed = _PRIOR_SHARE if self._others is None else self._others.share(kind)
        return (self._right[kind] + _PRIOR_TRIES * believed) / (self._tries[kind] + _PRIOR_TRIES)
