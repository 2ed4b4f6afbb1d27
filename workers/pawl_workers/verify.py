"""Which of a step's samples count: those after drafts that are what was sampled.

A sequence gives the tokens that it gives without drafts, to the bit: each position is sampled from its own logits with
its own noise, and a draft changes only what is computed early. Source of the idea: Leviathan, Kalman, Matias, "Fast
inference from transformers via speculative decoding", ICML 2023; here a draft is accepted when it equals the sample,
which needs no ratio of distributions, since the noise of a position is fixed.
"""

from __future__ import annotations

import numpy as np

from pawl_workers.batch import IntArray, SamplingBatch
from pawl_workers.rows import RowTable

__all__ = ["append_accepted", "find_accepted"]


def find_accepted(token_ids: IntArray, sampling: SamplingBatch, table: RowTable) -> IntArray:
    """Find the samples that count.

    Args:
        token_ids: what was sampled, [S]; negative where nothing could be.
        sampling: of the step, the samples of a row one after the other.
        table: the rows, with their drafts and without what was sampled.

    Returns:
        Their indices, in order: of each row the first sample, unless it is negative, and those after it as long as the
        token drafted for the position before is what was sampled there.
    """
    rows, positions = sampling.rows, sampling.positions
    first = positions == table.num_tokens[rows]
    # A sample counts if all before it in its row count, and the last of them is the draft that stands in its place.
    broken = token_ids < 0
    broken[1:] |= ~first[1:] & (token_ids[:-1] != table.token_ids[rows, positions - 1][1:])
    num_broken = np.cumsum(broken)
    before = np.maximum.accumulate(np.where(first, num_broken - broken, 0))
    return np.flatnonzero(num_broken == before)


def append_accepted(table: RowTable, rows: IntArray, token_ids: IntArray, offsets: IntArray) -> None:
    """Append accepted tokens, several to a row; the KV of all but the last of each row is there.

    Args:
        table: the rows.
        rows: of each token.
        token_ids: in the order of their positions within each row.
        offsets: how many of its row stand before each token.
    """
    for offset in range(int(offsets.max(initial=-1)) + 1):
        at = offsets == offset
        table.append_tokens(rows[at], token_ids[at])
    table.num_computed[rows] = table.num_tokens[rows] - 1
