"""What a block found out is added to the stream."""

from __future__ import annotations

from torch import Tensor

__all__ = ["add"]


def add(x: Tensor, update: Tensor) -> Tensor:
    """Add a block's output, [T, D], to the residual stream, [T, D], which may be changed in place."""
    return x.add_(update)
