"""Vectors are brought to one scale before each block and before the head."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pawl_workers.model.spec import NormKind
from pawl_workers.model.weights import NormWeights

__all__ = ["norm"]


def norm(x: Tensor, w: NormWeights) -> Tensor:
    """Normalise each row of x, [T, D], to [T, D].

    Source: Zhang and Sennrich, 2019 (RMS norm); Ba, Kiros, Hinton, 2016 (layer norm).
    """
    shape = w.weight.shape
    if w.kind is NormKind.RMS:
        return functional.rms_norm(x, shape, w.weight, w.epsilon)
    return functional.layer_norm(x, shape, w.weight, w.bias, w.epsilon)
