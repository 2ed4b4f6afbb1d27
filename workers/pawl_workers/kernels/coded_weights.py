"""bfloat16 in 12 bits: exponents by number, the 16 most frequent ones of a layer. See `native/coded.h`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pawl_workers.kernels.native.library import Library

__all__ = ["ExponentCode"]

_DEPTH = 32  # inputs of a tile
_MOST_TILES = 0xFFFE  # of a panel: exceptions number them in 16 bits, and one number is none
_EXPONENTS = 16
_MOST_EXCEPTIONS = 1 / 1024  # of the weights: one in every other tile, each a wait of some ten cycles


@dataclass(frozen=True, slots=True)
class ExponentCode:
    """How a weight, bfloat16 [out, in], is coded.

    Attributes:
        exponents: those that have a number, by that.
        exceptions: weights whose exponents have none.
    """

    exponents: bytes
    exceptions: int

    @classmethod
    def of(cls, weight: Tensor, library: Library) -> ExponentCode | None:
        """Choose the exponents; None if the weight is better left as it is, or these kernels multiply none coded."""
        out_features, in_features = weight.shape
        if not library.multiplies_coded or in_features % _DEPTH or in_features // _DEPTH > _MOST_TILES:
            return None
        counts = torch.empty(256, dtype=torch.int64)
        library.count_exponents(
            weight.data_ptr(), out_features, in_features, weight.stride(0), counts.data_ptr(), torch.get_num_threads()
        )
        most, exponents = counts.topk(_EXPONENTS)
        exceptions = weight.numel() - int(most.sum())
        return cls(bytes(exponents.tolist()), exceptions) if exceptions <= weight.numel() * _MOST_EXCEPTIONS else None

    def packed_bytes(self, out_features: int, in_features: int, panel_width: int) -> int:
        """Memory that panels, exponents and exceptions take."""
        num_panels = -(-out_features // (2 * panel_width)) * 2
        panels = num_panels * panel_width * in_features * 3 // 2
        return panels + 2 * _EXPONENTS * 2 + num_panels * 4 + (num_panels + self.exceptions) * 6

    def pack(self, weight: Tensor, packed: Tensor, library: Library) -> None:
        """Fill memory of `packed_bytes`."""
        library.pack_coded(
            weight.data_ptr(), packed.data_ptr(), *weight.shape, weight.stride(0), self.exponents,
            torch.get_num_threads(),
        )  # fmt: skip

    def unpack(self, packed: Tensor, out_features: int, in_features: int, library: Library) -> Tensor:
        """Return the weight, [out, in], bit for bit, as float32."""
        weight = torch.empty(out_features, in_features)
        library.unpack_coded(packed.data_ptr(), weight.data_ptr(), out_features, in_features, torch.get_num_threads())
        return weight
