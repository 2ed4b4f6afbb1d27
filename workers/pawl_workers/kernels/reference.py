"""The reference kernels: plain torch, a sequence at a time, on any device. The oracle for all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pawl_workers.batch import AttentionLayout, AttentionShape, SequenceArrays

__all__ = ["ReferenceKernels", "ReferenceLinear"]


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

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`."""
        return functional.linear(x, self.weight, self.bias)

    def unpack(self) -> Tensor:
        """Return the weight."""
        return self.weight


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


class ReferenceKernels:
    """Gather, masked softmax in float32, and `F.linear`."""

    name = "reference"
    block_size = 16

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> ReferenceLinear:
        """Keep the tensors."""
        return ReferenceLinear(weight, bias)

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

    def write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> None:
        """Scatter k and v, [T, K, head_dim], to their slots."""
        assert isinstance(layout, _Layout)  # noqa: S101 - narrows the type
        keys[layout.blocks, :, layout.offsets] = k
        values[layout.blocks, :, layout.offsets] = v

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, layout: AttentionLayout) -> Tensor:
        """Attend, one sequence after the other. Vaswani et al., 2017, equation 1."""
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
            scores = (queries @ k.transpose(2, 3)).float() * head_dim**-0.5  # [K, H/K, length, context]
            weights = scores.masked_fill(~item.visible, -torch.inf).softmax(dim=-1).to(v.dtype)
            attended[rows] = (weights @ v).permute(2, 0, 1, 3).reshape(item.length, num_heads, head_dim)
        return attended
