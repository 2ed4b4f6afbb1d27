"""Prompt tokens are scored: how probable each was, given those before it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pawl_workers.batch import PromptRows
from pawl_workers.model.weights import HeadWeights, PackedNorm
from pawl_workers.plan import PromptLogprobs
from pawl_workers.sampling.logprobs import describe_tokens
from pawl_workers.stages.logits import logits
from pawl_workers.stages.norm import norm

__all__ = ["SCORED_ROWS", "score"]

SCORED_ROWS = 64
"""Rows that go through the head at a time, so that a long prompt needs little memory for its logits."""


def score(x: Tensor, final_norm: PackedNorm, head: HeadWeights, prompts: Sequence[PromptRows]) -> list[PromptLogprobs]:
    """Give log-probabilities of prompt tokens from the residual stream after the last layer, [T, D]."""
    scored = []
    for prompt in prompts:
        positions = []
        for begin in range(0, len(prompt.target_ids), SCORED_ROWS):
            target_ids = prompt.target_ids[begin : begin + SCORED_ROWS].tolist()
            first = prompt.first + begin
            scores = logits(norm(x[first : first + len(target_ids)], final_norm), head)
            positions += describe_tokens(scores, target_ids, [prompt.num_alternatives] * len(target_ids))
        scored.append(PromptLogprobs(prompt.row, prompt.first_position, positions))
    return scored
