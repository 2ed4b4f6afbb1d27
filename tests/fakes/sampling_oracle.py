"""What a sampler must give, worked out in float64 and plain Python from its definition: it sorts and loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pawl_workers.plan import SamplingSpec
from pawl_workers.sampling.batch import IntArray, Sampler, SamplingBatch, TokenMasks
from pawl_workers.sampling.table import SamplingTable

__all__ = ["adjusted", "as_words", "distribution", "make_batch", "p_value", "random_scores"]

Scores = NDArray[np.float32]


def random_scores(seed: int, size: int = 300, scale: float = 3.0) -> Scores:
    """Normal logits, [size]."""
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def adjusted(
    scores: Scores,
    spec: SamplingSpec,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    allowed: Sequence[int] | None = None,
) -> list[float]:
    """Penalties, bias, suppression and mask, token by token."""
    logits = [float(score) for score in scores]
    for token_id in {*prompt_ids, *output_ids}:
        factor = spec.repetition_penalty
        logits[token_id] = logits[token_id] / factor if logits[token_id] > 0 else logits[token_id] * factor
    for token_id in set(output_ids):
        logits[token_id] -= spec.presence_penalty + spec.frequency_penalty * list(output_ids).count(token_id)
    for token_id, value in spec.logit_bias.items():
        logits[token_id] += value
    if len(output_ids) < spec.min_output_tokens:
        for token_id in spec.suppressed_ids:
            logits[token_id] = -math.inf
    if allowed is not None:
        logits = [logit if token_id in set(allowed) else -math.inf for token_id, logit in enumerate(logits)]
    return logits


def distribution(logits: Sequence[float], spec: SamplingSpec) -> dict[int, float]:
    """Probability of each token that temperature, top-k, top-p and min-p leave, in this order."""
    best = max(logits)
    weights = {i: math.exp((logit - best) / spec.temperature) for i, logit in enumerate(logits) if logit > -math.inf}
    best_first = sorted(weights, key=lambda i: (-logits[i], i))
    if spec.top_k:
        best_first = best_first[: spec.top_k]
    if spec.top_p < 1.0:
        total, reached = math.fsum(weights[i] for i in best_first), 0.0
        kept: list[int] = []
        for i in best_first:
            if kept and reached >= spec.top_p * total:
                break
            kept.append(i)
            reached += weights[i]
        best_first = kept
    best_first = [i for i in best_first if weights[i] >= spec.min_p]
    total = math.fsum(weights[i] for i in best_first)
    return {i: weights[i] / total for i in sorted(best_first)}


def as_words(allowed: Sequence[Sequence[int]], vocab_size: int) -> NDArray[np.uint32]:
    """Pack lists of token ids as a grammar library does, [masks, words]."""
    words = np.zeros((len(allowed), -(-vocab_size // 32)), dtype=np.uint32)
    for mask, token_ids in zip(words, allowed, strict=True):
        for token_id in token_ids:
            mask[token_id // 32] |= np.uint32(1 << token_id % 32)
    return words


def make_batch(
    sampler: Sampler,
    table: SamplingTable,
    rows: Sequence[int],
    positions: Sequence[int],
    *,
    num_output: Sequence[int] | None = None,
    drafts: IntArray | None = None,
    masks: TokenMasks | None = None,
) -> SamplingBatch:
    """A batch of (row, position) pairs; output lengths default to 0."""
    size = len(rows)
    return SamplingBatch(
        sampler=sampler,
        table=table,
        rows=np.array(rows, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        num_output=np.array(num_output or [0] * size, dtype=np.int64),
        drafts=np.zeros((size, 0), dtype=np.int64) if drafts is None else drafts,
        masks=masks,
    )


def p_value(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Pearson's chi-squared test: how probable counts as far from the probabilities, or farther, are by chance.

    Outcomes expected less than 8 times are counted together.
    """
    expected = probabilities * counts.sum()
    rare = expected < 8.0
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    if (counts[expected <= 0.0] > 0).any():
        return 0.0  # what cannot happen has happened
    counts, expected = counts[expected > 0.0], expected[expected > 0.0]
    if len(counts) < 2:
        return 1.0
    statistic = float(((counts - expected) ** 2 / expected).sum())
    half_degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_degrees, torch.tensor(statistic / 2, dtype=torch.float64)))
