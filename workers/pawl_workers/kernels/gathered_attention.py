"""Paged attention on a CPU without a compiled kernel: gather the blocks of like query tiles, then batched products.

A token's bits depend on its sequence alone: queries are cut into tiles and keys into splits at fixed absolute
positions, so every product of a token has the same length in any batch and any chunk. That rows of MKL's
batched products depend neither on the number of products nor on the number of rows, when that is one of
`padded_rows` and values have the columns of `padded_values`, is observed, not promised: the tests hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pawl_workers.batch import AttentionLayout, AttentionShape, IntArray, SequenceArrays
from pawl_workers.model.weights import AttentionRule

__all__ = ["Layout", "attend", "lay_out", "padded_rows", "padded_values"]

_TILE = 64
"""Queries are cut at absolute positions that are multiples of this, and the keys of a tile end with it."""
_SPLIT = 512
"""Keys are taken in splits at absolute positions that are multiples of this, merged in order."""
_ROW_MULTIPLE = 4  # MKL takes other kernels for one to three rows,
_DIMS_PER_ROW = 16  # and, of scores, for fewer rows than about a twentieth of a head's dimensions
_COLUMN_MULTIPLE = 4  # and, on an AMD EPYC, for up to eleven columns that are no multiple of this
_GATHERED_ELEMENTS = 1 << 19  # keys gathered for one product, 2 MiB: they are read back from the cache


@dataclass(frozen=True, slots=True)
class Group:
    """Query tiles with equally many tokens and equally many keys, computed in one batched product.

    Attributes:
        token_rows: their rows in the batch, [N * n].
        num_tiles: N.
        num_tokens: n, tokens of each tile.
        splits: for each split of the keys, the cache rows (block * K + head) to gather, [N * K * blocks].
        positions: of each row's query, [N, 1, rows, 1]; padding counts as at 0.
        hidden: True where one of a tile's last `_TILE` keys lies after the query, [N, 1, rows, _TILE], with
            rows = `padded_rows` of n * H/K.
    """

    token_rows: Tensor
    num_tiles: int
    num_tokens: int
    splits: list[Tensor]
    positions: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class Layout(AttentionLayout):
    """What all layers of a step share. `slots` are rows (block * K + head) * block_size + offset, [T * K]."""

    slots: Tensor
    groups: list[Group]


@dataclass(frozen=True, slots=True)
class _Tiles:
    sequence: IntArray
    first_row: IntArray  # row in the batch of the first token
    first_position: IntArray
    num_tokens: IntArray
    num_keys: IntArray  # a multiple of _TILE


def padded_rows(num_rows: int, head_dim: int) -> int:
    """Rows that a product is given to have the bits of any other number of them."""
    return -(-max(num_rows, -(-head_dim // _DIMS_PER_ROW)) // _ROW_MULTIPLE) * _ROW_MULTIPLE


def padded_values(values: Tensor) -> Tensor:
    """Values, [..., head_dim], with the columns that a product is given to have the same bits in any row."""
    missing = -values.shape[-1] % _COLUMN_MULTIPLE
    return functional.pad(values, (0, missing)) if missing else values


def lay_out(sequences: SequenceArrays, shape: AttentionShape, block_size: int) -> Layout:
    """Cut a step into tiles and group them. Only whole arrays are handled, and a group at a time."""
    heads = np.arange(shape.num_kv_heads)
    blocks = sequences.block_tables[sequences.sequence_of_token, sequences.positions // block_size]
    offsets = sequences.positions % block_size
    slots = (blocks[:, None] * shape.num_kv_heads + heads) * block_size + offsets[:, None]
    tiles = _cut(sequences)
    tables = sequences.block_tables
    missing = int(tiles.num_keys.max()) // block_size - tables.shape[1]
    if missing > 0:  # keys after the last block lie in the null block
        tables = np.pad(tables, ((0, 0), (0, missing)))
    groups = []
    sizes, size_of_tile = np.unique(tiles.num_keys * (_TILE + 1) + tiles.num_tokens, return_inverse=True)
    for size in range(len(sizes)):
        members = np.flatnonzero(size_of_tile == size)
        gathered = shape.num_kv_heads * shape.head_dim * min(int(tiles.num_keys[members[0]]), _SPLIT)
        at_once = max(1, _GATHERED_ELEMENTS // gathered)
        groups += [
            _group(tiles, members[begin : begin + at_once], tables, shape, block_size)
            for begin in range(0, len(members), at_once)
        ]
    return Layout(torch.from_numpy(slots.reshape(-1)), groups)


def _cut(sequences: SequenceArrays) -> _Tiles:
    start = sequences.contexts - sequences.lengths  # position of the first new token
    first_tile, last_tile = start // _TILE, (sequences.contexts - 1) // _TILE
    num_tiles = last_tile - first_tile + 1
    sequence = np.repeat(np.arange(len(start)), num_tiles)
    nth = np.arange(len(sequence)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    tile = first_tile[sequence] + nth
    first_position = np.maximum(tile * _TILE, start[sequence])
    end_position = np.minimum((tile + 1) * _TILE, sequences.contexts[sequence])
    return _Tiles(
        sequence=sequence,
        first_row=sequences.starts[sequence] + first_position - start[sequence],
        first_position=first_position,
        num_tokens=end_position - first_position,
        num_keys=(tile + 1) * _TILE,
    )


def _group(tiles: _Tiles, members: IntArray, tables: IntArray, shape: AttentionShape, block_size: int) -> Group:
    num_tokens, num_keys = int(tiles.num_tokens[members[0]]), int(tiles.num_keys[members[0]])
    group_size = shape.num_heads // shape.num_kv_heads
    nth = np.arange(num_tokens)
    token_rows = tiles.first_row[members][:, None] + nth
    # [N, 1, blocks] * K + [K, 1] -> [N, K, blocks]
    blocks = tables[tiles.sequence[members], : num_keys // block_size]
    rows = blocks[:, None, :] * shape.num_kv_heads + np.arange(shape.num_kv_heads)[:, None]
    per_split = _SPLIT // block_size
    splits = [
        torch.from_numpy(np.ascontiguousarray(rows[:, :, i : i + per_split]).reshape(-1))
        for i in range(0, rows.shape[2], per_split)
    ]
    in_tile = (tiles.first_position[members] % _TILE)[:, None] + nth  # [N, n]
    hidden = np.repeat(in_tile, group_size, axis=1)[:, :, None] < np.arange(_TILE)
    positions = np.repeat(tiles.first_position[members][:, None] + nth, group_size, axis=1)
    num_padding = padded_rows(hidden.shape[1], shape.head_dim) - hidden.shape[1]
    if num_padding:
        hidden = np.pad(hidden, ((0, 0), (0, num_padding), (0, 0)))
        positions = np.pad(positions, ((0, 0), (0, num_padding)))
    return Group(
        token_rows=torch.from_numpy(token_rows.reshape(-1)),
        num_tiles=len(members),
        num_tokens=num_tokens,
        splits=splits,
        positions=torch.from_numpy(positions)[:, None, :, None],
        hidden=torch.from_numpy(hidden).unsqueeze(1),
    )


def attend(q: Tensor, rule: AttentionRule, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """Attend each query to all tokens of its sequence up to itself.

    Args:
        q: queries, [T, H, head_dim] float32, not scaled.
        rule: scale, window, softcap and sinks.
        keys: [num_blocks, K, block_size, head_dim]; finite everywhere, since hidden keys get weight 0.
        values: likewise.
        layout: of this step.

    Returns:
        [T, H, head_dim].

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, for the merge.
    """
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, block_size = keys.shape[1], keys.shape[2]
    group_size = num_heads // num_kv_heads
    q = (q * rule.scale).view(num_queries, num_kv_heads, group_size, head_dim)
    key_rows, value_rows = (cache.view(-1, block_size * head_dim) for cache in (keys, values))
    attended = torch.empty_like(q)
    for group in layout.groups:
        num_tiles, num_tokens = group.num_tiles, group.num_tokens
        num_rows = num_tokens * group_size
        # [N * n, K, H/K, head_dim] -> [N * K, rows, head_dim]
        taken = q.index_select(0, group.token_rows).view(num_tiles, num_tokens, num_kv_heads, group_size, head_dim)
        queries = q.new_zeros(num_tiles, num_kv_heads, group.hidden.shape[2], head_dim)
        queries[:, :, :num_rows].view(num_tiles, num_kv_heads, num_tokens, group_size, head_dim).copy_(
            taken.transpose(1, 2)
        )
        queries = queries.view(num_tiles * num_kv_heads, -1, head_dim)
        sinks = None
        if rule.sinks is not None:  # a row for each query, as queries lie
            per_row = rule.sinks.view(1, num_kv_heads, 1, group_size).expand(num_tiles, -1, num_tokens, -1)
            sinks = functional.pad(per_row.reshape(num_tiles, num_kv_heads, -1), (0, group.hidden.shape[2] - num_rows))
            sinks = sinks.view(num_tiles * num_kv_heads, -1, 1)
        result = _attend_group(queries, rule, sinks, key_rows, value_rows, group, head_dim)
        result = result.view(num_tiles, num_kv_heads, -1, result.shape[-1])[:, :, :num_rows, :head_dim]
        result = result.view(num_tiles, num_kv_heads, num_tokens, group_size, head_dim).transpose(1, 2)
        attended.index_copy_(0, group.token_rows, result.reshape(-1, num_kv_heads, group_size, head_dim))
    return attended.view(num_queries, num_heads, head_dim)


def _attend_group(
    queries: Tensor,
    rule: AttentionRule,
    sinks: Tensor | None,
    key_rows: Tensor,
    value_rows: Tensor,
    group: Group,
    head_dim: int,
) -> Tensor:
    """Give each of the scaled queries, [N * K, rows, head_dim], its result, in columns as of `padded_values`."""
    last = len(group.splits) - 1
    if last == 0 and sinks is None:
        scores, v = _score_split(queries, rule, key_rows, value_rows, group, 0, head_dim)
        return torch.bmm(scores.softmax(dim=-1), v)
    merged = queries.new_zeros(())
    # A split may be hidden whole: the maximum is never infinite, or its distance to itself would be no number.
    total = queries.new_zeros(()) if sinks is None else torch.ones_like(sinks)
    maximum = queries.new_full((), torch.finfo(queries.dtype).min / 4) if sinks is None else sinks
    for i in range(last + 1):
        scores, v = _score_split(queries, rule, key_rows, value_rows, group, i, head_dim)
        new_maximum = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
        kept = (maximum - new_maximum).exp_()
        weights = scores.sub_(new_maximum).exp_()
        merged = torch.bmm(weights, v).add_(merged * kept)
        total = weights.sum(dim=-1, keepdim=True).add_(total * kept)
        maximum = new_maximum
    return merged.div_(total)


def _score_split(
    queries: Tensor,
    rule: AttentionRule,
    key_rows: Tensor,
    value_rows: Tensor,
    group: Group,
    index: int,
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    """Gather one split of the keys and values; return scores, [N * K, rows, keys], and the padded values."""
    k, v = (
        cache.index_select(0, group.splits[index]).view(queries.shape[0], -1, head_dim)
        for cache in (key_rows, value_rows)
    )
    scores = torch.bmm(queries, k.transpose(1, 2))
    if rule.softcap is not None:
        scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
    per_tile = scores.view(group.num_tiles, -1, *scores.shape[1:])
    if rule.window is not None:
        places = torch.arange(index * _SPLIT, index * _SPLIT + scores.shape[2])
        per_tile.masked_fill_(places <= group.positions - rule.window, -torch.inf)
    if index == len(group.splits) - 1:
        per_tile[..., -_TILE:].masked_fill_(group.hidden, -torch.inf)
    return scores, padded_values(v)
