"""Dummy weights: random values in the shapes of a configuration, for benchmarks of models that are not at hand.

Never zeros, whose products some machines compute faster, and of the size that training starts from, so that
activations stay finite through any depth.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from pawl_workers.model.headers import StoredTensor

__all__ = ["DUMMY_FILE", "dummy_tensor"]

DUMMY_FILE = Path("dummy weights")
"""Stands in a header for the file that a tensor would come from."""

_PERIOD = (1 << 20) - 3  # prime: rows of no layer repeat each other
_DEVIATION = 0.02
_NORM_DEVIATION = 0.1


def dummy_tensor(stored: StoredTensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Make a tensor of this shape: around 1 with one axis (norms and biases), else around 0."""
    noise = torch.randn(min(_PERIOD, math.prod(stored.shape)), generator=torch.Generator().manual_seed(seed))
    noise = noise + noise.sign() * 1e-3
    values = 1.0 + _NORM_DEVIATION * noise if len(stored.shape) == 1 else _DEVIATION * noise
    repeats = -(-math.prod(stored.shape) // len(values))
    return values.to(dtype).repeat(repeats)[: math.prod(stored.shape)].view(stored.shape)
