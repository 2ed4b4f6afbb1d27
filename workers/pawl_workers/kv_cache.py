"""The KV cache: one pair of block tensors per layer. Who owns which block is the scheduler's business.

Block 0 is the null block: padding reads it and no sequence is given it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pawl_workers.batch import Batch
from pawl_workers.kernels import Kernels
from pawl_workers.model.spec import ModelSpec

__all__ = ["KvCache", "LayerCache"]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values, each [num_blocks + 1, K, block_size, head_dim]."""

    keys: Tensor
    values: Tensor
    kernels: Kernels

    def write(self, k: Tensor, v: Tensor, batch: Batch) -> None:
        """Write the step's new keys and values, each [T, K, head_dim]."""
        self.kernels.write(self.keys, self.values, k, v, batch.attention)

    def attend(self, q: Tensor, batch: Batch) -> Tensor:
        """Attend the step's queries, [T, H, head_dim], to what is written."""
        return self.kernels.attend(q, self.keys, self.values, batch.attention)


class KvCache:
    """All layers' blocks. Memory is zero at first and stays finite: kernels weigh hidden keys with 0."""

    def __init__(self, layers: tuple[LayerCache, ...]) -> None:
        self._layers = layers

    @classmethod
    def allocate(
        cls, spec: ModelSpec, kernels: Kernels, num_blocks: int, device: torch.device, dtype: torch.dtype
    ) -> KvCache:
        """Allocate `num_blocks` blocks for sequences (ids 1 to num_blocks) and the null block."""
        shape = (num_blocks + 1, spec.num_kv_heads, kernels.block_size, spec.head_dim)
        return cls(
            tuple(
                LayerCache(
                    torch.zeros(shape, dtype=dtype, device=device),
                    torch.zeros(shape, dtype=dtype, device=device),
                    kernels,
                )
                for _ in range(spec.num_layers)
            )
        )

    def __getitem__(self, layer: int) -> LayerCache:
        return self._layers[layer]

    def make_finite(self, block_ids: Iterable[int]) -> None:
        """Replace what is not finite in some blocks by zeros; finite entries keep their bits.

        For the blocks of a failed row: whoever gets them next must not meet NaN behind his last token.
        """
        index = torch.tensor(sorted(set(block_ids)), device=self._layers[0].keys.device)
        for layer in self._layers:
            for cache in (layer.keys, layer.values):
                cache[index] = torch.nan_to_num(cache[index], nan=0.0, posinf=0.0, neginf=0.0)
