"""Activations whose rows depend on nothing but themselves, from torch's operations.

Torch computes `silu` and `gelu` in vectors and what is left over one by one, by other approximations: a value's bits
then depend on where it lies, and so on the rows before it. Its `exp`, `tanh` and `erf` compute what is
left over as a vector too, and the other operations here round once, which leaves no choice. The tests hold it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from pawl_workers.model.spec import Activation

__all__ = ["SteadyActivation", "steady_sigmoid"]


@dataclass(frozen=True, slots=True)
class SteadyActivation:
    """An activation; gated, it multiplies the second half of its input (Shazeer, 2020)."""

    activation: Activation
    gated: bool

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return [T, I] for [T, I], or for [T, 2I] when gated."""
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return self._activate(gate.contiguous()).mul_(up)
        return self._activate(hidden)

    def _activate(self, x: Tensor) -> Tensor:
        match self.activation:
            case Activation.SILU:
                return x / x.neg().exp_().add_(1.0)
            case Activation.GELU:
                return (x * math.sqrt(0.5)).erf_().add_(1.0).mul_(x).mul_(0.5)  # Hendrycks and Gimpel, 2016
            case Activation.GELU_TANH:
                return _gelu_tanh(x)
            case Activation.RELU:
                return functional.relu(x)


def steady_sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), of each value alone."""
    return x.neg().exp_().add_(1.0).reciprocal_()


def _gelu_tanh(x: Tensor) -> Tensor:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))). Source: Hendrycks and Gimpel, 2016, section 2."""
    inner = x.square().mul_(0.044715).add_(1.0).mul_(x).mul_(math.sqrt(2.0 / math.pi))
    return inner.tanh_().add_(1.0).mul_(x).mul_(0.5)
