"""Every vocabulary direction is scored."""

from __future__ import annotations

from torch import Tensor

from pawl_workers.model.weights import HeadWeights

__all__ = ["logits"]


def logits(x: Tensor, w: HeadWeights) -> Tensor:
    """Score each token of the vocabulary for each row: [S, D] -> [S, V], float32."""
    scores = w.linear(x).float()
    if w.divisor != 1.0:
        scores = scores.div_(w.divisor)
    if w.softcap is not None:
        scores = scores.div_(w.softcap).tanh_().mul_(w.softcap)
    return scores
