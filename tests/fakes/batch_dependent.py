"""Kernels whose results depend on what else is in the step: what the tests of bit identity have to catch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pawl_workers.model.wrapped_linear import WrappedLinear

__all__ = ["SplitByRows", "TorchLinear"]


@dataclass(frozen=True, slots=True)
class SplitByRows(WrappedLinear):
    """A linear layer that sums over its inputs in one to four parts, by the number of rows that it computes."""

    def __call__(self, x: Tensor) -> Tensor:
        parts = torch.arange(self.in_features).tensor_split(1 + len(x) % 4)
        weight = self.linear.unpack().double()
        products = [functional.linear(x[:, part].double(), weight[:, part]).float() for part in parts]
        found = torch.stack(products).sum(dim=0)
        return found if self.bias is None else found + self.bias


@dataclass(frozen=True, slots=True)
class TorchLinear(WrappedLinear):
    """`F.linear`: the library takes another kernel for a single row."""

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.linear.unpack(), self.linear.bias)
