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
    """A mask for each sample of some rows; rows without one may choose any token.

    Attributes:
        rows: of the worker's table, [N]. A row with drafts stands there once for each of its samples: the first mask is
            that of the token after the last one known, the next that of the token after the first draft, and so on.
        words: [N, words] uint32, contiguous; bit i of word w stands for token 32 w + i, 1 = allowed. Tokens past the
            last word are not allowed.
    """

    rows: Sequence[int]
    words: NDArray[np.uint32]


MaskSource: TypeAlias = Callable[[], RowMasks]
"""Waits until the masks of a step are known, and gives them. Raises when they never will be: the step is given up."""
