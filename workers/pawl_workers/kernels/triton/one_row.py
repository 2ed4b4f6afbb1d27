"""Linear layers of a single row: a product is one pass over the weight, and what surrounds it is done on the way.

With one row a layer is bound by the bytes of its weights and by the number of kernels, so the norm before a product,
the gate after it and the sum with the stream have no kernel of their own (as Hazy Research, "No Bubbles", 2025, and
gpt-fast do by other means).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pawl_workers.kernels.triton.rows import TritonActivation, TritonRmsNorm, activated

__all__ = ["add_expert_rows", "add_row", "fire_expert_rows", "fire_row", "multiply_row"]

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
    chosen: tl.tensor,
    epsilon: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    ROUTED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    column_exists = columns < N
    if ROUTED:  # a row of results for each expert
        weight += tl.load(chosen + tl.program_id(1)).to(tl.int64) * ((2 * N if GATED else N) * K)
        y += tl.program_id(1) * N
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
    chosen: Tensor | None = None,
) -> Tensor:
    depth, num_columns = weight.shape[-1], y.shape[1]
    shape = _Shape.of(depth)
    _multiply_row[(triton.cdiv(num_columns, shape.columns), y.shape[0])](
        x, weight, x if bias is None else bias, x if norm is None else norm.weights.weight, y,
        x if chosen is None else chosen, 0.0 if norm is None else norm.weights.epsilon, scale,
        K=depth, N=num_columns, COLUMNS=shape.columns, INNER=shape.inner, STAGES=shape.stages,
        ROUTED=chosen is not None, BIAS=bias is not None, NORM=norm is not None, GATED=gated, KIND=kind, ADD=add,
        num_warps=4,
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


def fire_expert_rows(
    x: Tensor, weights: Tensor, chosen: Tensor, activation: TritonActivation, norm: TritonRmsNorm | None
) -> Tensor:
    """As `fire_row` by each of one row's experts, `chosen`, [1, A] int32, of weights [E, 2I or I, K], to [A, I]."""
    width = weights.shape[1] // 2 if activation.gated else weights.shape[1]
    y = torch.empty(chosen.shape[1], width, dtype=x.dtype, device=x.device)
    return _launch(x, weights, None, norm, y, gated=activation.gated, kind=activation.kind, chosen=chosen)


@triton.jit
def _add_experts(
    fired: tl.tensor,
    weights: tl.tensor,
    chosen: tl.tensor,
    shares: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    N: tl.constexpr,
    ACTIVE: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    column_exists = columns < N
    at_columns = columns.to(tl.int64)[:, None] * K
    total = tl.zeros((COLUMNS, INNER), tl.float32)
    for place in tl.static_range(ACTIVE):
        share = tl.load(shares + place)
        at_weight = weights + tl.load(chosen + place).to(tl.int64) * (N * K) + at_columns + inner[None, :]
        for begin in tl.range(0, K, INNER, num_stages=STAGES):
            exists = begin + inner < K
            part = tl.load(fired + place * K + begin + inner, mask=exists, other=0.0).to(tl.float32) * share
            mask = column_exists[:, None] & exists[None, :]
            total += tl.load(at_weight + begin, mask=mask, other=0.0).to(tl.float32) * part[None, :]
    result = tl.sum(total, 1)
    if ADD:
        result = tl.load(y + columns, mask=column_exists, other=0.0).to(tl.float32) + result * scale
    tl.store(y + columns, result.to(y.dtype.element_ty), mask=column_exists)


def add_expert_rows(
    y: Tensor, fired: Tensor, weights: Tensor, chosen: Tensor, shares: Tensor, scale: float, *, add: bool
) -> Tensor:
    """Multiply each row of `fired`, [A, I], by its expert's weight, of [E, N, I], and add them up by their shares.

    Args:
        y: [1, N]; written to, or, where `add`, added to, times `scale`.
        fired: in the order of the experts' numbers.
        weights: of all experts.
        chosen: experts, int32, [1, A].
        shares: of each, float32, [1, A].
        scale: of what is added.
        add: whether y holds a stream.
    """
    _, num_columns, depth = weights.shape
    shape = _Shape.of(depth)
    if shape.stages == 1:  # a column of all experts at once is as much as a program loads well: 9.7 us for 11.2 by two
        shape = replace(shape, columns=1)
    _add_experts[(triton.cdiv(num_columns, shape.columns),)](
        fired, weights, chosen, shares, y, scale,
        K=depth, N=num_columns, ACTIVE=chosen.shape[1], COLUMNS=shape.columns, INNER=shape.inner, STAGES=shape.stages,
        ADD=add, num_warps=4,
    )  # fmt: skip
    return y
