"""Vectors are brought to one scale before each block and before the head."""

from __future__ import annotations

from torch import Tensor

from pawl_workers.model.packed import PackedNorm

__all__ = ["norm"]


def norm(x: Tensor, w: PackedNorm | None) -> Tensor:
    """Normalise each row of x, [T, D], to [T, D]; where a family has no norm, x itself.

    Source: Zhang and Sennrich, 2019 (RMS norm); Ba, Kiros, Hinton, 2016 (layer norm).
    """
    return x if w is None else w(x)
