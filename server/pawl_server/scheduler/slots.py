"""The running sequences as arrays: what a step reads and writes of every one of them, without touching an object.

A slot is the worker's row. Arrays are indexed by row, made once, and all zero where nobody runs, so that whole-array
arithmetic needs no mask. What changes rarely (blocks, tokens already full of a window, times) is in `SequenceState`.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pawl_server.scheduler.sequence import SequenceState

__all__ = ["NEVER", "BoolArray", "IntArray", "SlotTable"]

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_TAIL = 64  # tokens of a row that the table holds before they move into the sequence
NEVER = 1 << 62  # a length that no sequence reaches


class SlotTable:
    """What a step needs of each running sequence, [rows].

    Attributes:
        length: tokens known (prompt and output).
        expected: tokens known or being sampled by launched steps.
        computed: tokens whose KV is there, by committed steps.
        planned: tokens whose KV is there or is computed by launched steps; `expected - planned` is wanted. More than
            expected while drafts are in flight: how many of them count is not known, and nothing more is wanted.
        capacity: tokens that the blocks hold.
        stop_at: length at which generation ends.
        num_prompt: tokens of the prompt.
        recompute_until: tokens that had been computed before a preemption.
        new_from: computed tokens from which on those that follow are neither prompt nor computed again.
        published: blocks that are published or shared; written by `set_published`.
        publish_at: computed tokens at which one more block is to be published; NEVER where none is.
        generation: counts up when a row is vacated, so that results for its last owner are known as such.
        order: number of arrival; the older, the smaller.
        level: priority class.
        tenant: number of the tenant.
        draft_at: length from which on it may be given drafts.
        samples: whether it generates.
        settled: whether it was preempted as often as may be.
        shares: whether its blocks are offered to others.
        watched: whether its next token must be looked at one by one (first token, end of a stall).
        constrained: whether not every token may follow.
        last_token_at: seconds.
        handles: of the sequences that run in the rows.
        num_scored: how many of the sequences do not generate.
    """

    def __init__(self, max_running: int, block_size: int) -> None:
        self.block_size = block_size
        shape = (max_running,)
        self.length, self.expected, self.computed, self.planned, self.capacity = _zeros(shape, 5)
        self.stop_at, self.num_prompt, self.recompute_until, self.published = _zeros(shape, 4)
        self.generation, self.order, self.level, self.tenant, self.draft_at = _zeros(shape, 5)
        self.new_from, self.publish_at = _zeros(shape, 2)
        self.num_scored = 0
        self.samples: BoolArray = np.zeros(shape, dtype=np.bool_)
        self.settled: BoolArray = np.zeros(shape, dtype=np.bool_)
        self.shares: BoolArray = np.zeros(shape, dtype=np.bool_)
        self.watched: BoolArray = np.zeros(shape, dtype=np.bool_)
        self.constrained: BoolArray = np.zeros(shape, dtype=np.bool_)
        self.last_token_at = np.full(shape, -1.0)
        self.handles: list[Hashable] = [None] * max_running
        self._owners: list[SequenceState | None] = [None] * max_running
        self._stop_ids = np.full((max_running, 1), -1, dtype=np.int32)
        self._tail = np.zeros((max_running, _TAIL), dtype=np.int32)

    def enter(self, row: int, sequence: SequenceState, num_computed: int, stop_ids: Collection[int]) -> None:
        """A sequence starts in a free row, with the KV of `num_computed` tokens in its blocks."""
        self._owners[row], self.handles[row] = sequence, sequence.request.handle
        self.length[row] = self.expected[row] = sequence.num_tokens
        self.computed[row] = self.planned[row] = num_computed
        self.capacity[row] = len(sequence.blocks) * self.block_size
        self.stop_at[row] = sequence.limit if sequence.samples else NEVER
        self.num_prompt[row] = sequence.num_prompt
        self.recompute_until[row] = sequence.recompute_until
        self.new_from[row] = max(sequence.num_prompt, sequence.recompute_until)
        self.order[row], self.level[row] = sequence.order, sequence.level
        self.tenant[row] = sequence.tenant
        self.samples[row], self.settled[row] = sequence.samples, sequence.settled
        self.num_scored += not sequence.samples
        self.shares[row] = sequence.chain is not None
        self.set_published(row, num_computed // self.block_size)
        self.watched[row] = True
        self.constrained[row] = sequence.constrained
        if len(stop_ids) > self._stop_ids.shape[1]:
            wider = np.full((len(self._stop_ids), len(stop_ids)), -1, dtype=np.int32)
            wider[:, : self._stop_ids.shape[1]] = self._stop_ids
            self._stop_ids = wider
        self._stop_ids[row] = -1
        self._stop_ids[row, : len(stop_ids)] = list(stop_ids)

    def set_published(self, row: int, num_blocks: int) -> None:
        """So many of a sequence's blocks are published or shared."""
        self.published[row] = num_blocks
        self.publish_at[row] = (num_blocks + 1) * self.block_size if self.shares[row] else NEVER

    def leave(self, row: int) -> None:
        """Vacate a row. Its sequence must have its tokens by then (`tokens_since`)."""
        self._owners[row] = self.handles[row] = None
        self.num_scored -= not self.samples[row]
        for array in (
            self.length, self.expected, self.computed, self.planned, self.capacity, self.stop_at, self.num_prompt,
            self.recompute_until, self.published, self.order, self.level, self.tenant, self.draft_at,
            self.new_from, self.publish_at,
        ):  # fmt: skip
            array[row] = 0
        self.samples[row] = self.settled[row] = self.shares[row] = self.watched[row] = False
        self.constrained[row] = False
        self.last_token_at[row] = -1.0
        self.generation[row] += 1

    def owner(self, row: int) -> SequenceState:
        """Who runs in a row.

        Raises:
            LookupError: nobody.
        """
        sequence = self._owners[row]
        if sequence is None:
            raise LookupError(f"nobody runs in row {row}")
        return sequence

    def append(self, rows: IntArray, token_ids: IntArray) -> None:
        """Append a token to each of these rows; those whose window is full hand it to the sequence."""
        lengths = self.length[rows]
        self._tail[rows, lengths % _TAIL] = token_ids
        lengths += 1
        self.length[rows] = lengths
        full = lengths % _TAIL == 0
        if full.any():
            for row in rows[full].tolist():
                self.owner(row).gather()

    def tokens_since(self, row: int, start: int) -> bytes:
        """Tokens from position `start`, which lies in the row's window, to the last one, as int32."""
        begin = start % _TAIL
        return self._tail[row, begin : begin + int(self.length[row]) - start].tobytes()

    def hits_stop(self, rows: IntArray, token_ids: IntArray) -> BoolArray:
        """Whether each token is one that ends its sequence."""
        return np.asarray((self._stop_ids[rows] == token_ids[:, None]).any(axis=1), dtype=np.bool_)

    def running(self) -> IntArray:
        """Rows in which a sequence runs, in order."""
        return self.length.nonzero()[0]


def _zeros(shape: tuple[int], count: int) -> list[IntArray]:
    return [np.zeros(shape, dtype=np.int64) for _ in range(count)]
