"""Noise from a counter: one uniform number per (seed, position), whatever runs beside it. Holds no state.

Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

__all__ = ["philox", "uniform"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Run Philox4x32-10: a counter and a key of 32-bit words to four random 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & _MASK, (product0 >> 32) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """Draw the number in [0, 1), a multiple of 2**-53, that belongs to a seed and a position.

    The seed is taken modulo 2**64.
    """
    counter = (position & _MASK, position >> 32 & _MASK, 0, 0)
    first, second, _, _ = philox(counter, (seed & _MASK, seed >> 32 & _MASK))
    return ((first << 32 | second) >> 11) * 2.0**-53
