"""Staging: a step's integers travel to the device in one copy.

They are written to pinned memory as the batch is built, and each gets its view of the device's buffer at once; the
views hold for whatever is queued after `send`. Knows nothing of what the integers mean.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Staging", "send"]

_ALIGNMENT = 32  # int32 elements: 128 bytes, a line of a GPU's cache


class Staging:
    """A device buffer and, on CUDA, two pinned host buffers that take turns.

    Two, so that a step can be written while the copy of the one before is still under way. The same sequence of sizes
    gets the same views in every step, which is what a CUDA graph needs of its inputs.

    Args:
        device: where to. On a CPU a view is its own source.
        capacity: int32 elements; grows between steps, and views of earlier steps then point to the earlier buffer.
    """

    def __init__(self, device: torch.device, capacity: int = 0) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._events = [torch.cuda.Event() for _ in range(2)] if self._pinned else []  # type: ignore[no-untyped-call]
        self._turn = self._used = 0
        self._open = False
        self._allocate(capacity)

    @property
    def capacity(self) -> int:
        """Elements that a step may put."""
        return self._target.numel()

    def _allocate(self, capacity: int) -> None:
        self._target = torch.empty(capacity, dtype=torch.int32, device=self._device)
        if self._pinned:
            self._sources = [torch.empty(capacity, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        else:
            self._sources = [self._target, self._target]
        self._arrays: list[NDArray[np.int32]] = [source.numpy() for source in self._sources]

    @staticmethod
    def elements(*sizes: int) -> int:
        """Elements that puts of these sizes take, with their alignment."""
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)

    def begin(self, capacity: int) -> None:
        """Begin a step that puts at most `capacity` elements, once its buffer's last copy has left."""
        self._turn ^= 1
        if self._pinned:
            self._events[self._turn].synchronize()
        self._used, self._open = 0, True
        if capacity > self.capacity or not self._pinned:  # on a CPU the step before may still be read
            self._allocate(max(capacity, self.capacity))

    def put(self, array: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
        """Write an array, as int32, and return its view on the device, of the same shape.

        Outside of a step (`begin` to `send`) the array is copied by itself.

        Raises:
            ValueError: more is put than was announced.
        """
        if not self._open:
            return torch.from_numpy(array.astype(np.int32)).to(self._device)
        end = self._used + array.size
        if end > self.capacity:
            raise ValueError(f"{end} integers are put into a staging buffer of {self.capacity}")
        self._arrays[self._turn][self._used : end].reshape(array.shape)[...] = array
        view = self._target[self._used : end].view(array.shape)
        self._used = min(self.elements(end), self.capacity)
        return view

    def send(self) -> None:
        """Queue the one copy, on the current stream."""
        self._open = False
        if self._pinned:
            self._target[: self._used].copy_(self._sources[self._turn][: self._used], non_blocking=True)
            self._events[self._turn].record()


def send(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Queue the copy of an array to a device, and do not wait for it; on a CPU the tensor is the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
