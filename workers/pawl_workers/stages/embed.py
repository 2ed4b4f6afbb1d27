"""Tokens become vectors."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pawl_workers.batch import Batch
from pawl_workers.model.weights import EmbeddingWeights

__all__ = ["embed"]


def embed(batch: Batch, w: EmbeddingWeights) -> Tensor:
    """Look up each token's vector, scale it, and add its position's when positions are learned.

    Returns:
        [T, D], model dtype.
    """
    x = functional.embedding(batch.token_ids, w.tokens).to(w.dtype)
    if w.scale != 1.0:
        x = x * w.scale
    if w.positions is not None:
        x = x + functional.embedding(batch.positions, w.positions)
    return x
