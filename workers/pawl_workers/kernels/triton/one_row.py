"""Linear layers of a single row: a product is one pass over the weight, and what surrounds it is done on the way.

With one row a layer is bound by the bytes of its weights and by the number of kernels, so the norm before a product,
the gate after it and the sum with the stream have no kernel of their own (as Hazy Research, "No Bubbles", 2025, and
gpt-fast do by other means).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pawl_workers.kernels.triton.rows import TritonActivation, TritonRmsNorm, activated

__all__ = ["add_row", "fire_row", "multiply_row"]

_SHALLOW = 1024


@dataclass(frozen=True, slots=True)
class _Shape:
    """Of a program: columns, numbers of the inner dimension at a time, and stages in which these are loaded."""

    columns: int
    inner: int
    stages: int

    @classmethod
    def of(cls, depth: int) -> _Shape:
        """Measured on an H200 over the layers of models of 0.6 and 8 billion weights, at 4 warps."""
        if depth <= _SHALLOW:
            return cls(2, triton.next_power_of_2(depth), 1)
        return cls(8, 512, 3)


@triton.jit
def _multiply_row(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    norm: tl.tensor,
    y: tl.tensor,
    epsilon: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    column_exists = columns < N
    at_weight = weight + columns.to(tl.int64)[:, None] * K + inner[None, :]
    total = tl.zeros((COLUMNS, INNER), tl.float32)
    ungated = tl.zeros((COLUMNS, INNER), tl.float32)
    squares = tl.zeros((INNER,), tl.float32)
    for begin in tl.range(0, K, INNER, num_stages=STAGES):
        exists = begin + inner < K
        mask = column_exists[:, None] & exists[None, :]
        part = tl.load(x + begin + inner, mask=exists, other=0.0).to(tl.float32)
        if NORM:  # the mean of squares is a factor of the whole row: it is found on the way and applied at the end
            squares += part * part
            part *= tl.load(norm + begin + inner, mask=exists, other=0.0).to(tl.float32)
        total += tl.load(at_weight + begin, mask=mask, other=0.0).to(tl.float32) * part[None, :]
        if GATED:
            up = tl.load(at_weight + N * K + begin, mask=mask, other=0.0).to(tl.float32)
            ungated += up * part[None, :]
    result = tl.sum(total, 1)
    other = tl.sum(ungated, 1)
    if NORM:
        shrink = tl.rsqrt(tl.sum(squares, 0) / K + epsilon)
        result *= shrink
        other *= shrink
    if BIAS:
        result += tl.load(bias + columns, mask=column_exists, other=0.0).to(tl.float32)
        if GATED:
            other += tl.load(bias + N + columns, mask=column_exists, other=0.0).to(tl.float32)
    result = activated(result, KIND)
    if GATED:
        result *= other
    if ADD:
        result = tl.load(y + columns, mask=column_exists, other=0.0).to(tl.float32) + result * scale
    tl.store(y + columns, result.to(y.dtype.element_ty), mask=column_exists)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: TritonRmsNorm | None,
    y: Tensor,
    *,
    scale: float = 1.0,
    gated: bool = False,
    kind: int = -1,
    add: bool = False,
) -> Tensor:
    depth, num_columns = weight.shape[1], y.shape[1]
    shape = _Shape.of(depth)
    _multiply_row[(triton.cdiv(num_columns, shape.columns),)](
        x, weight, x if bias is None else bias, x if norm is None else norm.weights.weight, y,
        0.0 if norm is None else norm.weights.epsilon, scale,
        K=depth, N=num_columns, COLUMNS=shape.columns, INNER=shape.inner, STAGES=shape.stages,
        BIAS=bias is not None, NORM=norm is not None, GATED=gated, KIND=kind, ADD=add, num_warps=4,
    )  # fmt: skip
    return y


def multiply_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, norm: TritonRmsNorm | None = None
) -> Tensor:
    """Multiply one row, [1, K], normalised if so asked, by a weight, [N, K], to [1, N] in `dtype`."""
    return _launch(x, weight, bias, norm, torch.empty(1, weight.shape[0], dtype=dtype, device=x.device))


def fire_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: TritonActivation, norm: TritonRmsNorm | None = None
) -> Tensor:
    """Multiply likewise by gate and up, [2I, K], or by up alone, [I, K], and activate, to [1, I]."""
    width = weight.shape[0] // 2 if activation.gated else weight.shape[0]
    y = torch.empty(1, width, dtype=x.dtype, device=x.device)
    return _launch(x, weight, bias, norm, y, gated=activation.gated, kind=activation.kind)


def add_row(stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Add the product of one row and a weight, times `scale`, to the stream, [1, N], in place."""
    return _launch(x, weight, bias, None, stream, scale=scale, add=True)
