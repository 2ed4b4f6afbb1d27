"""Which tokens some rows of a step may choose: what an engine hands a worker beside the plan, once it knows.

A plan can be sent before the tokens that its masks depend on are known; the worker asks for the masks after its
forward pass. Plain numbers; imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["MaskSource", "RowMasks"]


@dataclass(frozen=True, slots=True)
class RowMasks:
    """One mask for each of some rows; rows without one may choose any token.

    Attributes:
        rows: distinct rows of the worker's table, [N].
        words: [N, words] uint32, contiguous; bit i of word w stands for token 32 w + i, 1 = allowed. Tokens past the
            last word are not allowed.
    """

    rows: Sequence[int]
    words: NDArray[np.uint32]


MaskSource: TypeAlias = Callable[[], RowMasks]
"""Waits until the masks of a step are known, and gives them. Raises when they never will be: the step is given up."""
