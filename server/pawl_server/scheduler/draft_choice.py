"""Which guessed tokens a step computes: those with which it gives most tokens a second. Pure arithmetic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pawl_server.scheduler.slots import IntArray

__all__ = ["FloatArray", "choose_drafts"]

FloatArray = NDArray[np.float64]

_CAUTION = 1.1  # drafts are taken for so much dearer than they were measured: what gains nothing is not worth its risk
_LEAST_SECONDS = 1e-12


def choose_drafts(
    chances: FloatArray, seconds: FloatArray, *, num_tokens: int, step_s: float, fixed_s: float, most: int
) -> IntArray:
    """Choose how many tokens of each guess to compute.

    They are taken in the order of what they are expected to give for the time that they take, which for each guess is
    the order in which they stand, for as long as the step's tokens per second rise. This is the best choice there is
    of each size: the same time never buys more.

    Args:
        chances: [G, K], probability that each token of a guess is accepted; falling along K, 0 past its end.
        seconds: [G], what one more token of each takes.
        num_tokens: that the step gives without drafts.
        step_s: seconds that it takes without.
        fixed_s: seconds that it takes longer with drafts, however few.
        most: tokens to choose at most.

    Returns:
        [G], how many of each; all 0 where the step without drafts gives as many tokens per second.
    """
    num_guesses, width = chances.shape
    none = np.zeros(num_guesses, dtype=np.int64)
    if most < 1 or not chances.size:
        return none
    dear = _CAUTION * np.maximum(seconds, _LEAST_SECONDS)
    order = np.argsort(-(chances / dear[:, None]), axis=None, kind="stable")[:most]
    order = order[chances.ravel()[order] > 0]
    if not len(order):
        return none
    gained = num_tokens + np.cumsum(chances.ravel()[order])
    taken = step_s + _CAUTION * fixed_s + np.cumsum(dear[order // width])
    rates = gained / taken
    best = int(rates.argmax())
    if rates[best] * step_s <= num_tokens:
        return none
    return np.bincount(order[: best + 1] // width, minlength=num_guesses)
