"""Kernels that take rows of the stream one by one: norm, norm of a sum, activation.

A row's result is computed by one program, in an order that its width fixes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation

__all__ = ["TritonActivation", "TritonRmsNorm", "activated"]

_GATE_BLOCK = 1024
_ACTIVATIONS = {Activation.SILU: 0, Activation.GELU: 1, Activation.GELU_TANH: 2, Activation.RELU: 3}


@triton.jit
def _rms_norm(
    x: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    epsilon: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, WIDTH)
    mask = dims < D
    stream = tl.load(x + row * D + dims, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        stream += tl.load(update + row * D + dims, mask=mask, other=0.0).to(tl.float32) * scale
        rounded = stream.to(x.dtype.element_ty)
        tl.store(x + row * D + dims, rounded, mask=mask)
        stream = rounded.to(tl.float32)  # the norm of what later layers will read
    mean = tl.sum(stream * stream, 0) / D
    normed = stream * tl.rsqrt(mean + epsilon) * tl.load(weight + dims, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * D + dims, normed.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class TritonRmsNorm:
    """RMS norm (Zhang and Sennrich, 2019), alone or of a sum."""

    weights: NormWeights
    fuses: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise each row of x, [T, D], to [T, D]."""
        return self._launch(x.contiguous(), None, 1.0)

    def add(self, x: Tensor, update: Tensor, scale: float = 1.0) -> Tensor:
        """Add `update * scale` to x in place, both [T, D] and contiguous, and normalise the sum."""
        return self._launch(x, update, scale)

    def _launch(self, x: Tensor, update: Tensor | None, scale: float) -> Tensor:
        num_rows, dim = x.shape
        y = torch.empty_like(x)
        if num_rows:
            width = triton.next_power_of_2(dim)
            _rms_norm[(num_rows,)](
                x, x if update is None else update, self.weights.weight, y, self.weights.epsilon, scale,
                D=dim, WIDTH=width, ADD=update is not None,
                num_warps=min(max(width // 512, 1), 16), enable_fp_fusion=self.fuses,
            )  # fmt: skip
        return y


@triton.jit
def activated(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Apply an activation, by its number; others leave x as it is."""
    if KIND == 0:
        x = x / (1.0 + tl.exp2(tl.minimum(-1.4426950408889634 * x, 126.0)))
    elif KIND == 1:
        x = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh by its exponential: x * (1 + tanh) / 2 = x / (1 + e ** (-2 inner))
        x = x / (1.0 + tl.exp2(tl.minimum(-2.8853900817779268 * inner, 126.0)))
    elif KIND == 3:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def _activate(
    hidden: tl.tensor, y: tl.tensor, I: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr
) -> None:
    row, dims = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = dims < I
    at = hidden + row * (2 * I if GATED else I) + dims
    x = activated(tl.load(at, mask=mask, other=0.0).to(tl.float32), KIND)
    if GATED:
        x *= tl.load(at + I, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * I + dims, x.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class TritonActivation:
    """An activation, times the ungated half of its input when gated (Shazeer, 2020)."""

    activation: Activation
    gated: bool
    fuses: bool

    @property
    def kind(self) -> int:
        """Its number in the kernels."""
        return _ACTIVATIONS[self.activation]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return [T, I] for [T, I], or for [T, 2I] when gated."""
        hidden = hidden.contiguous()
        num_rows, width = hidden.shape
        size = width // 2 if self.gated else width
        y = torch.empty(num_rows, size, dtype=hidden.dtype, device=hidden.device)
        if num_rows:
            _activate[(num_rows, triton.cdiv(size, _GATE_BLOCK))](
                hidden, y, I=size, BLOCK=_GATE_BLOCK, KIND=self.kind, GATED=self.gated,
                num_warps=4, enable_fp_fusion=self.fuses,
            )  # fmt: skip
        return y
