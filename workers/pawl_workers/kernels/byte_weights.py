"""Weights in bytes: a scale per output feature, or per output feature and group of inputs, and symmetric around 0.

Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
2018, section 2.1, without a zero point; groups as in Shen et al., "Q-BERT", 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pawl_workers.large_pages import passing_tensor
from pawl_workers.model.packed import PackedLinear

__all__ = ["ByteLinear", "ByteScales", "ByteWeight"]

_LARGEST = 127
_AT_ONCE = 1 << 20  # weights that a `ByteLinear` widens at a time
_ROUNDED_AT_ONCE = 1 << 16  # weights that are rounded at a time: in floats a head takes four times its bytes


@dataclass(frozen=True, slots=True)
class ByteWeight:
    """A weight in bytes, [out, in], and its scales, float32 [out, groups]; `group` inputs share one."""

    values: Tensor
    scales: Tensor
    group: int

    def widen(self) -> Tensor:
        """Return what the bytes stand for, float32 [out, in]: each product rounded once."""
        scales = self.scales.repeat_interleave(self.group, dim=1)[:, : self.values.shape[1]]
        return self.values.float() * scales

    def rows(self, begin: int, end: int) -> ByteWeight:
        """Some of its output features."""
        return ByteWeight(self.values[begin:end], self.scales[begin:end], self.group)


@dataclass(frozen=True, slots=True)
class ByteScales:
    """How weights are kept in bytes.

    Attributes:
        group: inputs that share a scale; None = all of an output feature.
    """

    group: int | None = None

    def quantise(self, weight: Tensor, *, passing: bool = False) -> ByteWeight:
        """Round a weight, [out, in], to bytes: the largest of those that share a scale becomes 127.

        Args:
            weight: on any device.
            passing: on a CPU, and the bytes will be packed and dropped.
        """
        num_rows, num_inputs = weight.shape
        group = self.group or num_inputs
        shape, num_whole = (num_rows, num_inputs), num_inputs // group
        values = passing_tensor(shape, torch.int8) if passing else weight.new_empty(shape, dtype=torch.int8)
        scales = weight.new_empty(num_rows, -(-num_inputs // group), dtype=torch.float32)
        spans = [(0, num_whole, group), (num_whole * group, 1, num_inputs % group)]  # a last group may be smaller
        step = min(num_rows, max(1, _ROUNDED_AT_ONCE // num_inputs))
        # All parts in the same memory, which no malloc keeps: among what stays it would leave gaps.
        new = passing_tensor if weight.device.type == "cpu" else weight.new_empty
        parts, sizes = new((2, step, num_inputs), dtype=torch.float32).unbind()
        for begin in range(0, num_rows, step):
            rows = slice(begin, min(begin + step, num_rows))
            part = parts[: rows.stop - begin].copy_(weight[rows])
            for first, count, size in (span for span in spans if span[1] * span[2]):
                inputs, groups = slice(first, first + count * size), slice(first // group, first // group + count)
                grouped = part[:, inputs].view(-1, count, size)
                size_of = torch.abs(grouped, out=sizes[: len(part), inputs].view(-1, count, size))
                scale = size_of.amax(dim=2, keepdim=True) / _LARGEST
                scales[rows, groups] = scale.squeeze(2)
                grouped.div_(scale.masked_fill_(scale == 0, 1.0)).round_()
            values[rows] = part
        return ByteWeight(values, scales, group)

    def scale_bytes(self, shape: tuple[int, ...]) -> int:
        """Memory that the scales of a weight, [out, in], take."""
        return shape[0] * (-(-shape[1] // self.group) if self.group else 1) * torch.float32.itemsize


class ByteLinear:
    """A linear layer in bytes whose backend computes in floats: widened at each call, some features at a time."""

    __slots__ = ("_pack", "_parts", "_weight", "bias", "dtype", "in_features", "out_features")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scales: ByteScales,
        pack: Callable[[Tensor, Tensor | None], PackedLinear],
    ) -> None:
        """`pack` makes the layer that computes, from a weight of this one's type and a bias."""
        self.out_features, self.in_features = weight.shape
        self.bias, self.dtype = bias, weight.dtype
        self._pack, self._weight = pack, scales.quantise(weight)
        step = max(1, _AT_ONCE // self.in_features)
        self._parts = [(begin, min(begin + step, self.out_features)) for begin in range(0, self.out_features, step)]

    @property
    def data_type(self) -> torch.dtype:
        """The type in which the weight is kept."""
        return torch.int8

    @property
    def num_bytes(self) -> int:
        """Memory that bytes and scales take."""
        return self._weight.values.nbytes + self._weight.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, [T, in] -> [T, out]."""
        found = []
        for begin, end in self._parts:
            bias = None if self.bias is None else self.bias[begin:end]
            found.append(self._pack(self._weight.rows(begin, end).widen().to(self.dtype), bias)(x))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def unpack(self) -> Tensor:
        """Return the weight, [out, in], as it is computed with."""
        return self._weight.widen().to(self.dtype)
