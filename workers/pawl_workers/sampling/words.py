"""The parameters of samples as 64-bit words, for kernels that read them on a device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pawl_workers.sampling.table import SamplingTable

__all__ = ["WORDS", "parameter_words"]

WORDS = 6
"""Temperature, top-p and min-p (float64), top-k, seed, position (integers)."""


def parameter_words(table: SamplingTable, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Gather the parameters of some rows, [S, WORDS]; floats and unsigned seeds by their bits."""
    words = np.empty((len(rows), WORDS), dtype=np.int64)
    for column, values in enumerate((table.temperature, table.top_p, table.min_p)):
        words[:, column] = values[rows].view(np.int64)
    words[:, 3] = table.top_k[rows]
    words[:, 4] = table.seed[rows].view(np.int64)
    words[:, 5] = positions
    return words
