"""Memory in a few large pages in place of many small ones, and memory that goes back to the system at once."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

__all__ = ["map_large_pages", "passing_tensor"]

_PAGE_BYTES = 2 << 20  # of a large page on x86 and most of the others
_LEAST_PASSING_BYTES = 128 << 10


def map_large_pages(num_bytes: int) -> Tensor:
    """Map zeroed memory, uint8 [at least num_bytes], aligned to 2 MiB and freed with the last tensor that lies in it.

    In pages of 4 KiB a read waits for one translation in every 4 KiB, and what processors fetch ahead of it stops where
    a page ends. Linux is asked for pages of 2 MiB (`madvise`); where it has none nothing is lost. It gives them to
    private memory: Python's own default is shared memory, which most systems are set to keep in small pages. A page is
    taken, and zeroed, when it is first written to; until then it is address space alone.
    """
    size = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
    mapped = mmap.mmap(-1, size + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux
    if advice is not None:
        with contextlib.suppress(OSError):  # a Linux that was built without large pages
            mapped.madvise(advice)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE_BYTES
    return memory[start : start + size]


def passing_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of a shape, not filled, for values that soon go elsewhere: its memory leaves the process with it.

    malloc keeps what is freed, and puts small tensors that stay into the gaps: then the next tensor of the same size
    does not fit there. Loading 30 layers stored in fp32 left 230 MB of gaps beside 366 MB of weights.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _LEAST_PASSING_BYTES:
        return torch.empty(shape, dtype=dtype)
    return map_large_pages(num_bytes)[:num_bytes].view(dtype).view(shape)
