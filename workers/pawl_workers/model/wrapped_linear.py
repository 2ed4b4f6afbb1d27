"""A packed linear layer around another one: what computes, records or shares a layer otherwise derives from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pawl_workers.model.packed import PackedLinear

__all__ = ["WrappedLinear"]


@dataclass(frozen=True, slots=True)
class WrappedLinear:
    """Passes on all that a packed linear layer says of itself; derived classes say how it is applied."""

    linear: PackedLinear

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.linear.out_features

    @property
    def data_type(self) -> torch.dtype:
        """The type in which the weight is kept."""
        return self.linear.data_type

    @property
    def bias(self) -> Tensor | None:
        """The bias, [out]."""
        return self.linear.bias

    @property
    def num_bytes(self) -> int:
        """Memory that the packed weight takes; the wrapper shares it."""
        return self.linear.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, [T, in] -> [T, out]."""
        return self.linear(x)

    def unpack(self) -> Tensor:
        """Return the weight, [out, in], bit for bit as it was packed."""
        return self.linear.unpack()
