"""Chooses a token from one row of logits: temperature, top-k, top-p, min-p, then an inverse-CDF draw.

Works on one row at a time, in the fixed order of the vocabulary, so that no other row can touch the result.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["choose", "kept_tokens"]

Floats = NDArray[np.float32]

_CUTS = (4.0, 8.0, 16.0)
"""How far below the best tempered logit a candidate may lie, tried in order before the whole vocabulary."""


def choose(scores: Floats, temperature: float, top_k: int, top_p: float, min_p: float, noise: float) -> int | None:
    """Choose a token.

    Args:
        scores: adjusted logits, [V] float32; -inf marks tokens that must not be chosen.
        temperature: 0 means the best token, the lowest id among equals.
        top_k: keep the k best (0 = all; among equals the lower ids).
        top_p: then keep the fewest best tokens whose probability reaches this (1 = all).
        min_p: then drop tokens less probable than this share of the best.
        noise: uniform in [0, 1).

    Returns:
        A token id, or None when every token is -inf or a logit is not a number.
    """
    best = scores.max()
    if not np.isfinite(best):
        return None
    if temperature == 0.0:
        return int(scores.argmax())
    tempered = (scores - best) / np.float32(max(temperature, 1e-30))
    ids, weights = kept_tokens(tempered, top_k, top_p, min_p)
    cumulative = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(cumulative, noise * cumulative[-1], side="right"))
    if index == len(cumulative):  # rounding: the last token that has any weight
        index = int(np.flatnonzero(weights)[-1])
    return index if ids is None else int(ids[index])


def kept_tokens(
    tempered: Floats, top_k: int, top_p: float, min_p: float
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32] | NDArray[np.float64]]:
    """Filter a row of tempered logits, [V], whose maximum is 0.

    Returns:
        Ids of the kept tokens in ascending order (None = all of the vocabulary) and their weights, which
        are probabilities up to a factor.
    """
    limits_k, limits_p = 0 < top_k < len(tempered), top_p < 1.0
    if not limits_k and not limits_p and min_p <= 0.0:
        return None, np.exp(tempered)
    total = float(np.exp(tempered).sum(dtype=np.float64)) if limits_p and not limits_k else 0.0
    ids = _candidates(tempered, top_k if limits_k else 0, top_p * total, min_p)
    # Best first; a stable sort keeps the lower id first among equals.
    ids = ids[np.argsort(-tempered[ids], kind="stable")]
    if limits_k:
        ids = ids[:top_k]
    weights = np.exp(tempered[ids].astype(np.float64))
    if limits_p:
        cumulative = np.cumsum(weights)
        reach = top_p * (float(cumulative[-1]) if limits_k else total)
        # A token is kept while those before it do not reach the mass; the best one always.
        num_kept = 1 + int(np.searchsorted(cumulative[:-1], reach, side="left"))
        ids, weights = ids[:num_kept], weights[:num_kept]
    if min_p > 0.0:
        kept = weights >= min_p
        ids, weights = ids[kept], weights[kept]
    order = np.argsort(ids)
    return ids[order], weights[order]


def _candidates(tempered: Floats, top_k: int, mass: float, min_p: float) -> NDArray[np.int64]:
    """Ids of a level set of the row that holds all tokens the filters can keep.

    A level set contains the k best once it has k tokens, and the nucleus once its weight exceeds the
    nucleus's; so the sort that follows sees tens of tokens, not the vocabulary.
    """
    for cut in _CUTS:
        ids = np.flatnonzero(tempered >= -cut)
        if top_k:
            enough = len(ids) >= top_k
        elif mass > 0.0:
            enough = float(np.exp(tempered[ids].astype(np.float64)).sum()) > mass
        else:
            enough = min_p >= np.exp(-cut)
        if enough:
            return ids
    return np.flatnonzero(tempered > -np.inf)
