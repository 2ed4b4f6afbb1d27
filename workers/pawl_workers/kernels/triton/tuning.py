"""What the launchers share: launch settings by shape and mode, and the terms of a score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pawl_workers.batch import AttentionShape
from pawl_workers.kernels.triton.layout import SPLIT, TILE
from pawl_workers.model.weights import AttentionRule

__all__ = ["LOG2_E", "ScoreTerms", "Tuning"]

LOG2_E = math.log2(math.e)
_BUSY = 128  # pairs of a sequence and a head that keep a GPU busy with their longest splits
_FEWEST_ROWS = 16  # of a matrix product on tensor cores


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class Tuning:
    """Launch settings. None is found by trial while serving: the same shape gets the same kernels on every machine.

    Attributes:
        decode_warps, decode_stages: of the decode kernel, which is bound by memory.
        extend_rows: query rows (tokens times heads of a group) of an extend tile.
        extend_warps, extend_stages: of the extend kernel.
        extend_splits: extend folds keys split by split, as decode does.
        shortest_split: keys of a split where few sequences decode; long ones come as fast where many do.
        merges_at_once: decode merges all splits of a head at once, not one after the other as extend does.
        fuses: the compiler may fuse a product and a sum into one rounding.
    """

    decode_warps: int
    decode_stages: int
    extend_rows: int
    extend_warps: int
    extend_stages: int
    extend_splits: bool
    shortest_split: int
    merges_at_once: bool
    fuses: bool

    def split(self, num_programs: int) -> int:
        """Keys of a split for so many pairs of a sequence and a key-value head: the fewer, the shorter."""
        return min(max(self.shortest_split, SPLIT * num_programs // _BUSY // TILE * TILE), SPLIT)

    @classmethod
    def of(cls, shape: AttentionShape, dtype: torch.dtype, *, strict: bool) -> Tuning:
        """Settings for a shape of heads; strict ones give a token the same bits from decode and from extend."""
        packed = _power_of_two(max(shape.num_heads // shape.num_kv_heads, _FEWEST_ROWS))
        # Blocks are found through a table, which takes the first stages. Measured on an H200 with heads of 128: 4
        # warps and 2 to 4 stages read at 94 % of the memory's rate, 5 stages leave an SM fewer programs and 10 % less.
        wide = shape.head_dim * dtype.itemsize > 256
        stages = 3 if wide else 4
        # Float32 has no tensor cores to feed: a small tile keeps it in registers. Strict tiles are those of decode.
        small = strict or dtype is torch.float32
        return cls(
            decode_warps=4,
            decode_stages=stages,
            shortest_split=SPLIT if strict else 2 * TILE,
            merges_at_once=not strict,
            extend_rows=packed if small else max(packed, 64 if wide else 128),
            extend_warps=4 if small else 8,
            extend_stages=stages if small or wide else 5,
            extend_splits=strict,
            fuses=not strict,
        )


@dataclass(frozen=True, slots=True)
class ScoreTerms:
    """What a kernel needs of a rule: see `softmax.attend_tile`."""

    scale: float
    cap: float
    window: int
    sinks: Tensor | None

    @classmethod
    def of(cls, rule: AttentionRule) -> ScoreTerms:
        """Fold the logarithm's base, and the softcap, into the scale."""
        if rule.softcap is None:
            return cls(rule.scale * LOG2_E, 0.0, rule.window or 0, rule.sinks)
        return cls(rule.scale / rule.softcap, rule.softcap * LOG2_E, rule.window or 0, rule.sinks)
