"""Whether a waiting sequence fits: its tokens, the output it is expected to have, and what those who run still need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pawl_server.scheduler.admission import SchedulerLimits, blocks_for
from pawl_server.scheduler.output_lengths import OutputLengths
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.slots import IntArray, SlotTable

__all__ = ["Need", "Room", "need_of"]


@dataclass(frozen=True, slots=True)
class Need:
    """Blocks of one sequence: for the tokens it has, for those it is expected to have, and for all it may have."""

    now: int
    expected: int
    most: int


def need_of(sequence: SequenceState, lengths: OutputLengths, block_size: int, now: float) -> Need:
    """Blocks of a waiting sequence and of those parked behind it. The KV of the last token is never needed."""
    alone = _need_alone(sequence, lengths, block_size, now)
    number = len(sequence.followers)
    if not number:
        return alone
    one = branch_need(sequence, lengths, block_size, now)
    return Need(alone.now + number * one.now, alone.expected + number * one.expected, alone.most + number * one.most)


def branch_need(leader: SequenceState, lengths: OutputLengths, block_size: int, now: float) -> Need:
    """Blocks of one that is parked, beside those that it shares with its leader: one is kept for it."""
    follower = leader.followers[0]
    alone = _need_alone(follower, lengths, block_size, now)
    num_shared = (follower.num_prompt - 1) // block_size
    return Need(1, alone.expected - num_shared, alone.most - num_shared)


def _need_alone(sequence: SequenceState, lengths: OutputLengths, block_size: int, now: float) -> Need:
    tokens = sequence.num_tokens
    most = expected = tokens
    if sequence.samples:
        output = np.array([sequence.num_output], dtype=np.int64)
        total = sequence.num_prompt + int(lengths.expected(output, now)[0])
        most = max(tokens, sequence.limit - 1)
        expected = max(tokens, min(most, total - 1))
    return Need(blocks_for(tokens, block_size), blocks_for(expected, block_size), blocks_for(most, block_size))


class Room:
    """What admission may count on in one step. Make it once a step, and tell it who is admitted.

    Somebody who was preempted as often as may be is *settled*: while one such runs, everybody is admitted with all
    the blocks that he may ever take, so that there is no shortage and nobody is preempted again.

    Args:
        slots: those who run.
        lengths: of the outputs seen.
        limits: of the replica.
        num_granted: blocks that the step gives to those who run.
        now: seconds.
        leaders: of those who run on, those with others parked behind them.
        rows: of those who run on; None = of all.

    Attributes:
        rows: of those who run, [S].
        total: tokens whose KV each of them is expected to have in the end, [S].
        settled: whether somebody settled runs or was admitted.
    """

    def __init__(
        self,
        slots: SlotTable,
        lengths: OutputLengths,
        limits: SchedulerLimits,
        num_granted: int,
        now: float,
        leaders: Iterable[SequenceState] = (),
        rows: IntArray | None = None,
    ) -> None:
        if rows is None:
            rows = slots.running()
        size = limits.block_size
        output = np.maximum(slots.length[rows] - slots.num_prompt[rows], 0)
        most = np.where(slots.samples[rows], slots.stop_at[rows] - 1, slots.length[rows])
        total = np.minimum(most, slots.num_prompt[rows] + lengths.expected(output, now) - 1)
        total = np.maximum(total, np.minimum(slots.expected[rows], most))  # the last token's KV is never needed
        self._limits = limits
        self._lengths = lengths
        self._now = now
        # Blocks that those who run are expected to take yet, less those that this step gives them.
        self._promised = int(np.maximum(0, -(-(total - slots.capacity[rows]) // size)).sum()) - num_granted
        self.rows, self.total = rows, total
        self._most = int((-(-most // size)).sum())
        self.settled = bool(slots.settled[rows].any())
        self._busy = len(rows) > 0
        for leader in leaders:  # those parked behind them run soon, and hold a block each by now
            one, number = branch_need(leader, lengths, size, now), len(leader.followers)
            self._promised += number * (one.expected - one.now)
            self._most += number * one.most

    @property
    def promised(self) -> int:
        """Blocks that are kept free for those who run, the watermark included."""
        return self._promised + self._limits.watermark_blocks if self._busy else 0

    def need(self, sequence: SequenceState) -> Need:
        """Blocks of a waiting sequence and of those parked behind it."""
        return need_of(sequence, self._lengths, self._limits.block_size, self._now)

    def fits(self, need: Need, num_available: int, num_shared: int, *, settled: bool) -> bool:
        """Whether a sequence fits.

        Args:
            need: of the sequence.
            num_available: blocks that nobody holds.
            num_shared: blocks of the sequence that others hold already.
            settled: whether it must not be preempted again.
        """
        if not self._busy:
            return need.now - num_shared <= num_available
        if settled or self.settled:
            return self._most + need.most <= self._limits.num_blocks
        return need.expected - num_shared <= num_available - self.promised

    def admit(self, need: Need, num_blocks: int, *, settled: bool) -> None:
        """A sequence was admitted and holds `num_blocks` blocks."""
        self._promised += need.expected - num_blocks
        self._most += need.most
        self.settled = self.settled or settled
        self._busy = True
