"""Linear layers of the CPU kernels: weights in panels, in as few bits as lose nothing, or in bytes when told to."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pawl_workers.kernels.byte_weights import ByteScales
from pawl_workers.kernels.coded_weights import ExponentCode
from pawl_workers.kernels.native.library import Library
from pawl_workers.kernels.native.structures import LinearCall
from pawl_workers.kernels.weight_memory import WeightMemory
from pawl_workers.large_pages import passing_tensor

__all__ = ["NARROW", "CpuLinear", "Workspace", "packed_bytes"]

NARROW = (torch.bfloat16, torch.float16)
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}  # as in linear.h
GROUPS_FORMAT = 4
CODED_FORMAT = 5
_COMPARED_AT_ONCE = 1 << 14  # weights


def _is_exact(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a type holds every value. Compared in parts: a head is the largest tensor of all."""
    step = max(1, _COMPARED_AT_ONCE // weight.shape[1])
    parts = (weight[begin : begin + step] for begin in range(0, weight.shape[0], step))
    return all(torch.equal(part.to(dtype).to(weight.dtype), part) for part in parts)


def packed_bytes(
    out_features: int, in_features: int, dtype: torch.dtype, panel_width: int, scales: ByteScales | None = None
) -> int:
    """Memory that panels take: an even number of them; of bf16 an even number of inputs, of bytes the scales too.

    Of bf16 that is coded, three quarters of this.
    """
    features = -(-out_features // (2 * panel_width)) * 2 * panel_width
    if scales is not None:  # those of groups lie in the panels
        features_scaled = out_features if scales.group is None else features
        return features * in_features + scales.scale_bytes((features_scaled, in_features))
    inputs = in_features + (in_features % 2 if dtype is torch.bfloat16 else 0)
    return features * inputs * dtype.itemsize


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
    bf16 is coded in 12 bits where that can be.
    `byte_scales`: in bytes, and how they share scales.
    """

    __slots__ = (
        "_call",
        "_code",
        "_group",
        "_library",
        "_packed",
        "_wide_bytes",
        "_workspace",
        "bias",
        "data_type",
        "in_features",
        "out_features",
        "scales",
    )  # fmt: skip

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        library: Library,
        workspace: Workspace,
        memory: WeightMemory,
        byte_scales: ByteScales | None = None,
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.float().contiguous()
        self.scales: Tensor | None = None  # of whole output features; those of groups lie in the panels
        self._group = None if byte_scales is None else byte_scales.group
        self._library, self._workspace = library, workspace
        self.data_type = torch.int8 if byte_scales is not None else weight.dtype
        if self.data_type is torch.float32:
            self.data_type = next((dtype for dtype in NARROW if _is_exact(weight, dtype)), torch.float32)
        self._code: ExponentCode | None = None
        if byte_scales is None:
            if self.data_type is not weight.dtype:
                weight = passing_tensor(weight.shape, self.data_type).copy_(weight)
            self._fill(weight.contiguous(), memory)
        else:
            self._fill_bytes(byte_scales, weight, memory)
        self._call = self.call()  # filled in by each step
        self._wide_bytes = library.wide_bytes(self.in_features)

    def _fill(self, source: Tensor, memory: WeightMemory) -> None:
        shape, width = (self.out_features, self.in_features), self._library.panel_width
        if self.data_type is torch.bfloat16:
            self._code = ExponentCode.of(source, self._library)
        if self._code is not None:
            self._packed = memory.take(self._code.packed_bytes(*shape, width))
            self._code.pack(source, self._packed, self._library)
            return
        self._packed = memory.take(packed_bytes(*shape, self.data_type, width))
        self._pack(source)

    def _pack(self, source: Tensor) -> None:
        self._library.pack(
            source.data_ptr(), self._packed.data_ptr(), self.out_features, self.in_features,
            self.in_features * source.element_size(), FORMATS[self.data_type], torch.get_num_threads(),
        )  # fmt: skip

    def _fill_bytes(self, byte_scales: ByteScales, source: Tensor, memory: WeightMemory) -> None:
        shape = (self.out_features, self.in_features)
        num_bytes = packed_bytes(*shape, torch.int8, self._library.panel_width, byte_scales)
        if byte_scales.group is None:
            num_bytes -= byte_scales.scale_bytes(shape)
        self._packed = memory.take(num_bytes)
        weight = byte_scales.quantise(source, passing=True)
        if self._group is None:
            self.scales = weight.scales.squeeze(1)
            self._pack(weight.values.contiguous())
            return
        self._library.pack_groups(
            weight.values.data_ptr(), weight.scales.data_ptr(), self._packed.data_ptr(), self.out_features,
            self.in_features, self._shift, torch.get_num_threads(),
        )  # fmt: skip

    @property
    def _format(self) -> int:
        if self._group is not None:
            return GROUPS_FORMAT
        return FORMATS[self.data_type] if self._code is None else CODED_FORMAT

    @property
    def _shift(self) -> int:
        return 0 if self._group is None else self._group.bit_length() - 1

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
            format=self._format,
            factor=1.0,
            shift=self._shift,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, [T, in] -> [T, out]; a row's bits do not depend on T."""
        if x.stride(1) != 1:
            x = x.contiguous()
        y = torch.empty(x.shape[0], self.out_features)
        if x.shape[0]:
            num_threads, call = torch.get_num_threads(), self._call
            call.x, call.y, call.m, call.x_stride = x.data_ptr(), y.data_ptr(), x.shape[0], x.stride(0)
            wide = self._workspace.address(num_threads * self._wide_bytes)
            self._library.linear(ctypes.addressof(call), wide, num_threads)
        return y

    def unpack(self) -> Tensor:
        """Return the weight, [out, in], bit for bit; of bytes, what they stand for."""
        width = self._library.panel_width
        if self._group is not None:
            return self._unpack_groups(self._group, width)
        if self._code is not None:
            return self._code.unpack(self._packed, self.out_features, self.in_features, self._library)
        if self.data_type is torch.bfloat16:  # [panels, pairs, features, 2]: a pair is turned as one word
            pairs = self._packed.view(torch.int32).view(-1, -(-self.in_features // 2), width)
            values = pairs.transpose(1, 2).reshape(-1, pairs.shape[1]).view(torch.bfloat16)
        else:
            panels = self._packed.view(self.data_type).view(-1, self.in_features, width)
            values = panels.transpose(1, 2).reshape(-1, self.in_features)
        weight = values[: self.out_features, : self.in_features].float()
        return weight if self.scales is None else weight * self.scales.unsqueeze(1)

    def _unpack_groups(self, group: int, width: int) -> Tensor:
        """[panels], each of groups: a scale for each feature, then bytes, [group, features]."""
        num_panels = -(-self.out_features // (2 * width)) * 2
        panels = self._packed.view(num_panels, -1)
        parts, at = [], 0
        for begin in range(0, self.in_features, group):
            height = min(group, self.in_features - begin)
            scales = panels[:, at : at + 4 * width].contiguous().view(torch.float32)
            at += 4 * width
            values = panels[:, at : at + height * width].view(torch.int8).reshape(num_panels, height, width)
            at += height * width
            parts.append(values.transpose(1, 2).float() * scales.unsqueeze(2))
        return torch.cat(parts, dim=2).flatten(0, 1)[: self.out_features]
