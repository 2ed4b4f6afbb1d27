"""Moves the arrays of a decode step on to the next one in a single call of C."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from pawl_workers.batch import IntArray
from pawl_workers.kernels.cpu_layout import CpuLayout
from pawl_workers.kernels.decode_mover import DecodeArrays
from pawl_workers.kernels.native.library import Library
from pawl_workers.kernels.native.structures import MOST_ROTARIES, DecodesCall

__all__ = ["CpuDecodeMover"]


class CpuDecodeMover:
    """See `DecodeMover`. Keeps addresses, and what lies there."""

    def __init__(self, arrays: DecodeArrays, layout: CpuLayout, library: Library) -> None:
        batch, known = arrays.batch, arrays.known
        self._library, self._kept = library, (arrays, layout)
        self._tables = layout.tables.numpy()
        self._call = DecodesCall(
            rows=arrays.rows.ctypes.data,
            known=known.ctypes.data,
            num_tokens=arrays.num_tokens.ctypes.data,
            num_computed=arrays.num_computed.ctypes.data,
            capacity=arrays.capacity.ctypes.data,
            positions=batch.positions.data_ptr(),
            token_ids=batch.token_ids.data_ptr(),
            slots=layout.slots.data_ptr(),
            sampled_at=batch.sampling.positions.ctypes.data,
            num_output=batch.sampling.num_output.ctypes.data,
            tables=layout.tables.data_ptr(),
            tiles=layout.tiles.data_ptr(),
            count=len(arrays.rows),
            num_tiles=len(layout.tiles),
            known_stride=known.shape[1],
            table_stride=layout.table_stride,
            num_rotaries=len(arrays.rotaries),
        )
        for i, (table, (cosines, sines)) in enumerate(zip(arrays.rotaries, batch.rotary, strict=False)):
            self._call.all_cosines[i], self._call.all_sines[i] = table.cosines.data_ptr(), table.sines.data_ptr()
            self._call.cosines[i], self._call.sines[i] = cosines.data_ptr(), sines.data_ptr()
            self._call.turned[i] = cosines.shape[-1]
        self._address = ctypes.addressof(self._call)
        self._noted: IntArray | None = None  # an address takes longer than to write the tokens
        self._noted_address = 0

    @staticmethod
    def can_move(arrays: DecodeArrays) -> bool:
        """Whether there is room for the angles of so many rotary embeddings."""
        return len(arrays.rotaries) <= MOST_ROTARIES

    def append(self, sequence: int, begin: int, block_ids: Sequence[int]) -> bool:
        """Write blocks into a table; False where it has no room for them."""
        end = begin + len(block_ids)
        if end > self._tables.shape[1]:
            return False
        self._tables[sequence, begin:end] = block_ids
        return True

    def note(self, token_ids: IntArray) -> None:
        """See `DecodeMover`."""
        if token_ids is not self._noted:
            self._noted, self._noted_address = token_ids, token_ids.ctypes.data
        self._library.note(self._address, self._noted_address)

    def move_on(self) -> bool:
        """Not where a sequence has no block, or comes to another split of 512 keys."""
        self._library.move_on(self._address)
        return bool(self._call.moved)
