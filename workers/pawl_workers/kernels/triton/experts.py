"""Routed experts on a GPU: all of a layer's at once, without asking which are chosen.

Pairs of a token and an expert are sorted by expert on the device and computed in tiles of one expert each. Where few
rows come, a tile holds all of an expert's, so each chosen expert's weights are read once; a single row needs no tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pawl_workers.kernels.triton.one_row import add_expert_rows, fire_expert_rows
from pawl_workers.kernels.triton.route import Arrangement, arrange, choose
from pawl_workers.kernels.triton.rows import TritonActivation, TritonRmsNorm, activated

__all__ = ["TritonExperts"]

_SUM_BLOCK = 1024


@triton.jit
def _multiply_experts(
    x: tl.tensor,
    weights: tl.tensor,
    tiles: tl.tensor,
    order: tl.tensor,
    y: tl.tensor,
    K: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    FAN: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    num_column_tiles = tl.cdiv(N, COLUMNS)
    tile = tl.program_id(0) // num_column_tiles
    if tile >= tl.load(tiles):
        return
    at_tile = tiles + 4 * (1 + tile)
    expert, begin, count = tl.load(at_tile).to(tl.int64), tl.load(at_tile + 1), tl.load(at_tile + 2)
    places = tl.arange(0, ROWS)
    # Rows and columns that are not there are others' once more: their products are not stored.
    pairs = tl.load(order + begin + tl.minimum(places, count - 1)).to(tl.int64)
    columns = tl.program_id(0) % num_column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    at_x = x + (pairs // FAN)[:, None] * K + inner[None, :]
    at_weight = weights + expert * ((2 * N if GATED else N) * K)
    at_weight += tl.minimum(columns, N - 1).to(tl.int64)[None, :] * K + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    ungated = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in range(0, K, INNER):
        if K % INNER == 0:
            part = tl.load(at_x + depth)
            total = tl.dot(part, tl.load(at_weight + depth), total, input_precision="ieee")
            if GATED:
                ungated = tl.dot(part, tl.load(at_weight + N * K + depth), ungated, input_precision="ieee")
        else:
            exists = depth + inner < K
            part = tl.load(at_x + depth, mask=exists[None, :], other=0.0)
            w = tl.load(at_weight + depth, mask=exists[:, None], other=0.0)
            total = tl.dot(part, w, total, input_precision="ieee")
            if GATED:
                w = tl.load(at_weight + N * K + depth, mask=exists[:, None], other=0.0)
                ungated = tl.dot(part, w, ungated, input_precision="ieee")
    total = activated(total, KIND)
    if GATED:
        total *= ungated
    target = y + pairs[:, None] * N + columns[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=(places < count)[:, None] & (columns < N)[None, :])


@triton.jit
def _sum_experts(
    found: tl.tensor, shares: tl.tensor, y: tl.tensor, D: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row, dims = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = dims < D
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(ACTIVE):
        pair = row * ACTIVE + place
        total += tl.load(found + pair * D + dims, mask=mask, other=0.0).to(tl.float32) * tl.load(shares + pair)
    tl.store(y + row * D + dims, total.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows, columns and inner numbers of a tile, and the warps and stages of its program."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows_of_expert: float, dtype: torch.dtype, *, gated: bool, strict: bool) -> _Tile:
        """By how many rows an expert has on average; strict: by nothing that may differ from step to step.

        Measured on an H200 over layers of 128 experts of 2048 x 768, 8 of them active; those of 64 rows were not.
        """
        if dtype is torch.float32:
            return cls(16 if rows_of_expert <= 8 and not strict else 64, 32, 32, 4, 3)
        if strict:
            return cls(64, 64, 64, 4, 4)
        # Some experts have twice the average: where bytes are what costs, those too should be read for one tile.
        if rows_of_expert <= 16:
            return cls(16 if rows_of_expert <= 8 else 32, 64, 128, 4, 3)
        if rows_of_expert <= 32:
            return cls(64, 64, 64, 4, 4)
        return cls(128, 128, 64, 8, 4) if gated else cls(128, 256, 64, 8, 3)


@dataclass(frozen=True, slots=True)
class TritonExperts:
    """A layer's routed MLPs, whose weights lie one after the other.

    Attributes:
        up: gate above up, [E, 2I, D], or up alone, [E, I, D].
        activation: of all.
        down: [E, D, I].
        num_active: experts of a token.
        normalised: whether the shares of a token add up to 1.
        strict: a row's bits depend on nothing else in the step.
    """

    up: Tensor
    activation: TritonActivation
    down: Tensor
    num_active: int
    normalised: bool
    strict: bool

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        """Compute each token's experts and add them up; see `PackedExperts`."""
        if not x.shape[0]:
            return torch.empty_like(x)
        if self.takes_single_rows and x.shape[0] == 1:
            return self._pass_row(x, scores, None, torch.empty_like(x), 1.0, add=False)
        x = x.contiguous()
        shares, chosen = choose(scores, self.num_active, normalised=self.normalised, fuses=not self.strict)
        num_experts, hidden_size, inner_size = self.down.shape
        rows_of_expert = chosen.numel() / min(num_experts, chosen.numel())
        tile = _Tile.of(rows_of_expert, x.dtype, gated=self.activation.gated, strict=self.strict)
        arranged = arrange(chosen, num_experts, tile.rows)
        fired = torch.empty(chosen.numel(), inner_size, dtype=x.dtype, device=x.device)
        self._multiply(x, self.up, arranged, fired, tile, self.activation)
        found = torch.empty(chosen.numel(), hidden_size, dtype=x.dtype, device=x.device)
        tile = _Tile.of(rows_of_expert, x.dtype, gated=False, strict=self.strict)
        self._multiply(fired, self.down, arranged, found, tile, None)
        y = torch.empty_like(x)
        _sum_experts[(x.shape[0], triton.cdiv(hidden_size, _SUM_BLOCK))](
            found, shares, y, D=hidden_size, ACTIVE=self.num_active, BLOCK=_SUM_BLOCK,
            num_warps=4, enable_fp_fusion=not self.strict,
        )  # fmt: skip
        return y

    @property
    def takes_single_rows(self) -> bool:
        """Whether a single row has kernels of its own."""
        return not self.strict and self.up.dtype is not torch.float32

    def add_row(self, stream: Tensor, scores: Tensor, scale: float, norm: TritonRmsNorm) -> Tensor:
        """Add what the experts of one row, [1, D], normalised, give, times `scale`, to that row in place."""
        return self._pass_row(stream, scores, norm, stream, scale, add=True)

    def _pass_row(
        self, x: Tensor, scores: Tensor, norm: TritonRmsNorm | None, y: Tensor, scale: float, *, add: bool
    ) -> Tensor:
        shares, chosen = choose(scores, self.num_active, normalised=self.normalised, fuses=True)
        fired = fire_expert_rows(x, self.up, chosen, self.activation, norm)
        return add_expert_rows(y, fired, self.down, chosen, shares, scale, add=add)

    def _multiply(
        self, x: Tensor, weights: Tensor, arranged: Arrangement, y: Tensor, tile: _Tile, fires: TritonActivation | None
    ) -> None:
        depth, num_columns = weights.shape[2], y.shape[1]
        _multiply_experts[(arranged.most_tiles * triton.cdiv(num_columns, tile.columns),)](
            x, weights, arranged.tiles, arranged.order, y,
            K=depth, N=num_columns, ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner,
            FAN=1 if fires is None else self.num_active, GATED=fires is not None and fires.gated,
            KIND=-1 if fires is None else fires.kind,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=not self.strict,
        )  # fmt: skip
