"""What a block found out is added to the stream."""

from __future__ import annotations

from torch import Tensor

__all__ = ["add"]


def add(x: Tensor, update: Tensor, scale: float = 1.0) -> Tensor:
    """Add a block's output, [T, D], times `scale`, to the residual stream, [T, D], which may be changed in place."""
    return x.add_(update, alpha=scale)
