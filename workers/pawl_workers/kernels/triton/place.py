"""Queries and keys are normalised and turned, keys and values written to their slots: one kernel, one pass.

Source: Su et al., RoFormer, 2021, section 3.4; Henry et al., 2020 (query-key normalisation); Kwon et al., 2023 (slots).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pawl_workers.kernels.triton.layout import TILE, Layout
from pawl_workers.model.spec import QueryKeyNorm
from pawl_workers.model.weights import QueryKeyNormWeights

__all__ = ["place"]

_ELEMENTS = 2048  # of a program: heads times their padded width


@triton.jit
def _mean_square(
    heads: tl.tensor, first: tl.constexpr, count: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
) -> tl.tensor:
    """Mean of the squares of `count` heads of a token."""
    dims = tl.arange(0, WIDTH)
    total = 0.0
    for begin in range(0, count, ROWS):
        rows = begin + tl.arange(0, ROWS)
        mask = (rows[:, None] < count) & (dims[None, :] < D)
        x = tl.load(heads + (first + rows[:, None]) * D + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tl.sum(x * x, 1), 0)
    return total / (count * D)


@triton.jit(do_not_specialize=["table_width"])
def _place(
    heads: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    positions: tl.tensor,
    sequence_of_token: tl.tensor,
    tables: tl.tensor,
    epsilon: tl.tensor,
    table_width: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # queries, then keys, then values
    dims = tl.arange(0, WIDTH)
    is_query, is_value = rows < H, rows >= H + K
    mask = (rows[:, None] < H + 2 * K) & (dims[None, :] < D)
    own = heads + token * ((H + 2 * K) * D)
    at = rows[:, None] * D
    x = tl.load(own + at + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    shrink = tl.full((ROWS,), 1.0, tl.float32)
    if NORM == 1:  # each head
        shrink = tl.rsqrt(tl.sum(x * x, 1) / D + epsilon)
    if NORM == 2:  # all heads of a token
        of_queries = tl.rsqrt(_mean_square(own, 0, H, D, WIDTH, ROWS) + epsilon)
        of_keys = tl.rsqrt(_mean_square(own, H, K, D, WIDTH, ROWS) + epsilon)
        shrink = tl.where(is_query, of_queries, of_keys)
    shrink = tl.where(is_value, 1.0, shrink)
    turns = mask & ~is_value[:, None]
    of_head = tl.where(is_query, rows, rows - H)[:, None] * D if NORM == 2 else at * 0
    if NORM > 0:
        x *= shrink[:, None] * _norm_weight(query_weight, key_weight, of_head + dims[None, :], turns, is_query[:, None])
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        partner = tl.where(dims < HALF, dims + HALF, dims - HALF)[None, :]
        turns = turns & (dims[None, :] < ROTARY)
        y = tl.load(own + at + partner, mask=turns, other=0.0).to(tl.float32)
        if NORM > 0:
            y *= shrink[:, None] * _norm_weight(query_weight, key_weight, of_head + partner, turns, is_query[:, None])
        cosine = tl.load(cosines + token * ROTARY + dims, mask=dims < ROTARY, other=1.0).to(tl.float32)[None, :]
        sine = tl.load(sines + token * ROTARY + dims, mask=dims < ROTARY, other=0.0).to(tl.float32)[None, :]
        x = tl.where(turns, x * cosine + y * sine, x)
    tl.store(q + token * (H * D) + at + dims[None, :], x.to(q.dtype.element_ty), mask=mask & is_query[:, None])
    position = tl.load(positions + token)
    table = tables + tl.load(sequence_of_token + token).to(tl.int64) * table_width
    block = tl.load(table + position // BLOCK).to(tl.int64)
    kv_head = tl.where(is_value, rows - H - K, rows - H)
    slot = ((block * K + kv_head) * BLOCK + position % BLOCK)[:, None] * D + dims[None, :]
    tl.store(keys + slot, x.to(keys.dtype.element_ty), mask=mask & ~is_query[:, None] & ~is_value[:, None])
    tl.store(values + slot, x.to(values.dtype.element_ty), mask=mask & is_value[:, None])


@triton.jit
def _norm_weight(
    query_weight: tl.tensor, key_weight: tl.tensor, at: tl.tensor, mask: tl.tensor, is_query: tl.tensor
) -> tl.tensor:
    of_query = tl.load(query_weight + at, mask=mask & is_query, other=1.0).to(tl.float32)
    of_key = tl.load(key_weight + at, mask=mask & ~is_query, other=1.0).to(tl.float32)
    return tl.where(is_query, of_query, of_key)


def place(
    heads: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    norms: QueryKeyNormWeights | None,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    *,
    fuses: bool,
) -> Tensor:
    """Split heads [T, H + 2K, D] into queries, returned as [T, H, D], and keys and values, written to the cache."""
    num_tokens, num_rows, head_dim = heads.shape
    num_kv_heads = keys.shape[1]
    num_heads = num_rows - 2 * num_kv_heads
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=heads.dtype, device=heads.device)
    width = triton.next_power_of_2(head_dim)
    rows = min(max(_ELEMENTS // width, 1), triton.next_power_of_2(num_rows))
    cosines, sines = (heads, heads) if rotary is None else rotary
    query_weight, key_weight = (heads, heads) if norms is None else (norms.query, norms.key)
    kind = 0 if norms is None else 1 if norms.kind is QueryKeyNorm.HEAD else 2
    _place[(num_tokens, triton.cdiv(num_rows, rows))](
        heads, cosines, sines, query_weight, key_weight, q, keys, values,
        layout.positions, layout.sequence_of_token, layout.tables,
        0.0 if norms is None else norms.epsilon, layout.tables.shape[1],
        H=num_heads, K=num_kv_heads, D=head_dim, WIDTH=width, ROTARY=0 if rotary is None else cosines.shape[-1],
        NORM=kind, ROWS=rows, BLOCK=TILE, num_warps=4, enable_fp_fusion=fuses,
    )  # fmt: skip
    return q
