"""Linear layers on a GPU: fast by cuBLAS, or strict, with the same bits for any number of rows.

cuBLAS chooses its kernels by the number of rows, and with them the order of its sums: on an H200, even without
workspace, two of seven 16-bit shapes and all float32 ones gave other bits for some numbers of rows. The strict kernel
sums in one order, whatever its tile: the instructions that a tile is made of add 16 numbers of the inner dimension
after another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pawl_workers.kernels.reference import ReferenceLinear
from pawl_workers.kernels.triton.one_row import multiply_row
from pawl_workers.model.wrapped_linear import WrappedLinear

__all__ = ["GpuLinear", "StrictLinear", "WideLinear"]

_GROUP = 8  # tiles of rows that share their columns of the weight in the cache


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    num_rows: tl.tensor,
    K: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    num_tiles, num_column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(N, COLUMNS)
    in_group = GROUP * num_column_tiles
    first = tl.program_id(0) // in_group * GROUP
    height = tl.minimum(num_tiles - first, GROUP)
    place = tl.program_id(0) % in_group
    rows = (first + place % height) * ROWS + tl.arange(0, ROWS)
    columns = place // height * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    row_exists, column_exists = rows < num_rows, columns < N
    at_x = x + rows.to(tl.int64)[:, None] * K + inner[None, :]
    at_weight = weight + columns.to(tl.int64)[None, :] * K + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, K, INNER):
        exists = begin + inner < K
        part = tl.load(at_x + begin, mask=row_exists[:, None] & exists[None, :], other=0.0)
        w = tl.load(at_weight + begin, mask=column_exists[None, :] & exists[:, None], other=0.0)
        total = tl.dot(part, w, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + columns, mask=column_exists, other=0.0).to(tl.float32)[None, :]
    target = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=row_exists[:, None] & column_exists[None, :])


def _tile(num_rows: int, num_columns: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile; rows are those of whole warpgroups."""
    if dtype is torch.float32:
        return 64, 32, 4
    if num_rows > 64:
        return 128, 128, 8
    return 64, 32 if num_columns <= 4096 else 128, 4


@dataclass(frozen=True, slots=True)
class StrictLinear(ReferenceLinear):
    """A linear layer as it was stored, [out, in]; each sum runs over the inner dimension in one order."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, [T, in] -> [T, out]."""
        return self._multiply(x, x.dtype)

    def to_float32(self, x: Tensor) -> Tensor:
        """The same, not rounded to the type of x."""
        return self._multiply(x, torch.float32)

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        num_rows, (out_features, in_features) = x.shape[0], self.weight.shape
        y = torch.empty(num_rows, out_features, dtype=dtype, device=x.device)
        rows, columns, warps = _tile(num_rows, out_features, x.dtype)
        if num_rows:
            _multiply[(triton.cdiv(num_rows, rows) * triton.cdiv(out_features, columns),)](
                x, self.weight, x if self.bias is None else self.bias, y, num_rows,
                K=in_features, N=out_features, ROWS=rows, COLUMNS=columns, INNER=128 // x.element_size(), GROUP=_GROUP,
                BIAS=self.bias is not None, num_warps=warps, num_stages=4, enable_fp_fusion=False,
            )  # fmt: skip
        return y


@dataclass(frozen=True, slots=True)
class GpuLinear(StrictLinear):
    """The same by the kernels that are fastest: sums of a row depend on the number of rows."""

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.shape[0] == 1 and x.dtype is not torch.float32:
            return multiply_row(x.contiguous(), self.weight, self.bias, dtype)
        if dtype is x.dtype:
            return functional.linear(x, self.weight, self.bias)
        if not x.is_cuda:
            return functional.linear(x, self.weight, self.bias).to(dtype)
        y = torch.mm(x, self.weight.T, out_dtype=dtype)
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True, slots=True)
class WideLinear(WrappedLinear):
    """A linear layer whose results stay in float32: the head, of whose scores the difference counts."""

    linear: StrictLinear

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, [T, in] -> [T, out] float32."""
        return self.linear.to_float32(x)
