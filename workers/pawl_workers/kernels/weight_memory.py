"""Memory that packed weights share, so that they lie in a few large pages and not in many small ones."""

from __future__ import annotations

import torch
from torch import Tensor

from pawl_workers.large_pages import map_large_pages

__all__ = ["WeightMemory"]

_CHUNK_BYTES = 32 << 20
_ALIGNMENT = 64


class WeightMemory:
    """Hands out memory piece by piece and takes none back; a chunk is freed with the last tensor that lies in it.

    A step reads every weight once, which large pages make faster. Memory that is not handed out is not touched, so it
    takes address space alone.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Return uint8 [num_bytes] of its own, aligned to 64 bytes."""
        rounded = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if rounded > self._free.numel():
            self._free = map_large_pages(max(rounded, _CHUNK_BYTES))
        taken, self._free = self._free[:num_bytes], self._free[rounded:]
        return taken
