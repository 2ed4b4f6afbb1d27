"""Features ignite: each token's vector is read by many detectors, and those that fire write back."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pawl_workers.model.spec import Activation
from pawl_workers.model.weights import MlpWeights

__all__ = ["mlp"]


def mlp(x: Tensor, w: MlpWeights) -> Tensor:
    """Expand, activate (times the ungated half when gated), contract: [T, D] -> [T, D].

    Source: Shazeer, "GLU variants improve transformer", 2020, for the gate.
    """
    hidden = w.up(x)
    if w.gated:
        gate, up = hidden.chunk(2, dim=-1)
        return w.down(_activate(gate, w.activation).mul_(up))
    return w.down(_activate(hidden, w.activation))


def _activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case Activation.SILU:
            return functional.silu(x)
        case Activation.GELU:
            return functional.gelu(x)
        case Activation.GELU_TANH:
            return functional.gelu(x, approximate="tanh")
        case Activation.RELU:
            return functional.relu(x)
