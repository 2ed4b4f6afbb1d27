"""Drafts by prompt lookup: what followed when the last tokens stood in the sequence before.

Source: Saxena, "Prompt lookup decoding", 2023. The sequence is not scanned at every step: the places of its n-grams are
kept in hash tables, to which a step adds its new tokens.
"""

from __future__ import annotations

from array import array

import numpy as np

from pawl_server.scheduler.guess import MOST_EVIDENCE, NOTHING, Guess

__all__ = ["NgramIndex"]

_MOST_ENTRIES = 1 << 14  # of a table: older n-grams of a longer sequence are overwritten
_FEWEST_ENTRIES = 1 << 10
_VECTORISED = 24  # tokens from which numpy is faster
_FACTOR, _MIX, _MASK = 0x01000193, 0x9E3779B1, 0xFFFFFFFF


class NgramIndex:
    """Where each n-gram of one sequence stood last.

    A table has an entry per n-gram, without its tokens: a wrong one is noticed by comparing them where it points to.
    Memory is bounded whatever the length of the sequence.

    Args:
        longest: tokens of the n-grams looked up first; at most MOST_EVIDENCE.
        shortest: of those looked up last; at least 1.
    """

    __slots__ = ("_bits", "_longest", "_num_indexed", "_shortest", "_slots", "_tables")

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest <= MOST_EVIDENCE:
            raise ValueError(f"n-grams of {shortest} to {longest} tokens: 1 <= shortest <= longest <= {MOST_EVIDENCE}")
        self._longest, self._shortest = longest, shortest
        self._num_indexed = 0  # n-grams that end before this token are in the tables
        self._slots: list[int] = []  # of the n-grams that end with the last token seen, in each table
        self._bits = 0
        self._tables: list[array[int]] = []  # by size, from the shortest

    @property
    def num_entries(self) -> int:
        """Entries of all tables, used or not."""
        return sum(len(table) for table in self._tables)

    def propose(self, tokens: array[int], most: int) -> Guess:
        """Guess at most `most` tokens; none when the last ones never stood there before.

        What followed up to the end of the sequence is taken to repeat. The evidence is the length of the n-gram. Takes
        O(tokens since the last call).

        Args:
            tokens: of the sequence, which has only grown since the last call.
            most: how many are wanted.
        """
        self._index(tokens)
        length = len(tokens)
        for number in range(len(self._slots) - 1, -1, -1):
            begin, size = self._tables[number][self._slots[number]], self._shortest + number
            if begin and tokens[begin - size : begin] == tokens[length - size :]:
                found = tokens[begin : begin + most].tolist()
                period = length - begin
                while len(found) < most:
                    found += found[len(found) - period : len(found) - period + most - len(found)]
                return Guess(found, size)
        return NOTHING

    def _index(self, tokens: array[int]) -> None:
        """Enter the n-grams that end before the last token."""
        end = len(tokens)
        if not self._bits or 1 << self._bits < min(end, _MOST_ENTRIES):
            self._bits = min(max(2 * end, _FEWEST_ENTRIES), _MOST_ENTRIES).bit_length() - 1
            self._tables = [array("i", bytes(4 << self._bits)) for _ in range(self._longest - self._shortest + 1)]
            self._num_indexed, self._slots = 0, []
        if end - self._num_indexed >= _VECTORISED:
            self._index_many(tokens)
        for place in range(self._num_indexed + 1, end + 1):
            for slot, table in zip(self._slots, self._tables, strict=False):
                table[slot] = place - 1
            self._slots = self._slots_before(tokens, place)
        self._num_indexed = end

    def _slots_before(self, tokens: array[int], end: int) -> list[int]:
        """Slots of the n-grams that end before a token, as many as there are."""
        name, shift, slots = 0, 32 - self._bits, []
        for size, token_id in enumerate(reversed(tokens[max(0, end - self._longest) : end]), start=1):
            name = (name * _FACTOR + token_id + 1) & _MASK
            if size >= self._shortest:
                slots.append((name * _MIX & _MASK) >> shift)
        return slots

    def _index_many(self, tokens: array[int]) -> None:
        """Enter all but the last few n-grams at once."""
        end, mask = len(tokens) - 1, np.uint64(_MASK)
        values = np.array(tokens, dtype=np.uint64) + np.uint64(1)
        first = self._num_indexed
        names = np.zeros(end - first, dtype=np.uint64)
        for size in range(1, self._longest + 1):
            if first < size:  # where a sequence begins, none of this size has ended
                names, first = names[size - first :], size
            names = (names * np.uint64(_FACTOR) + values[first - size : end - size]) & mask
            if size >= self._shortest:
                slots = (names * np.uint64(_MIX) & mask) >> np.uint64(32 - self._bits)
                table = np.frombuffer(self._tables[size - self._shortest], dtype=np.int32)
                table[slots] = np.arange(first, end, dtype=np.int32)  # of equal ones the last stays
        self._num_indexed, self._slots = end, self._slots_before(tokens, end)
