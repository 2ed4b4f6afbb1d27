"""The latest decisions, in few bytes: what each step changed and why. Equal traces give equal bytes.

Steps in which everybody goes on decoding are counted, not written, so that the ring reaches far back.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from pawl_server.scheduler.plan import Plan

__all__ = ["Decision", "DecisionRing", "decode"]


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """A step, or a run of steps that decode alike. Sequences are named by their number of arrival."""

    step: int  # the first
    epoch: int
    now: float
    num_steps: int
    num_decodes: int
    prefills: list[tuple[int, int]] = []  # row, tokens
    started: list[tuple[int, int, int, int]] = []  # sequence, row, cached tokens, tokens
    preempted: list[tuple[int, str, int]] = []  # sequence, reason, blocks short
    unfit: list[int] = []  # sequences that did not fit, in the order in which they were considered
    backfilled: list[int] = []  # of those started, who came before somebody for whom blocks are kept
    forked: list[tuple[int, int, int]] = []  # sequence, row, the sequence whose prompt it takes over


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Decision)


def decode(record: bytes) -> Decision:
    """Read a record.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _decoder.decode(record)


class DecisionRing:
    """The last `size` records."""

    def __init__(self, size: int = 1024) -> None:
        self._records: deque[bytes] = deque(maxlen=size)
        self._run: tuple[int, int, float, int] | None = None  # step, epoch, now, decodes of the run going on
        self._length = 0

    def note(self, plan: Plan) -> None:
        """A plan is launched."""
        quiet = len(plan.rows) == plan.num_decodes and not (
            plan.admissions or plan.victims or plan.bypassed or plan.forks
        )
        run = self._run
        if quiet and run is not None and run[1] == plan.epoch and run[3] == plan.num_decodes:
            self._length += 1
            return
        self._close()
        if quiet:
            self._run, self._length = (plan.step, plan.epoch, plan.now, plan.num_decodes), 1
            return
        behind = zip(plan.rows[plan.num_decodes :].tolist(), plan.grants[plan.num_decodes :].tolist(), strict=True)
        decision = Decision(
            plan.step,
            plan.epoch,
            plan.now,
            1,
            plan.num_decodes,
            list(behind),
            [(one.sequence.order, one.row, one.num_computed, one.num_tokens) for one in plan.admissions],
            [(victim.sequence.order, victim.reason, victim.num_short) for victim in plan.victims],
            [sequence.order for sequence, _ in plan.bypassed],
            [one.sequence.order for one in plan.admissions if one.backfilled],
            [(fork.sequence.order, fork.row, fork.leader.order) for fork in plan.forks],
        )
        self._records.append(_encoder.encode(decision))

    def records(self) -> list[bytes]:
        """What happened, oldest first."""
        self._close()
        return list(self._records)

    def _close(self) -> None:
        if self._run is not None:
            step, epoch, now, num_decodes = self._run
            self._records.append(_encoder.encode(Decision(step, epoch, now, self._length, num_decodes)))
            self._run = None
