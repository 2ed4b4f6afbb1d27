"""How long outputs turn out to be, whatever their requests allow: a quantile of what was seen lately."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pawl_server.scheduler.slots import IntArray

__all__ = ["OutputLengths"]

# Upper bounds of the bins, four to a doubling: an estimate errs by at most a fifth.
_EDGES: Final[IntArray] = np.unique(np.round(2.0 ** (np.arange(97) / 4.0)).astype(np.int64))
_PRIOR_TOKENS = 128  # what an engine expects that has seen nothing
_RAISE = 0.1
_CALM_S = 60.0  # time in which what preemptions added falls to 1/e
_GRAIN = 64  # the quantile is used in 1/64ths, so that what follows from it is seldom worked out again
_MOST = 0.95
_HEAVY = 1e100
_LONGEST = 0.9  # quantile of the outputs that last long


class OutputLengths:
    """A decaying histogram of output lengths, and the quantile of it that admission counts on.

    Every preemption raises the quantile, since it shows that too little was kept free; it falls back slowly.

    Args:
        quantile: that admission counts on while nobody is preempted, in [0, 1).
        memory: outputs after which one counts for 1/e.
    """

    def __init__(self, quantile: float, memory: float = 500.0) -> None:
        self._base = quantile
        self._raised = 0.0  # above the base, at the time of the last preemption
        self._raised_at = 0.0
        self._growth = math.exp(1.0 / memory)
        self._weight = 1.0  # of the next output; grows instead of letting the others decay
        self._counts: NDArray[np.float64] = np.zeros(len(_EDGES))
        self._counts[np.searchsorted(_EDGES, _PRIOR_TOKENS)] = 1.0
        self._totals: tuple[float, IntArray] | None = None  # expected final output by bin of the present, at a quantile
        self._longest: IntArray | None = None  # the same at `_LONGEST`

    def quantile(self, now: float) -> float:
        """The quantile that admission counts on."""
        raised = self._raised * math.exp(-max(0.0, now - self._raised_at) / _CALM_S)
        return self._base + math.floor(raised * _GRAIN) / _GRAIN

    def observe(self, num_output: int) -> None:
        """An output ended with so many tokens."""
        self._weight *= self._growth
        self._counts[min(int(np.searchsorted(_EDGES, num_output)), len(_EDGES) - 1)] += self._weight
        if self._weight > _HEAVY:
            self._counts /= self._weight
            self._weight = 1.0
        self._totals = self._longest = None

    def raise_quantile(self, now: float) -> None:
        """Somebody was preempted."""
        raised = self._raised * math.exp(-max(0.0, now - self._raised_at) / _CALM_S) + _RAISE
        self._raised, self._raised_at = min(raised, max(0.0, _MOST - self._base)), now

    def expected(self, num_output: IntArray, now: float) -> IntArray:
        """Tokens in the end of outputs that have `num_output` now: the quantile of those which came that far."""
        quantile = self.quantile(now)
        if self._totals is None or self._totals[0] != quantile:
            self._totals = quantile, self._conditional(quantile)
        bins = np.minimum(np.searchsorted(_EDGES, num_output), len(_EDGES) - 1)
        return np.maximum(self._totals[1][bins], num_output + 1)

    def longest(self, num_output: int) -> int:
        """Tokens in the end of an output that has `num_output` now, if it is one of the longer of those seen."""
        if self._longest is None:
            self._longest = self._conditional(_LONGEST)
        place = min(int(np.searchsorted(_EDGES, num_output)), len(_EDGES) - 1)
        return max(int(self._longest[place]), num_output + 1)

    def _conditional(self, quantile: float) -> IntArray:
        """For each bin, the quantile of the outputs in it and in the bins above; its own edge where there are none."""
        up_to = np.cumsum(self._counts)
        before = np.concatenate([[0.0], up_to[:-1]])
        wanted = before + quantile * (up_to[-1] - before)
        places = np.minimum(np.searchsorted(up_to, wanted, side="left"), len(_EDGES) - 1)
        places = np.where(up_to[-1] - before > 0, places, np.arange(len(_EDGES)))
        return np.asarray(_EDGES[np.maximum(places, np.arange(len(_EDGES)))], dtype=np.int64)
