"""Vectors are brought to one scale before each block and before the head."""

from __future__ import annotations

from torch import Tensor

from pawl_workers.model.weights import PackedNorm

__all__ = ["norm"]


def norm(x: Tensor, w: PackedNorm) -> Tensor:
    """Normalise each row of x, [T, D], to [T, D].

    Source: Zhang and Sennrich, 2019 (RMS norm); Ba, Kiros, Hinton, 2016 (layer norm).
    """
    return w(x)
