"""Features ignite: each token's vector is read by many detectors, and those that fire write back."""

from __future__ import annotations

from torch import Tensor

from pawl_workers.model.weights import MlpWeights

__all__ = ["mlp"]


def mlp(x: Tensor, w: MlpWeights) -> Tensor:
    """Expand, activate (times the ungated half when gated), contract: [T, D] -> [T, D].

    Source: Shazeer, "GLU variants improve transformer", 2020, for the gate.
    """
    return w.down(w.activate(w.up(x)))
