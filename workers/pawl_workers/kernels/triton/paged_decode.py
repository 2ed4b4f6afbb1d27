"""Attention of sequences that compute one token: keys split at fixed positions, splits merged in order.

Source: flash decoding (Dao et al., 2023) over paged KV (Kwon et al., 2023), query heads of a group packed into the rows
of one product (Ainslie et al., 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pawl_workers.kernels.triton.layout import TILE, Layout
from pawl_workers.kernels.triton.softmax import attend_tile, merge, normalise
from pawl_workers.kernels.triton.tuning import ScoreTerms, Tuning
from pawl_workers.model.weights import AttentionRule

__all__ = ["decode"]

_MOST_AT_ONCE = 8192  # numbers of the splits that one program of the merge holds


@triton.jit(do_not_specialize=["table_width", "num_splits"])
def _attend_split(
    q: tl.tensor,
    attended: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    contexts: tl.tensor,
    rows: tl.tensor,
    sequences: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    parts: tl.tensor,
    sinks: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    table_width: tl.tensor,
    num_splits: tl.tensor,
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
    DIRECT: tl.constexpr,
) -> None:
    member, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(sequences + member).to(tl.int64)
    context = tl.load(contexts + sequence)
    begin, end = split * SPLIT, tl.minimum(split * SPLIT + SPLIT, context)
    if WINDOW:
        begin = tl.maximum(begin, tl.maximum(context - window, 0) // TILE * TILE)
    if not DIRECT and begin >= end:
        return
    GROUP: tl.constexpr = H // K
    token = tl.load(rows + member).to(tl.int64)
    packed = tl.arange(0, ROWS)
    heads = kv_head * GROUP + packed
    dims = tl.arange(0, WIDTH)
    active = packed < GROUP
    whole = active[:, None] & (dims[None, :] < D)
    queries = tl.load(q + (token * H + heads[:, None]) * D + dims[None, :], mask=whole, other=0.0)
    positions = tl.zeros((ROWS,), tl.int32) + (context - 1)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    gathered = tl.zeros((ROWS, WIDTH), tl.float32)
    table = tables + sequence * table_width
    for first in range(begin, end, TILE):
        block = tl.load(table + first // TILE).to(tl.int64)
        at = (block * K + kv_head) * (TILE * D)
        top, total, gathered = attend_tile(
            queries, top, total, gathered, keys + at, values + at, first, context, positions, scale, cap, window,
            True, WINDOW, SOFTCAP, D, WIDTH, TILE,
        )  # fmt: skip
    if DIRECT:
        sink = tl.load(sinks + heads, mask=active, other=0.0) * 1.4426950408889634 if SINKS else top
        result = normalise(top, total, gathered, sink, SINKS)
        target = attended + (token * H + heads[:, None]) * D + dims[None, :]
        tl.store(target, result.to(attended.dtype.element_ty), mask=whole)
    else:
        part = (member.to(tl.int64) * H + heads) * num_splits + split
        tl.store(tops + part, top, mask=active)
        tl.store(totals + part, total, mask=active)
        tl.store(parts + part[:, None] * D + dims[None, :], gathered, mask=whole)


@triton.jit(do_not_specialize=["num_splits"])
def _combine_splits(
    attended: tl.tensor,
    contexts: tl.tensor,
    rows: tl.tensor,
    sequences: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    parts: tl.tensor,
    sinks: tl.tensor,
    window: tl.tensor,
    num_splits: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    member, head = tl.program_id(0), tl.program_id(1)
    context = tl.load(contexts + tl.load(sequences + member))
    begin = 0
    if WINDOW:
        begin = tl.maximum(context - window, 0) // TILE * TILE // SPLIT
    one = tl.arange(0, 1)
    dims = tl.arange(0, WIDTH)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    gathered = tl.zeros((1, WIDTH), tl.float32)
    if AT_ONCE > 0:
        splits = tl.arange(0, AT_ONCE)
        exists = (splits >= begin) & (splits * SPLIT < context)
        part = (member.to(tl.int64) * H + head) * num_splits + splits
        mask = exists[:, None] & (dims[None, :] < D)
        found = tl.load(parts + part[:, None] * D + dims[None, :], mask=mask, other=0.0)
        split_tops = tl.load(tops + part, mask=exists, other=float("-inf"))
        top = tl.maximum(top, tl.max(split_tops, 0))
        base = tl.max(tl.where(top == float("-inf"), 0.0, top), 0)
        shares = tl.exp2(split_tops - base)
        total += tl.sum(shares * tl.load(totals + part, mask=exists, other=0.0), 0)
        gathered += tl.sum(found * shares[:, None], 0)[None, :]
    else:
        for split in range(begin, tl.cdiv(context, SPLIT)):
            part = (member.to(tl.int64) * H + head) * num_splits + split + one
            found = tl.load(parts + part[:, None] * D + dims[None, :], mask=dims[None, :] < D, other=0.0)
            top, total, gathered = merge(top, total, gathered, tl.load(tops + part), tl.load(totals + part), found)
    sink = tl.load(sinks + head + one) * 1.4426950408889634 if SINKS else top
    result = normalise(top, total, gathered, sink, SINKS)
    target = attended + (tl.load(rows + member).to(tl.int64) * H + head) * D + dims[None, :]
    tl.store(target, result.to(attended.dtype.element_ty), mask=dims[None, :] < D)


def decode(
    q: Tensor,
    attended: Tensor,
    rule: AttentionRule,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    tuning: Tuning,
) -> None:
    """Attend the layout's single tokens, q [T, H, D], and write their rows of `attended`, [T, H, D].

    A program computes one split of one sequence and one key-value head. How many splits are launched changes no bits:
    a sequence has as many as its own length says.
    """
    num_members, (_, num_heads, head_dim), num_kv_heads = layout.decode_rows.shape[0], q.shape, keys.shape[1]
    num_splits = layout.num_splits
    width = triton.next_power_of_2(max(head_dim, 16))
    terms = ScoreTerms.of(rule)
    direct = num_splits == 1
    num_parts = 0 if direct else num_members * num_heads * num_splits
    scratch = torch.empty(num_parts * (head_dim + 2), dtype=torch.float32, device=q.device)
    tops, totals, parts = torch.split(scratch, [num_parts, num_parts, num_parts * head_dim])
    _attend_split[(num_members, num_kv_heads, num_splits)](
        q, attended, keys, values, layout.tables, layout.contexts, layout.decode_rows, layout.decode_sequences,
        tops, totals, parts, scratch if terms.sinks is None else terms.sinks,
        terms.scale, terms.cap, terms.window, layout.tables.shape[1], num_splits,
        H=num_heads, K=num_kv_heads, D=head_dim, WIDTH=width,
        ROWS=triton.next_power_of_2(max(num_heads // num_kv_heads, 16)), TILE=TILE, SPLIT=layout.split,
        WINDOW=rule.window is not None, SOFTCAP=rule.softcap is not None, SINKS=terms.sinks is not None, DIRECT=direct,
        num_warps=tuning.decode_warps, num_stages=tuning.decode_stages, enable_fp_fusion=tuning.fuses,
    )  # fmt: skip
    if direct:
        return
    at_once = tuning.merges_at_once and num_splits * width <= _MOST_AT_ONCE
    _combine_splits[(num_members, num_heads)](
        attended, layout.contexts, layout.decode_rows, layout.decode_sequences, tops, totals, parts,
        scratch if terms.sinks is None else terms.sinks, terms.window, num_splits,
        H=num_heads, D=head_dim, WIDTH=width, TILE=TILE, SPLIT=layout.split, AT_ONCE=num_splits if at_once else 0,
        WINDOW=rule.window is not None, SINKS=terms.sinks is not None,
        num_warps=4 if at_once else 1, enable_fp_fusion=tuning.fuses,
    )  # fmt: skip
