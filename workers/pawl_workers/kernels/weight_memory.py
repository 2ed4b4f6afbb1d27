"""Memory that packed weights share, so that they lie in a few large pages and not in many small ones."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

__all__ = ["WeightMemory"]

_CHUNK_BYTES = 32 << 20
_PAGE_BYTES = 2 << 20  # of a large page on x86 and most of the others
_ALIGNMENT = 64


class WeightMemory:
    """Hands out memory piece by piece and takes none back; a chunk is freed with the last tensor that lies in it.

    A step reads every weight once. In pages of 4 KiB it waits for one translation in every 4 KiB, and what processors
    fetch ahead of a read stops where a page ends. Linux is asked for pages of 2 MiB (`madvise`); where it has none
    nothing is lost. Memory that is not handed out is not touched, so it takes address space alone.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Return uint8 [num_bytes] of its own, aligned to 64 bytes."""
        rounded = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if rounded > self._free.numel():
            self._free = _map(max(rounded, _CHUNK_BYTES))
        taken, self._free = self._free[:num_bytes], self._free[rounded:]
        return taken


def _map(num_bytes: int) -> Tensor:
    """Map whole large pages."""
    size = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
    mapped = mmap.mmap(-1, size + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux
    if advice is not None:
        with contextlib.suppress(OSError):  # a Linux that was built without large pages
            mapped.madvise(advice)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE_BYTES
    return memory[start : start + size]
