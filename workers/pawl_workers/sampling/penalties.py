"""Which tokens a row has seen, and what each one's penalty subtracts: kept, and changed by one token a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["SeenTokens"]

_ROOM = 64


class SeenTokens:
    """Distinct tokens of a row, with the offset that presence and frequency subtract from each one's logit.

    The prompt's tokens count for the repetition penalty alone: their offset is 0 until they are output. An offset
    is worked out from the count, so that a row that is sent whole again has the same bits.
    """

    __slots__ = ("_counts", "_frequency", "_ids", "_index", "_offsets", "_presence", "_size")

    def __init__(
        self, prompt_ids: Sequence[int], output_ids: Sequence[int], presence: np.float32, frequency: np.float32
    ) -> None:
        self._presence, self._frequency = presence, frequency
        counts = dict.fromkeys(prompt_ids, 0)
        counts.update(Counter(output_ids))
        self._index = {token_id: at for at, token_id in enumerate(counts)}
        self._size = len(counts)
        self._ids = np.zeros(self._size + _ROOM, dtype=np.int64)
        self._ids[: self._size] = list(counts)
        self._counts = np.zeros(self._size + _ROOM, dtype=np.int64)
        self._counts[: self._size] = list(counts.values())
        self._offsets = np.zeros(self._size + _ROOM, dtype=np.float32)
        output = self._counts[: self._size]
        self._offsets[: self._size] = np.where(output > 0, presence + frequency * output.astype(np.float32), 0)

    def _offset(self, count: int) -> np.float32:
        return self._presence + self._frequency * np.float32(count)

    def add(self, token_id: int) -> None:
        """Note a token that was output."""
        at = self._index.get(token_id)
        if at is None:
            at = self._index[token_id] = self._size
            if at == len(self._ids):
                self._ids, self._counts, self._offsets = (
                    np.concatenate([array, np.zeros_like(array)]) for array in (self._ids, self._counts, self._offsets)
                )
            self._ids[at] = token_id
            self._size += 1
        self._counts[at] += 1
        self._offsets[at] = self._offset(int(self._counts[at]))

    def entries(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Give the tokens and their offsets."""
        return self._ids[: self._size], self._offsets[: self._size]

    def entries_after(self, token_ids: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Give what `entries` would if these tokens were output too."""
        ids, offsets = self.entries()
        offsets = offsets.copy()
        new: dict[int, np.float32] = {}
        for token_id, count in Counter(token_ids).items():
            at = self._index.get(token_id)
            if at is None:
                new[token_id] = self._offset(count)
            else:
                offsets[at] = self._offset(int(self._counts[at]) + count)
        return (
            np.concatenate([ids, np.fromiter(new.keys(), np.int64, len(new))]),
            np.concatenate([offsets, np.fromiter(new.values(), np.float32, len(new))]),
        )
