"""What backends have in common that keep weights and cache in the type they compute in, and run stage by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pawl_workers.kernels import LayerProgram
from pawl_workers.kernels.byte_weights import ByteScales
from pawl_workers.model.weights import LayerWeights

__all__ = ["AsComputed"]


class AsComputed:
    """One type for everything, but for weights in bytes, and no program of all layers.

    Args:
        byte_scales: weights in bytes, and how they share scales; None = as they are.
    """

    def __init__(self, byte_scales: ByteScales | None = None) -> None:
        self._byte_scales = byte_scales

    def linear_dtype(self, stored: torch.dtype, computed: torch.dtype) -> torch.dtype:
        """The model's own."""
        del stored
        return computed

    def packed_bytes(self, shape: tuple[int, ...], stored: torch.dtype, computed: torch.dtype) -> int:
        """As many as the weight's, or a byte for each value, and the scales."""
        del stored
        if self._byte_scales is not None:
            return math.prod(shape) + self._byte_scales.scale_bytes(shape)
        return math.prod(shape) * computed.itemsize

    def packed_head_bytes(self, shape: tuple[int, ...], stored: torch.dtype, computed: torch.dtype) -> int:
        """As of any other."""
        return self.packed_bytes(shape, stored, computed)

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's own."""
        return dtype

    def compile_layers(
        self, layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]]
    ) -> LayerProgram | None:
        """There is nothing to compile: the stages run one by one."""
        del layers, caches
        return None
