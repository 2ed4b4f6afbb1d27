"""The triton kernels behind the protocol of all backends: CUDA devices, and the interpreter on a CPU for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pawl_workers.batch import AttentionLayout, AttentionShape, SequenceArrays
from pawl_workers.kernels.as_computed import AsComputed
from pawl_workers.kernels.reference import ReferenceNorm
from pawl_workers.kernels.triton.experts import TritonExperts
from pawl_workers.kernels.triton.extend import extend
from pawl_workers.kernels.triton.layout import TILE, Layout, lay_out_host
from pawl_workers.kernels.triton.linear import GpuLinear, StrictLinear, WideLinear
from pawl_workers.kernels.triton.paged_decode import decode
from pawl_workers.kernels.triton.place import place
from pawl_workers.kernels.triton.program import TritonProgram
from pawl_workers.kernels.triton.rows import TritonActivation, TritonRmsNorm
from pawl_workers.kernels.triton.sampler import TritonSampler
from pawl_workers.kernels.triton.tuning import Tuning
from pawl_workers.model.packed import NormWeights, PackedActivation, PackedNorm
from pawl_workers.model.spec import Activation, NormKind
from pawl_workers.model.weights import AttentionRule, ExpertWeights, LayerWeights, QueryKeyNormWeights
from pawl_workers.staging import Staging

__all__ = ["TritonKernels"]


class TritonKernels(AsComputed):
    """cuBLAS linears; attention, norms, gates and the rotary turn in Triton; blocks of 64 tokens.

    Args:
        dtype: of the model.
        shape: of its heads.
        staging: carries a step's integers to the device; the layout's tensors hold once it has been sent.
        strict: a token's attention has the same bits from decode and from extend, in any chunking.
    """

    name = "triton"
    block_size = TILE

    def __init__(self, dtype: torch.dtype, shape: AttentionShape, staging: Staging, *, strict: bool = False) -> None:
        super().__init__()
        self.sampler = TritonSampler()
        self._staging, self._strict = staging, strict
        self._tuning = Tuning.of(shape, dtype, strict=strict)

    @property
    def tile_rows(self) -> int:
        """Query rows of an extend tile."""
        return self._tuning.extend_rows

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> StrictLinear:
        """Keep the tensors: kernels take them as they are."""
        return StrictLinear(weight, bias) if self._strict else GpuLinear(weight, bias)

    def pack_head(self, weight: Tensor, bias: Tensor | None) -> WideLinear:
        """The same; scores are not rounded to the model's type."""
        return WideLinear(self.pack_linear(weight, bias))

    def pack_norm(self, weights: NormWeights) -> PackedNorm:
        """RMS norms are compiled, layer norms torch's."""
        if weights.kind is NormKind.RMS:
            return TritonRmsNorm(weights, self._tuning.fuses)
        return ReferenceNorm(weights)

    def pack_activation(self, activation: Activation, *, gated: bool) -> PackedActivation:
        """All are compiled."""
        return TritonActivation(activation, gated, self._tuning.fuses)

    def pack_experts(
        self, up: Tensor, down: Tensor, activate: PackedActivation, num_active: int, *, normalised: bool
    ) -> TritonExperts:
        """Keep the tensors."""
        assert isinstance(activate, TritonActivation)  # noqa: S101 - narrows the type
        return TritonExperts(up, activate, down, num_active, normalised, self._strict)

    def cache_shapes(self, num_blocks: int, shape: AttentionShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Keys and values alike: [num_blocks, K, 64, head_dim]."""
        cache = (num_blocks, shape.num_kv_heads, TILE, shape.head_dim)
        return cache, cache

    def compile_layers(
        self, layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]]
    ) -> TritonProgram | None:
        """Put sums and norms together; layers whose experts are not computed together run stage by stage."""
        if any(isinstance(layer.mlp, ExpertWeights) and layer.mlp.together is None for layer in layers):
            return None
        return TritonProgram(self, layers, caches)

    def lay_out(self, sequences: SequenceArrays, shape: AttentionShape) -> Layout:
        """Tell decodes from extends, cut extends into tiles, and put it all on its way to the device."""
        rows = self._tuning.extend_rows
        split = self._tuning.split(int((sequences.lengths == 1).sum()) * shape.num_kv_heads)
        host = lay_out_host(sequences, rows // (shape.num_heads // shape.num_kv_heads), split)
        put = self._staging.put
        return Layout(
            positions=put(sequences.positions),
            sequence_of_token=put(sequences.sequence_of_token),
            tables=put(sequences.block_tables),
            contexts=put(sequences.contexts),
            decode_rows=put(host.decode_rows),
            decode_sequences=put(host.decode_sequences),
            tiles=put(host.tiles),
            tile_rows=rows,
            split=split,
            num_splits=host.num_splits,
        )

    def place(
        self,
        heads: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        norms: QueryKeyNormWeights | None,
        keys: Tensor,
        values: Tensor,
        layout: AttentionLayout,
    ) -> Tensor:
        """Normalise and turn queries and keys, write keys and values, return the queries."""
        assert isinstance(layout, Layout)  # noqa: S101 - narrows the type
        return place(heads, rotary, norms, keys, values, layout, fuses=self._tuning.fuses)

    def attend(self, q: Tensor, rule: AttentionRule, keys: Tensor, values: Tensor, layout: AttentionLayout) -> Tensor:
        """Attend: one launch for the sequences that decode, one for those that extend."""
        assert isinstance(layout, Layout)  # noqa: S101 - narrows the type
        attended = torch.empty_like(q)
        if layout.decode_rows.shape[0]:
            decode(q, attended, rule, keys, values, layout, self._tuning)
        if layout.tiles.shape[0]:
            extend(q, attended, rule, keys, values, layout, self._tuning)
        return attended
