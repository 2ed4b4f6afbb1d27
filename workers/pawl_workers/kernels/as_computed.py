"""What backends have in common that keep weights and cache in the type they compute in, and run stage by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pawl_workers.model.weights import LayerWeights

__all__ = ["AsComputed"]


class AsComputed:
    """One type for everything, and no program of all layers."""

    def linear_dtype(self, stored: torch.dtype, computed: torch.dtype) -> torch.dtype:
        """The model's own."""
        del stored
        return computed

    def packed_bytes(self, shape: tuple[int, ...], stored: torch.dtype, computed: torch.dtype) -> int:
        """As many as the weight's."""
        del stored
        return math.prod(shape) * computed.itemsize

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's own."""
        return dtype

    def compile_layers(self, layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """There is nothing to compile: the stages run one by one."""
        del layers, caches
