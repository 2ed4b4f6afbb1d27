"""Every vocabulary direction is scored."""

from __future__ import annotations

from torch import Tensor

from pawl_workers.model.weights import PackedLinear

__all__ = ["logits"]


def logits(x: Tensor, head: PackedLinear) -> Tensor:
    """Score each token of the vocabulary for each row: [S, D] -> [S, V], float32."""
    return head(x).float()
