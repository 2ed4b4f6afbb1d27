"""How a step's queries are cut into tiles for the CPU attention; where they are cut changes no bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pawl_workers.batch import AttentionLayout, AttentionShape, IntArray, SequenceArrays

__all__ = ["CpuLayout", "lay_out"]

_BLOCK = 32
_SPLIT = 512
_MOST_ROWS = 192  # query rows of a tile, as in attention.h
_LEAST_ROWS = 24  # where tiles are cut no smaller; MOST_PAIR_ROWS in attention.h
_MOST_HEADS = 24  # of a tile
_FIELDS = 7
_SPARE_BLOCKS = 8  # columns of the tables for blocks that sequences will be given
_FAIR = 0.05  # what an end may have more than half of the work
_ITEMS_PER_THREAD = 8  # below, tiles become smaller, and then the splits of long contexts are shared out too


@dataclass(frozen=True, slots=True)
class CpuLayout(AttentionLayout):
    """What all layers of a step share.

    Attributes:
        slots: block * 32 + offset of each token, [T].
        tables: [S, table_stride], zeros behind the blocks of each sequence.
        tiles: sequence, first row, its position, tokens, first head, heads, first pair, [tiles, 7].
        pairs: tile and split, [pairs, 2], where threads share out splits; else None.
        starts: first row of each sequence, [S].
        group: query heads of a key-value head.
    """

    slots: Tensor
    tables: Tensor
    tiles: Tensor
    pairs: Tensor | None
    starts: IntArray
    group: int

    @property
    def table_stride(self) -> int:
        """Blocks of each row of the tables."""
        return self.tables.shape[1]

    def partial_floats(self, num_kv_heads: int, padded: int) -> int:
        """Floats that the results of all pairs take before they are merged."""
        return 0 if self.pairs is None else len(self.pairs) * num_kv_heads * _LEAST_ROWS * (padded + 2)

    def tiles_of(self, rows: IntArray, positions: IntArray) -> Tensor:
        """Cut some rows of the step, [A] increasing, into tiles of one each, where they are rows 0 to A - 1 by now.

        Args:
            rows: which.
            positions: of all rows, [T].
        """
        tiles = _tiles(np.arange(len(rows)), np.ones_like(rows), positions[rows] + 1, self.group, 0)
        tiles[:, 0] = np.searchsorted(self.starts, rows, side="right")[tiles[:, 1]] - 1
        return torch.from_numpy(tiles)


def lay_out(sequences: SequenceArrays, shape: AttentionShape, num_threads: int) -> CpuLayout:
    """Cut the step into tiles of up to 192 query rows: large ones widen fewer blocks, small ones keep threads busy."""
    blocks = sequences.block_tables[sequences.sequence_of_token, sequences.positions // _BLOCK]
    slots = blocks * _BLOCK + sequences.positions % _BLOCK
    least_tiles = num_threads * _ITEMS_PER_THREAD / shape.num_kv_heads
    group = shape.num_heads // shape.num_kv_heads
    tiles = _tiles(sequences.starts, sequences.lengths, sequences.contexts, group, least_tiles)
    num_splits = -(-(tiles[:, 2] + tiles[:, 3]) // _SPLIT)
    pairs = None
    if num_threads > 1 and len(tiles) < least_tiles and int(num_splits.max()) > 1:
        tiles[:, 6] = np.cumsum(num_splits) - num_splits
        tile = np.repeat(np.arange(len(tiles)), num_splits)
        pairs = torch.from_numpy(np.stack((tile, np.arange(len(tile)) - tiles[tile, 6]), axis=1))
    num_sequences, most_blocks = sequences.block_tables.shape
    tables = np.zeros((num_sequences, most_blocks + _SPARE_BLOCKS), dtype=np.int64)
    tables[:, :most_blocks] = sequences.block_tables
    return CpuLayout(
        torch.from_numpy(slots),
        torch.from_numpy(tables),
        torch.from_numpy(tiles),
        pairs,
        sequences.starts,
        group,
    )


def _tiles(starts: IntArray, lengths: IntArray, contexts: IntArray, group: int, least_tiles: float) -> IntArray:
    first_heads = range(0, group, _MOST_HEADS)
    heads = min(group, _MOST_HEADS)
    at_once, least = _MOST_ROWS // heads, _LEAST_ROWS // heads
    num_tiles = -(-lengths // at_once)
    while at_once > least and int(num_tiles.sum()) * len(first_heads) < least_tiles:
        at_once = max(least, at_once // 2)
        num_tiles = -(-lengths // at_once)
    sequence = np.repeat(np.arange(len(num_tiles)), num_tiles)
    token = (np.arange(len(sequence)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * at_once
    parts = []
    for first_head in first_heads:
        tiles = np.zeros((len(sequence), _FIELDS), dtype=np.int64)
        tiles[:, 0] = sequence
        tiles[:, 1] = starts[sequence] + token
        tiles[:, 2] = (contexts - lengths)[sequence] + token
        tiles[:, 3] = np.minimum(at_once, lengths[sequence] - token)
        tiles[:, 4] = first_head
        tiles[:, 5] = min(_MOST_HEADS, group - first_head)
        parts.append(tiles)
    return _from_both_ends(np.concatenate(parts), int(lengths.sum()))


def _from_both_ends(tiles: IntArray, num_rows: int) -> IntArray:
    """Put tiles in the order in which threads take them: from both ends, the longest first, short ones in the middle.

    They are dealt out in turn; but those of decodes so that the first end has the first half of the rows, where that is
    fair: rows are placed from both ends too, and then a thread reads what it wrote itself.
    """
    contexts = tiles[:, 2] + tiles[:, 3]
    longest = np.argsort(-contexts, kind="stable")
    front, back = longest[::2], longest[1::2]
    if int(tiles[:, 3].max()) == 1:
        first = tiles[longest, 1] * 2 < num_rows
        if abs(contexts[longest[first]].sum() / contexts.sum() - 0.5) < _FAIR:
            front, back = longest[first], longest[~first]
    order: IntArray = np.concatenate([front, back[::-1]])
    return tiles[order]
