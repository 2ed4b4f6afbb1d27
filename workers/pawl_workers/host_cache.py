"""The second tier of the KV cache: blocks in host memory, pinned where a device copies from and to it.

Which host block holds what is the scheduler's business; here they are only copied, on the stream of the forward
pass, so that a plan's moves stand between the steps before and after it without any waiting.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch

from pawl_workers.errors import OutOfMemoryError
from pawl_workers.kv_cache import KvCache
from pawl_workers.memory import available_bytes

__all__ = ["HostCache"]

_BLOCKS_AT_ONCE = 16  # bounds the staging buffer
_NUM_MEASURED = 5


class HostCache:
    """Host blocks 0 to num_blocks - 1 beside the blocks of a cache.

    Raises:
        OutOfMemoryError: the host does not have, or may not pin, so much memory.
    """

    def __init__(self, cache: KvCache, num_blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        self._cache, self._device = cache, device
        shape = (num_blocks, cache.block_elements)
        needed, available = math.prod(shape) * dtype.itemsize, available_bytes(torch.device("cpu"))
        if needed > available:
            raise OutOfMemoryError(
                f"{needed / 1e9:.2f} GB of host KV blocks are asked for, {available / 1e9:.2f} GB of host memory are "
                "available: lower host_kv_bytes"
            )
        try:
            self._blocks = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda" and num_blocks > 0)
        except RuntimeError as error:
            text = f"{needed / 1e9:.2f} GB of host KV blocks cannot be had: {error}. Lower host_kv_bytes"
            raise OutOfMemoryError(text) from error

    @property
    def num_blocks(self) -> int:
        """How many host blocks there are."""
        return len(self._blocks)

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (block, host block) to the host."""
        for begin in range(0, len(pairs), _BLOCKS_AT_ONCE):
            part = pairs[begin : begin + _BLOCKS_AT_ONCE]
            staged = self._cache.gather([block for block, _ in part])
            for contents, (_, host_block) in zip(staged, part, strict=True):
                self._blocks[host_block].copy_(contents, non_blocking=True)

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (host block, block) from the host."""
        for begin in range(0, len(pairs), _BLOCKS_AT_ONCE):
            part = pairs[begin : begin + _BLOCKS_AT_ONCE]
            staged = torch.empty((len(part), self._blocks.shape[1]), dtype=self._blocks.dtype, device=self._device)
            for contents, (host_block, _) in zip(staged, part, strict=True):
                contents.copy_(self._blocks[host_block], non_blocking=True)
            self._cache.scatter([block for _, block in part], staged)

    def measure(self, num_cache_blocks: int) -> tuple[float, float]:
        """Measure what bringing blocks back takes. Overwrites host blocks and cache blocks with what they hold.

        Returns:
            Seconds of a transfer of any size, and seconds of each block in it; medians, from two sizes.
        """
        most = min(self.num_blocks, num_cache_blocks, _BLOCKS_AT_ONCE)
        pairs = [(number, number + 1) for number in range(most)]
        self.swap_out([(block, host_block) for host_block, block in pairs])
        one, many = self._time(pairs[:1]), self._time(pairs)
        per_block = max(0.0, many - one) / (most - 1) if most > 1 else one
        return max(0.0, one - per_block), per_block

    def _time(self, pairs: Sequence[tuple[int, int]]) -> float:
        times = []
        for _ in range(_NUM_MEASURED + 1):
            self._wait()
            started = time.perf_counter()
            self.swap_in(pairs)
            self._wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])  # the first allocates

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
