"""Linear layers of the CPU kernels: weights in panels, in as few bits as lose nothing, or in bytes when told to."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pawl_workers.kernels.native.library import Library
from pawl_workers.kernels.native.structures import LinearCall

__all__ = ["NARROW", "CpuLinear", "Workspace", "packed_bytes"]

NARROW = (torch.bfloat16, torch.float16)
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}  # as in linear.h


def _is_exact(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a type holds every value. Compared in parts: a head is the largest tensor of all."""
    parts = (weight[begin : begin + 4096] for begin in range(0, weight.shape[0], 4096))
    return all(torch.equal(part.to(dtype).to(weight.dtype), part) for part in parts)


def _quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes and a scale per output feature: the largest of each becomes 127."""
    scales = weight.abs().amax(dim=1).float() / 127
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight.float() / divisors.unsqueeze(1)).round_().to(torch.int8), scales


def packed_bytes(out_features: int, in_features: int, dtype: torch.dtype, panel_width: int) -> int:
    """Memory that panels take: an even number of them; of bf16, an even number of inputs; of bytes, the scales too."""
    features = -(-out_features // (2 * panel_width)) * 2 * panel_width
    inputs = in_features + (in_features % 2 if dtype is torch.bfloat16 else 0)
    return features * inputs * dtype.itemsize + (out_features * 4 if dtype is torch.int8 else 0)


class Workspace:
    """Memory that kernels share from call to call; one step runs at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def address(self, num_bytes: int) -> int:
        """Where so many bytes are free; aligned to 64."""
        if self._memory.numel() < num_bytes + 64:
            self._memory = torch.empty(num_bytes + 64, dtype=torch.uint8)
        return -(-self._memory.data_ptr() // 64) * 64


class CpuLinear:
    """A linear layer whose weight lies in panels of output features.

    In bf16 or fp16 if it comes so, or if every value is exact in it, which halves the bytes a step reads; else in fp32.
    `quantised`: in bytes with a scale per output feature.
    """

    __slots__ = (
        "_library", "_packed", "_start", "_workspace", "bias", "data_type", "in_features", "out_features", "scales"
    )  # fmt: skip

    def __init__(
        self, weight: Tensor, bias: Tensor | None, library: Library, workspace: Workspace, *, quantised: bool = False
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.float().contiguous()
        self.scales: Tensor | None = None
        self._library, self._workspace = library, workspace
        if quantised:
            self.data_type, (source, self.scales) = torch.int8, _quantise(weight)
        else:
            self.data_type = weight.dtype
            if weight.dtype is torch.float32:
                self.data_type = next((dtype for dtype in NARROW if _is_exact(weight, dtype)), torch.float32)
            source = weight.to(self.data_type)
        source = source.contiguous()
        num_bytes = packed_bytes(self.out_features, self.in_features, self.data_type, library.panel_width)
        num_bytes -= 0 if self.scales is None else self.scales.nbytes
        memory = torch.empty(num_bytes + 63, dtype=torch.uint8)
        self._start = -memory.data_ptr() % 64
        self._packed = memory[self._start : self._start + num_bytes]
        row_bytes = self.in_features * source.element_size()
        library.pack(
            source.data_ptr(), self._packed.data_ptr(), self.out_features, self.in_features, row_bytes,
            FORMATS[self.data_type], torch.get_num_threads(),
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """Memory that the packed weight takes."""
        return self._packed.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def call(self) -> LinearCall:
        """The layer as the C structure, without rows, input and output."""
        return LinearCall(
            weights=self._packed.data_ptr(),
            scales=None if self.scales is None else self.scales.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            k=self.in_features,
            n=self.out_features,
            x_stride=self.in_features,
            y_stride=self.out_features,
            format=FORMATS[self.data_type],
            factor=1.0,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, [T, in] -> [T, out]; a row's bits do not depend on T."""
        if x.stride(1) != 1:
            x = x.contiguous()
        y = torch.empty(x.shape[0], self.out_features)
        if x.shape[0]:
            num_threads, call = torch.get_num_threads(), self.call()
            call.x, call.y, call.m, call.x_stride = x.data_ptr(), y.data_ptr(), x.shape[0], x.stride(0)
            wide = self._workspace.address(num_threads * self._library.wide_bytes(self.in_features))
            self._library.linear(ctypes.byref(call), wide, num_threads)
        return y

    def unpack(self) -> Tensor:
        """Return the weight, [out, in], bit for bit; of bytes, what they stand for."""
        width = self._library.panel_width
        if self.data_type is torch.bfloat16:  # [panels, pairs, features, 2]: a pair is turned as one word
            pairs = self._packed.view(torch.int32).view(-1, -(-self.in_features // 2), width)
            values = pairs.transpose(1, 2).reshape(-1, pairs.shape[1]).view(torch.bfloat16)
        else:
            panels = self._packed.view(self.data_type).view(-1, self.in_features, width)
            values = panels.transpose(1, 2).reshape(-1, self.in_features)
        weight = values[: self.out_features, : self.in_features].float()
        return weight if self.scales is None else weight * self.scales.unsqueeze(1)
