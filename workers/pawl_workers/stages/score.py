"""Prompt tokens are scored: how probable each was, given those before it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pawl_workers.batch import Batch
from pawl_workers.model.packed import PackedNorm
from pawl_workers.model.weights import HeadWeights
from pawl_workers.plan import PromptLogprobs
from pawl_workers.stages.logits import logits
from pawl_workers.stages.norm import norm

__all__ = ["SCORED_ROWS", "score"]

SCORED_ROWS = 64
"""Rows that go through the head at a time, so that a long prompt needs little memory for its logits."""


def score(x: Tensor, final_norm: PackedNorm, head: HeadWeights, batch: Batch) -> list[PromptLogprobs]:
    """Give log-probabilities of the batch's prompt tokens from the residual stream after the last layer, [T, D]."""
    sampler, scored = batch.sampling.sampler, []
    for prompt in batch.prompts:
        positions = []
        for begin in range(0, len(prompt.target_ids), SCORED_ROWS):
            targets = prompt.target_ids[begin : begin + SCORED_ROWS]
            first, rows = prompt.first + begin, np.arange(len(targets))
            scores = logits(norm(x[first : first + len(targets)], final_norm), head)
            counts = np.full(len(targets), prompt.num_alternatives, dtype=np.int64)
            positions += sampler.describe(scores, rows, targets, counts).entries(targets, counts)
        scored.append(PromptLogprobs(prompt.row, prompt.first_position, positions))
    return scored
