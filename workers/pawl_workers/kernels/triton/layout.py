"""Layout of a step for the GPU kernels: which tokens decode, which extend in tiles, where their blocks lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pawl_workers.batch import AttentionLayout, IntArray, SequenceArrays

__all__ = ["SPLIT", "TILE", "HostLayout", "Layout", "lay_out_host"]

TILE = 64
"""Keys of a tile: one block."""
SPLIT = 512
"""Keys of the longest split; splits begin at absolute positions that are multiples of their length."""


@dataclass(frozen=True, slots=True)
class Layout(AttentionLayout):
    """What all layers of a step share, on the device; all integers are int32.

    Attributes:
        positions: of each token, [T].
        sequence_of_token: [T].
        tables: blocks of each sequence, [S, most blocks].
        contexts: tokens of each sequence after this step, [S]; 0 for a row of padding.
        decode_rows: token rows of the sequences that compute one token, [N].
        decode_sequences: these sequences, [N].
        tiles: sequence, first token row, its position, tokens, [M, 4]; the longest work first.
        tile_rows: query rows of a tile.
        split: keys of a split.
        num_splits: a power of two, at least the splits of the longest sequence that decodes.
    """

    positions: Tensor
    sequence_of_token: Tensor
    tables: Tensor
    contexts: Tensor
    decode_rows: Tensor
    decode_sequences: Tensor
    tiles: Tensor
    tile_rows: int
    split: int
    num_splits: int


@dataclass(frozen=True, slots=True)
class HostLayout:
    """The parts of a `Layout` that the host works out."""

    decode_rows: IntArray
    decode_sequences: IntArray
    tiles: IntArray
    num_splits: int


def lay_out_host(sequences: SequenceArrays, tokens_of_tile: int, split: int = SPLIT) -> HostLayout:
    """Tell sequences that decode from those that extend, and cut the latter into tiles."""
    decodes = np.flatnonzero(sequences.lengths == 1)
    extends = np.flatnonzero(sequences.lengths > 1)
    num_tiles = -(-sequences.lengths[extends] // tokens_of_tile)
    sequence = np.repeat(extends, num_tiles)
    token = (np.arange(len(sequence)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * tokens_of_tile
    tiles = np.empty((len(sequence), 4), dtype=np.int64)
    tiles[:, 0] = sequence
    tiles[:, 1] = sequences.starts[sequence] + token
    tiles[:, 2] = (sequences.contexts - sequences.lengths)[sequence] + token
    tiles[:, 3] = np.minimum(tokens_of_tile, sequences.lengths[sequence] - token)
    # Programs start in this order: a long tile that came last would run alone.
    tiles = tiles[np.argsort(-(tiles[:, 2] + tiles[:, 3]), kind="stable")]
    longest = int(sequences.contexts[decodes].max()) if len(decodes) else 1
    # A power of two: of launches that differ in this number alone, few kinds are to be captured.
    num_splits = 1 << (-(-longest // split) - 1).bit_length()
    return HostLayout(sequences.starts[decodes], decodes, tiles, num_splits)
