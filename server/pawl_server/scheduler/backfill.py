"""Who may start while blocks are kept for others: whoever, by the ends that are predicted, cannot delay them.

Source: EASY backfilling, Lifka, "The ANL/IBM SP Scheduling System" (JSSPP 1995). There as here the one kept for has a
predicted start, that at which enough of those who run have ended; somebody behind it may start if he is predicted to
have ended by then, or if what he holds is not needed then. Time is counted in steps, in each of which everybody who
decodes gets a token. Those who run are taken to end as early as they may, and whoever wants to start to end late, so
that where lengths are uncertain nobody starts who might be in the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pawl_server.scheduler.admission import SchedulerLimits, blocks_for
from pawl_server.scheduler.fit import Need, Room
from pawl_server.scheduler.output_lengths import OutputLengths
from pawl_server.scheduler.sequence import SequenceState
from pawl_server.scheduler.slots import SlotTable

__all__ = ["Backfill", "Candidate", "Unfit"]

_MOST_REFUSED = 8  # candidates that are looked at in a step in vain


@dataclass(frozen=True, slots=True)
class Unfit:
    """A waiting sequence that does not fit.

    Attributes:
        need: its blocks.
        num_shared: of them, those that others hold already.
        num_hits: blocks of its prefix that are cached, held or not.
        num_before: starts that were planned before it was considered.
    """

    sequence: SequenceState
    need: Need
    num_shared: int
    num_hits: int
    num_before: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A waiting sequence that fits. In tokens: `want` to compute before it samples, `chunk` of them in this step."""

    sequence: SequenceState
    want: int
    chunk: int


@dataclass(frozen=True, slots=True)
class _Reservation:
    """The step, counted from the one being planned, after which somebody fits; blocks that are left over then."""

    step: int
    num_spare: int


class Backfill:
    """For whom blocks are kept in one step.

    Where the start of one of those cannot be foreseen nobody may be in the way: one who shares a prefix with somebody
    who still computes it needs the less, the further that one is; samples that start together need rows, too; and of
    those that are parked behind a prompt it is not known when they end.

    Args:
        slots: those who run.
        room: what admission may count on. Make this before anybody is admitted.
        limits: of the replica.
        lengths: of the outputs seen.
        num_available: blocks that nobody holds.
        num_used: blocks that somebody holds; fewer than those who run have, where these share.
        has_parked: whether others are parked behind one of those who run.
    """

    def __init__(
        self,
        slots: SlotTable,
        room: Room,
        limits: SchedulerLimits,
        lengths: OutputLengths,
        num_available: int,
        num_used: int,
        *,
        has_parked: bool,
    ) -> None:
        self._slots = slots
        self._room = room
        self._limits = limits
        self._lengths = lengths
        self._slack = num_available - room.promised  # blocks that whoever starts first may take
        self._num_double = int(slots.capacity.sum()) // limits.block_size - num_used
        self._has_parked = has_parked
        self._behind: list[SequenceState] = []  # in mid-prompt from this step on
        self._unfit: list[Unfit] = []
        self._kept: list[_Reservation] | None = None  # worked out when they are first needed
        self._num_refused = 0

    def keep_for(self, unfit: Unfit) -> None:
        """A sequence does not fit. If it was overtaken as often as may be, blocks are kept for it."""
        self._unfit.append(unfit)
        self._kept = None

    def admitted(self, candidate: Candidate, num_shared: int) -> None:
        """A sequence is admitted that shares so many blocks with others."""
        self._num_double += num_shared
        self._has_parked = self._has_parked or len(candidate.sequence.followers) > 0
        if candidate.chunk < candidate.want:
            self._behind.append(candidate.sequence)
        self._kept = None

    @property
    def hopeless(self) -> bool:
        """Whether there is no use in looking for somebody who may start."""
        settled = self._room.settled or any(unfit.sequence.settled for unfit in self._unfit)
        return not self._limits.backfill or settled or self._has_parked or self._num_refused >= _MOST_REFUSED

    def allows(self, candidate: Candidate, num_overtaking: int, num_available: int, *, alone: bool) -> bool:
        """Whether a sequence that fits may start though it comes after somebody for whom blocks are kept.

        Args:
            candidate: the sequence.
            num_overtaking: starts of this step that count as overtaking.
            num_available: blocks that nobody holds now.
            alone: whether nobody else is in mid-prompt, so that its next chunks are as long as may be.
        """
        if self._kept is None:
            self._kept = self._reservations(num_overtaking, num_available)
        harmless = self._harmless(candidate, self._kept, alone=alone)
        self._num_refused += not harmless
        return harmless

    def _harmless(self, candidate: Candidate, reservations: Sequence[_Reservation], *, alone: bool) -> bool:
        """Whether everybody for whom blocks are kept starts as early with the candidate as without."""
        if candidate.sequence.followers:
            return False  # they end at different times, and none before the last of them has begun
        whole = candidate.chunk == candidate.want
        if not whole and not alone:
            return False  # its prompt could slow down that of one who runs
        sequence, limits = candidate.sequence, self._limits
        total = sequence.num_tokens
        if sequence.samples:
            longest = sequence.num_prompt + self._lengths.longest(sequence.num_output) - 1
            total = max(total, min(sequence.limit - 1, longest))
        least = min(candidate.chunk, max(1, limits.max_batch_tokens - limits.max_running))  # of a step that decodes
        prompt_done = 0 if whole else -(-candidate.want // least) - 1
        last = prompt_done + total - sequence.num_tokens
        if all(last <= kept.step for kept in reservations):
            return True
        if len(self._unfit) > 1 or self._num_refused:
            return False  # what is spare for one may be needed by another who was passed over
        num_blocks = blocks_for(total, limits.block_size)
        return all(num_blocks <= kept.num_spare and prompt_done <= kept.step for kept in reservations)

    def _reservations(self, num_overtaking: int, num_available: int) -> list[_Reservation]:
        """When each of those fits who may not be overtaken any more."""
        slots, room, limits = self._slots, self._room, self._limits
        rows, size = room.rows, limits.block_size
        expected = slots.expected[rows]
        num_chunks = np.maximum(1, -(-(expected - slots.planned[rows]) // limits.max_prefill_chunk))
        last = num_chunks - 1 + room.total - expected - (expected >= slots.stop_at[rows])
        held = np.maximum(-(-room.total // size), slots.capacity[rows] // size)
        order = np.argsort(last, kind="stable")
        last, freed = last[order], np.cumsum(held[order])
        left = num_available - room.promised - self._num_double
        reservations = []
        for unfit in self._unfit:
            if unfit.sequence.bypassed + num_overtaking - unfit.num_before < limits.max_bypass:
                continue
            short = unfit.need.expected - unfit.num_shared - self._slack
            if short <= 0 or not len(last) or unfit.sequence.followers or self._may_share_more(unfit):
                reservations.append(_Reservation(-1, -1))
                continue
            step = int(last[min(int(np.searchsorted(freed, short)), len(last) - 1)])
            at_once = int(freed[int(np.searchsorted(last, step, side="right")) - 1])
            reservations.append(_Reservation(step, left + at_once - unfit.need.expected))
        return reservations

    def _may_share_more(self, unfit: Unfit) -> bool:
        """Whether somebody computes the block that comes after those of its prefix that are cached."""
        chain, slots = unfit.sequence.chain, self._slots
        if chain is None or unfit.num_hits >= len(chain):
            return False
        behind = np.flatnonzero((slots.planned < slots.num_prompt) & slots.shares).tolist()
        others = [slots.owner(row).chain for row in behind] + [sequence.chain for sequence in self._behind]
        return any(
            other is not None and unfit.num_hits < len(other) and other[unfit.num_hits] == chain[unfit.num_hits]
            for other in others
        )
