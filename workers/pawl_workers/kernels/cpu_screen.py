"""The head of greedy decoding: the best token of a row without most of its logits. See `native/screen.c`."""

from __future__ import annotations

import torch
from torch import Tensor

from pawl_workers.kernels.cpu_linear import CpuLinear, Workspace
from pawl_workers.kernels.native.library import Library
from pawl_workers.kernels.native.structures import ScreenCall
from pawl_workers.kernels.weight_memory import WeightMemory

__all__ = ["CpuHead", "HeadScreen", "can_screen"]

_MOST_INPUTS = 1 << 15  # whose products of bytes add up to 32 bits
_PACKED_AT_ONCE = 1 << 14  # weights, as float32; at least a panel: a head is the largest tensor of all


def can_screen(in_features: int) -> bool:
    """Whether the products of bytes of so many inputs can be added up."""
    return in_features <= _MOST_INPUTS


class HeadScreen:
    """A head once more, in bytes, and for each token how far these may be off."""

    __slots__ = ("_columns", "_shape", "_weights")

    def __init__(self, shape: tuple[int, int], weights: Tensor, columns: Tensor) -> None:
        self._shape, self._weights, self._columns = shape, weights, columns

    @classmethod
    def of(cls, weight: Tensor, library: Library, memory: WeightMemory) -> HeadScreen | None:
        """Round a weight, [V, D]; None where a value of it is not finite, or so large that a logit may not be."""
        features, inputs = weight.shape
        packed = memory.take(library.screen_weight_bytes(features, inputs))
        columns = torch.zeros(library.screen_columns(features))
        packed[-library.screen_weight_bytes(1, inputs) :] = 0  # of two panels, of which the last one may stay empty
        step = max(1, _PACKED_AT_ONCE // inputs // library.panel_width) * library.panel_width
        odd = torch.zeros(1, dtype=torch.int64)
        for first in range(0, features, step):
            part = weight[first : first + step].float().contiguous()
            library.pack_screen(
                part.data_ptr(), packed.data_ptr(), columns.data_ptr(), first, len(part), inputs, odd.data_ptr(),
                torch.get_num_threads(),
            )  # fmt: skip
        return None if odd.item() else cls((features, inputs), packed, columns)

    @staticmethod
    def bytes_of(out_features: int, in_features: int, library: Library) -> int:
        """Memory that the screen of such a head takes."""
        return library.screen_weight_bytes(out_features, in_features) + 4 * library.screen_columns(out_features)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self._weights.nbytes + self._columns.nbytes

    def call(self) -> ScreenCall:
        """The screen as the C structure."""
        features, inputs = self._shape
        return ScreenCall(weights=self._weights.data_ptr(), columns=self._columns.data_ptr(), k=inputs, n=features)


class CpuHead(CpuLinear):
    """The projection to the vocabulary, without a bias; `screen` is None where a weight is not finite or too large."""

    __slots__ = ("screen",)

    def __init__(self, weight: Tensor, library: Library, workspace: Workspace, memory: WeightMemory) -> None:
        super().__init__(weight, None, library, workspace, memory)
        self.screen = HeadScreen.of(weight, library, memory)

    @property
    def num_bytes(self) -> int:
        """Memory that the packed weight and the screen take."""
        return super().num_bytes + (0 if self.screen is None else self.screen.num_bytes)
