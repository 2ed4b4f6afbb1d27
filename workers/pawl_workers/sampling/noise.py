"""Noise from a counter: one uniform number per (seed, position), whatever runs beside it. Holds no state.

Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "philox", "uniform"]

Words = NDArray[np.uint64]
"""32-bit words, one per entry."""

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Run Philox4x32-10, entry by entry: a counter and a key of 32-bit words to four random 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1 = (product1 >> _HALF) ^ c1 ^ k0, product1 & _MASK
        c2, c3 = (product0 >> _HALF) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Draw the number in [0, 1), a multiple of 2**-53, that belongs to each seed and position, [S]."""
    counts = positions.astype(np.uint64)
    none = np.zeros_like(counts)
    first, second, _, _ = philox(
        (counts & _MASK, counts >> _HALF, none, none),
        (seeds & _MASK, seeds >> _HALF),
    )
    drawn: NDArray[np.float64] = ((first << _HALF | second) >> np.uint64(11)) * np.float64(2.0**-53)
    return drawn
