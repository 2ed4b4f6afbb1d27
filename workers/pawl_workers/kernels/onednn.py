"""Kernels for a CPU without a compiler: float32, oneDNN prepacked linears, attention by gathered batched products.

The bits of a token's result do not depend on what else is in the step, on chunk boundaries or on the number
of threads. That rows of a oneDNN product do not depend on how many there are is observed (from two rows
on), not promised: the tests hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pawl_workers.batch import AttentionLayout, AttentionShape, SequenceArrays
from pawl_workers.kernels import gathered_attention
from pawl_workers.kernels.as_computed import AsComputed
from pawl_workers.kernels.byte_weights import ByteLinear, ByteScales
from pawl_workers.kernels.reference import ReferenceLinear, ReferenceNorm
from pawl_workers.kernels.rotation import split_and_turn
from pawl_workers.kernels.steady_activation import SteadyActivation
from pawl_workers.kernels.torch_sampler import TorchSampler
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation
from pawl_workers.model.weights import AttentionRule, QueryKeyNormWeights

__all__ = ["OneDnnKernels", "OneDnnLinear"]

_MIN_ROWS = 2  # oneDNN takes another kernel (gemv) for a single row of some shapes


class OneDnnLinear:
    """A linear layer whose weight is laid out for oneDNN's float32 kernels."""

    __slots__ = ("_packed", "bias", "in_features", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)  # noqa: SLF001 - torch's name

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, [T, in] -> [T, out]; a row's bits do not depend on T."""
        num_rows = x.shape[0]
        if num_rows == 0:
            return x.new_empty(0, self.out_features)
        if num_rows < _MIN_ROWS:
            x = functional.pad(x, (0, 0, 0, _MIN_ROWS - num_rows))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")  # noqa: SLF001 - torch's name
        return y[:num_rows]

    @property
    def data_type(self) -> torch.dtype:
        """The type in which the weight is kept."""
        return torch.float32

    @property
    def num_bytes(self) -> int:
        """Memory that the packed weight takes."""
        return self.out_features * self.in_features * 4

    def unpack(self) -> Tensor:
        """Return the weight, [out, in], bit for bit."""
        return self._packed.to_dense()


class OneDnnKernels(AsComputed):
    """oneDNN linears and gathered attention; blocks of 32 tokens."""

    name = "onednn"
    block_size = 32
    sampler = TorchSampler()

    def __init__(self, byte_scales: ByteScales | None = None) -> None:
        super().__init__(byte_scales)
        available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch has no types here
        self._has_onednn = bool(available) and hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> OneDnnLinear | ReferenceLinear | ByteLinear:
        """Pack for oneDNN; without it, keep the tensors (results may then depend on the batch)."""
        pack = OneDnnLinear if self._has_onednn else ReferenceLinear
        return pack(weight, bias) if self._byte_scales is None else ByteLinear(weight, bias, self._byte_scales, pack)

    def pack_head(self, weight: Tensor, bias: Tensor | None) -> OneDnnLinear | ReferenceLinear | ByteLinear:
        """As any other."""
        return self.pack_linear(weight, bias)

    def pack_norm(self, weights: NormWeights) -> ReferenceNorm:
        """Torch's own."""
        return ReferenceNorm(weights)

    def pack_activation(self, activation: Activation, *, gated: bool) -> SteadyActivation:
        """Of operations whose rows are independent."""
        return SteadyActivation(activation, gated)

    def cache_shapes(self, num_blocks: int, shape: AttentionShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Keys and values alike: [num_blocks, K, 32, head_dim]."""
        cache = (num_blocks, shape.num_kv_heads, self.block_size, shape.head_dim)
        return cache, cache

    def lay_out(self, sequences: SequenceArrays, shape: AttentionShape) -> AttentionLayout:
        """Cut the step into query tiles and group those of one size."""
        return gathered_attention.lay_out(sequences, shape, self.block_size)

    def place(
        self,
        heads: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        norms: QueryKeyNormWeights | None,
        keys: Tensor,
        values: Tensor,
        layout: AttentionLayout,
    ) -> Tensor:
        """Normalise and turn queries and keys, copy keys and values to their slots, return the queries."""
        assert isinstance(layout, gathered_attention.Layout)  # noqa: S101 - narrows the type
        q, k, v = split_and_turn(heads, rotary, norms, keys.shape[1])
        head_dim = keys.shape[3]
        keys.view(-1, head_dim).index_copy_(0, layout.slots, k.reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, layout.slots, v.reshape(-1, head_dim))
        return q

    def attend(self, q: Tensor, rule: AttentionRule, keys: Tensor, values: Tensor, layout: AttentionLayout) -> Tensor:
        """Attend each query to all tokens of its sequence up to itself."""
        assert isinstance(layout, gathered_attention.Layout)  # noqa: S101 - narrows the type
        return gathered_attention.attend(q, rule, keys, values, layout)
