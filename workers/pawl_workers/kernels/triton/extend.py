"""Attention of sequences that compute several tokens: a tile of queries against paged keys, the chunk's own included.

Source: Dao, FlashAttention-2, 2023, over paged KV (Kwon et al., 2023). Tiles and splits of keys are those of
`paged_decode`; with equally many rows a program gives a token the bits that decode gives it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pawl_workers.kernels.triton.layout import SPLIT, TILE, Layout
from pawl_workers.kernels.triton.softmax import attend_tile, merge, normalise
from pawl_workers.kernels.triton.tuning import ScoreTerms, Tuning
from pawl_workers.model.weights import AttentionRule

__all__ = ["extend"]


@triton.jit
def _attend_range(
    q: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    gathered: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    positions: tl.tensor,
    kv_head: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    for first in range(begin, end, TILE):
        at = (tl.load(table + first // TILE).to(tl.int64) * K + kv_head) * (TILE * D)
        top, total, gathered = attend_tile(
            q, top, total, gathered, keys + at, values + at, first, end, positions, scale, cap, window,
            MASKED, WINDOW, SOFTCAP, D, WIDTH, TILE,
        )  # fmt: skip
    return top, total, gathered


@triton.jit(do_not_specialize=["table_width"])
def _attend_tiles(
    q: tl.tensor,
    attended: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    tiles: tl.tensor,
    sinks: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    table_width: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    tile, kv_head = tiles + tl.program_id(0) * 4, tl.program_id(1)
    table = tables + tl.load(tile).to(tl.int64) * table_width
    first_row, first_position, count = tl.load(tile + 1).to(tl.int64), tl.load(tile + 2), tl.load(tile + 3)
    GROUP: tl.constexpr = H // K
    packed = tl.arange(0, ROWS)
    token = packed // GROUP
    rows = (first_row + token) * H + kv_head * GROUP + packed % GROUP
    dims = tl.arange(0, WIDTH)
    active = token < count
    whole = active[:, None] & (dims[None, :] < D)
    queries = tl.load(q + rows[:, None] * D + dims[None, :], mask=whole, other=0.0)
    positions = first_position + token
    end = first_position + count
    begin = 0
    clear = (first_position + 1) // TILE * TILE  # every query of the tile sees all keys before this
    if WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // TILE * TILE
        clear = begin
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    gathered = tl.zeros((ROWS, WIDTH), tl.float32)
    if SPLITS:
        for split in range(begin // SPLIT, tl.cdiv(end, SPLIT)):
            split_begin, split_end = tl.maximum(split * SPLIT, begin), tl.minimum(split * SPLIT + SPLIT, end)
            split_clear = tl.minimum(tl.maximum(clear, split_begin), split_end)
            split_top = tl.full((ROWS,), float("-inf"), tl.float32)
            split_total = tl.zeros((ROWS,), tl.float32)
            split_gathered = tl.zeros((ROWS, WIDTH), tl.float32)
            split_top, split_total, split_gathered = _attend_range(
                queries, split_top, split_total, split_gathered, keys, values, table, split_begin, split_clear,
                positions, kv_head, scale, cap, window, False, WINDOW, SOFTCAP, K, D, WIDTH, TILE,
            )  # fmt: skip
            split_top, split_total, split_gathered = _attend_range(
                queries, split_top, split_total, split_gathered, keys, values, table, split_clear, split_end,
                positions, kv_head, scale, cap, window, True, WINDOW, SOFTCAP, K, D, WIDTH, TILE,
            )  # fmt: skip
            top, total, gathered = merge(top, total, gathered, split_top, split_total, split_gathered)
    else:
        top, total, gathered = _attend_range(
            queries, top, total, gathered, keys, values, table, begin, clear,
            positions, kv_head, scale, cap, window, False, WINDOW, SOFTCAP, K, D, WIDTH, TILE,
        )  # fmt: skip
        top, total, gathered = _attend_range(
            queries, top, total, gathered, keys, values, table, clear, end,
            positions, kv_head, scale, cap, window, True, WINDOW, SOFTCAP, K, D, WIDTH, TILE,
        )  # fmt: skip
    heads = kv_head * GROUP + packed % GROUP
    sink = tl.load(sinks + heads) * 1.4426950408889634 if SINKS else top
    result = normalise(top, total, gathered, sink, SINKS)
    tl.store(attended + rows[:, None] * D + dims[None, :], result.to(attended.dtype.element_ty), mask=whole)


def extend(
    q: Tensor, attended: Tensor, rule: AttentionRule, keys: Tensor, values: Tensor, layout: Layout, tuning: Tuning
) -> None:
    """Attend the tokens of the layout's tiles, q [T, H, D], and write their rows of `attended`, [T, H, D]."""
    _, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    terms = ScoreTerms.of(rule)
    _attend_tiles[(layout.tiles.shape[0], num_kv_heads)](
        q, attended, keys, values, layout.tables, layout.tiles, q if terms.sinks is None else terms.sinks,
        terms.scale, terms.cap, terms.window, layout.tables.shape[1],
        H=num_heads, K=num_kv_heads, D=head_dim, WIDTH=triton.next_power_of_2(max(head_dim, 16)),
        ROWS=layout.tile_rows, TILE=TILE, SPLIT=SPLIT,
        WINDOW=rule.window is not None, SOFTCAP=rule.softcap is not None, SINKS=terms.sinks is not None,
        SPLITS=tuning.extend_splits,
        num_warps=tuning.extend_warps, num_stages=tuning.extend_stages, enable_fp_fusion=tuning.fuses,
    )  # fmt: skip
