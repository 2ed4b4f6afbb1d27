"""What changes some samples' logits before the draw, gathered once a step: lists for those that have any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pawl_workers.sampling.batch import IntArray, SamplingBatch, TokenMasks

__all__ = ["Adjustments", "Entries", "gather_adjustments"]

_Lists = Sequence[tuple[IntArray, NDArray[np.float32]] | None]


@dataclass(frozen=True, slots=True)
class Entries:
    """Tokens of each sample with a value each: sample i has entries `starts[i]` to `starts[i + 1]`.

    Attributes:
        starts: [S + 1].
        ids: token ids, [E].
        values: [E] float32.
    """

    starts: IntArray
    ids: IntArray
    values: NDArray[np.float32]

    @classmethod
    def join(cls, lists: _Lists) -> Entries:
        """Put the samples' lists one behind the other; None is an empty one."""
        given = [entries for entries in lists if entries is not None]
        starts = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([0 if entries is None else len(entries[0]) for entries in lists], out=starts[1:])
        if not given:
            return cls(starts, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
        return cls(starts, np.concatenate([ids for ids, _ in given]), np.concatenate([values for _, values in given]))


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Applied in this order to the logits of each sample.

    Attributes:
        seen: tokens of prompt and output. The row's repetition penalty divides a positive logit and multiplies
            another (Keskar et al., CTRL, 2019, section 4.1); then the value, the presence penalty plus the frequency
            penalty for each occurrence in the output (the OpenAI API's definition), is subtracted.
        bias: values to add: the caller's bias, and minus infinity where a token is suppressed.
        masks: tokens to leave, of all.
    """

    seen: Entries
    bias: Entries
    masks: TokenMasks | None


def gather_adjustments(batch: SamplingBatch) -> Adjustments | None:
    """Gather what applies to a batch; None when no logit of it is to be changed."""
    if batch.masks is None and not batch.adjusts:
        return None
    table, rows = batch.table, batch.rows
    adjusted = table.adjusted[rows]
    if batch.masks is None and not adjusted.any():
        return None
    seen: list[tuple[IntArray, NDArray[np.float32]] | None] = [None] * len(rows)
    bias = seen.copy()
    for i in np.flatnonzero(adjusted).tolist():
        row = int(rows[i])
        if row in table.seen:
            drafts = batch.drafts[i]
            drafted = drafts[drafts >= 0].tolist()
            seen[i] = table.seen[row].entries_after(drafted) if drafted else table.seen[row].entries()
        bias[i] = table.bias.get(row)
        if row in table.suppressed and batch.num_output[i] < table.min_output[row]:
            bias[i] = _suppress(bias[i], table.suppressed[row])
    return Adjustments(Entries.join(seen), Entries.join(bias), batch.masks)


def _suppress(bias: tuple[IntArray, NDArray[np.float32]] | None, ids: IntArray) -> tuple[IntArray, NDArray[np.float32]]:
    values = np.full(len(ids), -np.inf, dtype=np.float32)
    if bias is None:
        return ids, values
    return np.concatenate([bias[0], ids]), np.concatenate([bias[1], values])
