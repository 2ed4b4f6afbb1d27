"""What a backend offers that can turn the arrays of a decode step into those of the next one, in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pawl_workers.batch import Batch, IntArray
from pawl_workers.model.rotary import RotaryTable

__all__ = ["DecodeArrays", "DecodeMover", "MovesDecodes"]


@dataclass(frozen=True, slots=True)
class DecodeArrays:
    """A step in which each of S sequences computes its last token and samples one, and what the next one follows from.

    Attributes:
        batch: of the step, on the host.
        rows: of the worker's table, by sequence, [S].
        known: token ids of that table, [rows, longest].
        num_tokens: of these that are known, [rows].
        num_computed: of these whose keys and values are, [rows].
        capacity: tokens that the blocks of each sequence hold, [S]; its owner changes it.
        rotaries: tables of the batch's angles; none where they are not looked up.
    """

    batch: Batch
    rows: IntArray
    known: NDArray[np.int32]
    num_tokens: IntArray
    num_computed: IntArray
    capacity: IntArray
    rotaries: Sequence[RotaryTable]


class DecodeMover(Protocol):
    """Changes the tensors and arrays of one step's batch, and what the table knows of its rows."""

    def append(self, sequence: int, begin: int, block_ids: Sequence[int]) -> bool:
        """Note blocks that a sequence was given, from place `begin` of its table on.

        Returns:
            False where there is no room: then the step must be laid out anew.
        """
        ...

    def note(self, token_ids: IntArray) -> None:
        """Write into the table that each sequence has computed its token and that these, [S], follow."""
        ...

    def move_on(self) -> bool:
        """Turn the batch into that in which each sequence computes the token that it sampled, known by now.

        Returns:
            False where the step must be laid out anew; then no array has changed.
        """
        ...


@runtime_checkable
class MovesDecodes(Protocol):
    """A backend that can."""

    def decode_mover(self, arrays: DecodeArrays) -> DecodeMover | None:
        """Prepare for the steps after this one; None where these arrays are not ones that can be moved."""
        ...
