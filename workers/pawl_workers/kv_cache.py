"""The KV cache: one pair of block tensors per layer. Who owns which block is the scheduler's business.

Block 0 is the null block: padding reads it and no sequence is given it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pawl_workers.batch import AttentionShape, Batch
from pawl_workers.kernels import CompilesHead, Kernels, LayerProgram, ScoringProgram
from pawl_workers.large_pages import map_large_pages
from pawl_workers.model.spec import ModelSpec
from pawl_workers.model.weights import AttentionWeights, Weights

__all__ = ["KvCache", "LayerCache"]

_ALIGNMENT = 64  # bytes: a line of the caches
_MOST_TOUCHED = 1 << 30  # bytes written to at the start: a fraction of a second


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values: num_blocks + 1 blocks, whose inner layout is the backend's own."""

    keys: Tensor
    values: Tensor
    kernels: Kernels

    def place(self, heads: Tensor, w: AttentionWeights, batch: Batch) -> Tensor:
        """Write the new keys and values of [T, H + 2K, head_dim], and return the queries, [T, H, head_dim].

        Queries and keys are normalised and turned as `w` says.
        """
        rotary = None if w.rotary is None else batch.rotary[w.rotary]
        return self.kernels.place(heads, rotary, w.norms, self.keys, self.values, batch.attention)

    def attend(self, q: Tensor, w: AttentionWeights, batch: Batch) -> Tensor:
        """Attend the step's queries, [T, H, head_dim], to what is written."""
        return self.kernels.attend(q, w.rule, self.keys, self.values, batch.attention)


class KvCache:
    """All layers' blocks. Memory is zero at first and stays finite: kernels weigh hidden keys with 0.

    `program` takes a step through all layers over these blocks in one call, where the backend has compiled one, and
    `scoring` through the head too.
    """

    def __init__(self, layers: tuple[LayerCache, ...]) -> None:
        self._layers = layers
        self.program: LayerProgram | None = None
        self.scoring: ScoringProgram | None = None

    def compile(self, weights: Weights) -> None:
        """Have the backend compile the layers over these blocks, and the head."""
        caches = [(layer.keys, layer.values) for layer in self._layers]
        kernels = self._layers[0].kernels
        self.program = kernels.compile_layers(weights.layers, caches)
        if self.program is not None and isinstance(kernels, CompilesHead):
            self.scoring = kernels.compile_head(self.program, weights)

    @classmethod
    def allocate(
        cls, spec: ModelSpec, kernels: Kernels, num_blocks: int, device: torch.device, dtype: torch.dtype
    ) -> KvCache:
        """Allocate `num_blocks` blocks for sequences (ids 1 to num_blocks) and the null block."""
        shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        keys, values = kernels.cache_shapes(num_blocks + 1, shape)
        dtype = kernels.cache_dtype(dtype)
        tensors = _zeros([keys, values] * spec.num_layers, device, dtype)
        return cls(tuple(LayerCache(*pair, kernels) for pair in zip(tensors[::2], tensors[1::2], strict=True)))

    def __getitem__(self, layer: int) -> LayerCache:
        return self._layers[layer]

    @property
    def block_elements(self) -> int:
        """Elements of one block in all layers, keys and values."""
        return sum(cache[0].numel() for layer in self._layers for cache in (layer.keys, layer.values))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (source, destination) blocks in all layers. No destination is a source or named twice."""
        if not pairs:
            return
        device = self._layers[0].keys.device
        sources, destinations = torch.tensor(pairs, device=device).unbind(1)
        for layer in self._layers:
            for cache in (layer.keys, layer.values):
                cache.index_copy_(0, destinations, cache.index_select(0, sources))

    def gather(self, block_ids: Sequence[int]) -> Tensor:
        """Read blocks, keys and values of each layer one after the other: [blocks, block_elements]."""
        index = torch.tensor(block_ids, device=self._layers[0].keys.device)
        parts = [
            cache.index_select(0, index).flatten(1) for layer in self._layers for cache in (layer.keys, layer.values)
        ]
        return torch.cat(parts, dim=1)

    def scatter(self, block_ids: Sequence[int], contents: Tensor) -> None:
        """Write blocks as `gather` read them, [blocks, block_elements]."""
        index = torch.tensor(block_ids, device=contents.device)
        begin = 0
        for layer in self._layers:
            for cache in (layer.keys, layer.values):
                end = begin + cache[0].numel()
                cache.index_copy_(0, index, contents[:, begin:end].view(-1, *cache.shape[1:]))
                begin = end

    def make_finite(self, block_ids: Iterable[int]) -> None:
        """Replace what is not finite in some blocks by zeros; finite entries keep their bits.

        For the blocks of a failed row: whoever gets them next must not meet NaN behind his last token.
        """
        if not self._layers[0].keys.is_floating_point():
            return  # bytes and their scales are always finite
        index = torch.tensor(sorted(set(block_ids)), device=self._layers[0].keys.device)
        for layer in self._layers:
            for cache in (layer.keys, layer.values):
                cache[index] = torch.nan_to_num(cache[index], nan=0.0, posinf=0.0, neginf=0.0)


def _zeros(shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Zeros, each tensor aligned to 64 bytes; on a CPU all in large pages, which the system gives when they are used.

    The first blocks, which sequences are given first, are used here: else the first requests would wait for pages. To
    write to all of many gigabytes would take seconds of every start.
    """
    if device.type != "cpu":
        return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    starts = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    memory = map_large_pages(starts[-1])
    tensors = [
        memory[start : start + size].view(dtype).view(shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]
    share = min(1.0, _MOST_TOUCHED / max(1, starts[-1]))
    for tensor in tensors:
        tensor[: math.ceil(len(tensor) * share)].zero_()
    return tensors
