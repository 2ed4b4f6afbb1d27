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
_CALM = 0.999  # of the distance to the base that is left after a step without a preemption
_MOST = 0.95
_HEAVY = 1e100


class OutputLengths:
    """A decaying histogram of output lengths, and the quantile of it that admission counts on.

    Every preemption raises the quantile, since it shows that too little was kept free; it falls back slowly.

    Args:
        quantile: that admission counts on while nobody is preempted, in [0, 1).
        memory: outputs after which one counts for 1/e.
    """

    def __init__(self, quantile: float, memory: float = 500.0) -> None:
        self._base = self._quantile = quantile
        self._growth = math.exp(1.0 / memory)
        self._weight = 1.0  # of the next output; grows instead of letting the others decay
        self._counts: NDArray[np.float64] = np.zeros(len(_EDGES))
        self._counts[np.searchsorted(_EDGES, _PRIOR_TOKENS)] = 1.0
        self._totals: IntArray | None = None  # expected final output by bin of the present one

    @property
    def quantile(self) -> float:
        """The quantile that admission counts on now."""
        return self._quantile

    def observe(self, num_output: int) -> None:
        """An output ended with so many tokens."""
        self._weight *= self._growth
        self._counts[min(int(np.searchsorted(_EDGES, num_output)), len(_EDGES) - 1)] += self._weight
        if self._weight > _HEAVY:
            self._counts /= self._weight
            self._weight = 1.0
        self._totals = None

    def raise_quantile(self) -> None:
        """Somebody was preempted."""
        self._quantile = min(max(_MOST, self._base), self._quantile + _RAISE)
        self._totals = None

    def calm(self) -> None:
        """A step went by without a preemption."""
        if self._quantile > self._base:
            self._quantile = max(self._base, self._base + (self._quantile - self._base) * _CALM - 1e-6)
            self._totals = None

    def expected(self, num_output: IntArray) -> IntArray:
        """Tokens that outputs which have `num_output` tokens now will have in the end: the quantile of those
        which came that far.
        """  # noqa: D205 (one sentence)
        totals = self._totals
        if totals is None:
            totals = self._totals = self._conditional()
        bins = np.minimum(np.searchsorted(_EDGES, num_output), len(_EDGES) - 1)
        return np.maximum(totals[bins], num_output + 1)

    def _conditional(self) -> IntArray:
        """For each bin, the quantile of the outputs in it and in the bins above; its own edge where there are none."""
        up_to = np.cumsum(self._counts)
        before = np.concatenate([[0.0], up_to[:-1]])
        wanted = before + self._quantile * (up_to[-1] - before)
        places = np.minimum(np.searchsorted(up_to, wanted, side="left"), len(_EDGES) - 1)
        places = np.where(up_to[-1] - before > 0, places, np.arange(len(_EDGES)))
        return np.asarray(_EDGES[np.maximum(places, np.arange(len(_EDGES)))], dtype=np.int64)
