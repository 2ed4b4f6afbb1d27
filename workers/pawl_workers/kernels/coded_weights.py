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
_SIGN_AND_FRACTION = 0x807F


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

    def unpack(self, packed: Tensor, out_features: int, in_features: int, panel_width: int) -> Tensor:
        """Return the weight, bfloat16 [out, in], bit for bit."""
        num_panels, depth = -(-out_features // (2 * panel_width)) * 2, in_features // _DEPTH
        panel_bytes = panel_width * in_features * 3 // 2
        tiles = packed[: num_panels * panel_bytes].view(num_panels, depth, -1)
        numbers = _numbers(tiles[:, :, : panel_width * 16]).view(num_panels, depth, 4, 1, 2 * panel_width)
        exponents = torch.tensor(list(self.exponents), dtype=torch.int32) << 7
        coded = exponents[
            numbers >> torch.tensor([0, 4, 8, 12]).view(4, 1) & 15
        ]  # [panels, tiles, 4, 4, features and k]
        rest = tiles[:, :, panel_width * 16 :].contiguous().view(torch.int32).view(num_panels, depth, 8, panel_width)
        turned = rest << 8 | rest >> 24 & 0xFF
        pairs = torch.stack((rest, turned), dim=3).view(torch.int16).view(num_panels, depth, 4, 4, 2 * panel_width)
        values = pairs.to(torch.int32) & _SIGN_AND_FRACTION | coded
        flat = values.to(torch.int16).reshape(num_panels, depth, -1)
        self._put_exceptions(flat, packed[num_panels * panel_bytes + 2 * _EXPONENTS * 2 :])
        weight = flat.view(num_panels, depth, _DEPTH // 2, panel_width, 2).permute(0, 3, 1, 2, 4)
        return weight.reshape(-1, in_features)[:out_features].view(torch.bfloat16)

    def _put_exceptions(self, tiles: Tensor, behind: Tensor) -> None:
        num_panels = tiles.shape[0]
        starts = behind[: num_panels * 4].clone().view(torch.int32).tolist()
        size = (num_panels + self.exceptions) * 6
        exceptions = behind[num_panels * 4 :][:size].clone().view(torch.int16).view(-1, 3)
        for panel, (begin, end) in enumerate(zip(starts, [*starts[1:], len(exceptions)], strict=True)):
            tile, at, value = exceptions[begin : end - 1].unbind(1)  # the last one is of no tile
            tiles[panel, tile.long() & 0xFFFF, at.long() & 0xFFFF] = value


def _numbers(part: Tensor) -> Tensor:
    """Of 16 bits each, without a sign."""
    return part.contiguous().view(torch.int16).long() & 0xFFFF
