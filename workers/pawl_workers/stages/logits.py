"""Every vocabulary direction is scored."""

from __future__ import annotations

from torch import Tensor

from pawl_workers.model.weights import HeadWeights

__all__ = ["adjust", "logits"]


def logits(x: Tensor, w: HeadWeights) -> Tensor:
    """Score each token of the vocabulary for each row: [S, D] -> [S, V], float32."""
    return adjust(w.linear(x).float(), w)


def adjust(scores: Tensor, w: HeadWeights) -> Tensor:
    """Divide and cap what the head's projection gave, [S, V], where a family does, in place."""
    if w.divisor != 1.0:
        scores = scores.div_(w.divisor)
    if w.softcap is not None:
        scores = scores.div_(w.softcap).tanh_().mul_(w.softcap)
    return scores
