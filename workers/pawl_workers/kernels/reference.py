"""The reference kernels: plain torch, a sequence at a time, on any device. The oracle for all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pawl_workers.batch import AttentionLayout, AttentionShape, SequenceArrays
from pawl_workers.kernels.as_computed import AsComputed
from pawl_workers.kernels.byte_weights import ByteLinear, ByteScales
from pawl_workers.kernels.rotation import split_and_turn
from pawl_workers.kernels.torch_sampler import TorchSampler
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation, NormKind
from pawl_workers.model.weights import AttentionRule, QueryKeyNormWeights

__all__ = ["ReferenceActivation", "ReferenceKernels", "ReferenceLinear", "ReferenceNorm"]


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """A linear layer as it was stored."""

    weight: Tensor
    bias: Tensor | None

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def data_type(self) -> torch.dtype:
        """The type in which the weight is kept."""
        return self.weight.dtype

    @property
    def num_bytes(self) -> int:
        """Memory that the weight takes."""
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`."""
        return functional.linear(x, self.weight, self.bias)

    def unpack(self) -> Tensor:
        """Return the weight."""
        return self.weight


@dataclass(frozen=True, slots=True)
class ReferenceNorm:
    """RMS norm (Zhang and Sennrich, 2019) or layer norm (Ba, Kiros, Hinton, 2016)."""

    weights: NormWeights

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise each row of x, [T, D], to [T, D]."""
        w = self.weights
        if w.kind is NormKind.RMS:
            return functional.rms_norm(x, w.weight.shape, w.weight, w.epsilon)
        return functional.layer_norm(x, w.weight.shape, w.weight, w.bias, w.epsilon)


@dataclass(frozen=True, slots=True)
class ReferenceActivation:
    """An activation; gated, it multiplies the second half of its input (Shazeer, 2020)."""

    activation: Activation
    gated: bool

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return [T, I] for [T, I], or for [T, 2I] when gated."""
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return self._activate(gate).mul_(up)
        return self._activate(hidden)

    def _activate(self, x: Tensor) -> Tensor:
        match self.activation:
            case Activation.SILU:
                return functional.silu(x)
            case Activation.GELU:
                return functional.gelu(x)
            case Activation.GELU_TANH:
                return functional.gelu(x, approximate="tanh")
            case Activation.RELU:
                return functional.relu(x)


@dataclass(frozen=True, slots=True)
class _Sequence:
    start: int
    length: int
    context: int
    blocks: Tensor  # [ceil(context / block_size)]
    visible: Tensor  # [length, context] bool


@dataclass(frozen=True, slots=True)
class _Layout(AttentionLayout):
    blocks: Tensor  # [T]
    offsets: Tensor  # [T]
    sequences: list[_Sequence]


class ReferenceKernels(AsComputed):
    """Gather, masked softmax in float32, and `F.linear`."""

    name = "reference"
    block_size = 16
    sampler = TorchSampler()

    def __init__(self, device: torch.device, byte_scales: ByteScales | None = None) -> None:
        super().__init__(byte_scales)
        self._device = device

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> ReferenceLinear | ByteLinear:
        """Keep the tensors, or what they are in bytes."""
        if self._byte_scales is not None:
            return ByteLinear(weight, bias, self._byte_scales, ReferenceLinear)
        return ReferenceLinear(weight, bias)

    def pack_head(self, weight: Tensor, bias: Tensor | None) -> ReferenceLinear | ByteLinear:
        """As any other."""
        return self.pack_linear(weight, bias)

    def pack_norm(self, weights: NormWeights) -> ReferenceNorm:
        """Keep the tensors."""
        return ReferenceNorm(weights)

    def pack_activation(self, activation: Activation, *, gated: bool) -> ReferenceActivation:
        """Torch's own."""
        return ReferenceActivation(activation, gated)

    def cache_shapes(self, num_blocks: int, shape: AttentionShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Keys and values alike: [num_blocks, K, 16, head_dim]."""
        cache = (num_blocks, shape.num_kv_heads, self.block_size, shape.head_dim)
        return cache, cache

    def lay_out(self, sequences: SequenceArrays, shape: AttentionShape) -> AttentionLayout:
        """Find each token's slot and each sequence's blocks and mask."""
        del shape  # the cache's own shape says it
        device, size = self._device, self.block_size
        blocks = sequences.block_tables[sequences.sequence_of_token, sequences.positions // size]
        items = []
        tables = torch.from_numpy(sequences.block_tables).to(device)
        for i, (start, length, context) in enumerate(
            zip(sequences.starts.tolist(), sequences.lengths.tolist(), sequences.contexts.tolist(), strict=True)
        ):
            queries = torch.arange(context - length, context, device=device).unsqueeze(1)
            visible = torch.arange(context, device=device).unsqueeze(0) <= queries
            items.append(_Sequence(start, length, context, tables[i, : -(-context // size)], visible))
        offsets = torch.from_numpy(sequences.positions % size).to(device)
        return _Layout(torch.from_numpy(blocks).to(device), offsets, items)

    def place(
        self,
        heads: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        norms: QueryKeyNormWeights | None,
        keys: Tensor,
        values: Tensor,
        layout: AttentionLayout,
    ) -> Tensor:
        """Normalise and turn queries and keys, scatter keys and values to their slots, return the queries."""
        assert isinstance(layout, _Layout)  # noqa: S101 - narrows the type
        q, k, v = split_and_turn(heads, rotary, norms, keys.shape[1])
        keys[layout.blocks, :, layout.offsets] = k
        values[layout.blocks, :, layout.offsets] = v
        return q

    def attend(self, q: Tensor, rule: AttentionRule, keys: Tensor, values: Tensor, layout: AttentionLayout) -> Tensor:
        """Attend, one sequence after the other. Source: Vaswani et al., 2017, equation 1."""
        assert isinstance(layout, _Layout)  # noqa: S101 - narrows the type
        attended = torch.empty_like(q)
        num_heads, num_kv_heads, head_dim = q.shape[1], keys.shape[1], q.shape[2]
        group = num_heads // num_kv_heads
        for item in layout.sequences:
            rows = slice(item.start, item.start + item.length)
            # [blocks, K, block_size, head_dim] -> [K, 1, context, head_dim]
            k, v = (
                cache[item.blocks].transpose(0, 1).reshape(num_kv_heads, 1, -1, head_dim)[:, :, : item.context]
                for cache in (keys, values)
            )
            queries = q[rows].view(item.length, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
            scores = (queries @ k.transpose(2, 3)).float() * rule.scale  # [K, H/K, length, context]
            if rule.softcap is not None:
                scores = (scores / rule.softcap).tanh() * rule.softcap
            visible = item.visible
            if rule.window is not None:
                visible = visible & ~visible.tril(item.context - item.length - rule.window)
            scores = scores.masked_fill(~visible, -torch.inf)
            if rule.sinks is not None:
                sinks = rule.sinks.view(num_kv_heads, group, 1, 1).expand(-1, -1, item.length, 1)
                scores = torch.cat((scores, sinks), dim=-1)
            weights = scores.softmax(dim=-1)[..., : item.context].to(v.dtype)
            attended[rows] = (weights @ v).permute(2, 0, 1, 3).reshape(item.length, num_heads, head_dim)
        return attended
