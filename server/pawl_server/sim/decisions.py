"""The decision log of a run: every step in few bytes, digested as it is written. Equal bytes, equal decisions.

Decode steps that decide the same as the one before are counted and not written again, so the log does not show
whether the simulator skipped over them.
"""

from __future__ import annotations

import hashlib

import msgspec

from pawl_workers.plan import StepPlan

__all__ = ["DecisionLog"]

_encode = msgspec.msgpack.Encoder().encode


class DecisionLog:
    """Decisions and ends, in order.

    Args:
        keep: also keep the bytes, not only their digest.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._digest = hashlib.sha256()
        self._kept: bytearray | None = bytearray() if keep else None
        self._rows: tuple[int, ...] = ()
        self._repeats = 0

    def step(self, plan: StepPlan, now_ns: int) -> None:
        """A step is launched."""
        changes = bool(plan.freed_rows or plan.new or plan.append_blocks) or plan.num_tokens.count(1) < len(plan.rows)
        rows = tuple(plan.rows)
        if not changes and rows == self._rows:
            self._repeats += 1
            return
        self._flush()
        self._rows = () if changes else rows
        new = [(one.row, one.sampling.seed, one.num_computed, one.block_ids) for one in plan.new]
        self._write(("step", plan.epoch, plan.step, now_ns, plan.freed_rows, new, plan.append_blocks, plan.rows,
                     plan.num_tokens))  # fmt: skip

    def repeat(self, times: int) -> None:
        """The last step is launched again so often."""
        self._repeats += times

    def event(self, kind: str, index: int, detail: str, now_ns: int) -> None:
        """Something happened to a request (-1: to the worker)."""
        self._flush()
        self._write((kind, index, detail, now_ns))

    def digest(self) -> str:
        """SHA-256 of everything so far, as hexadecimal digits."""
        self._flush()
        return self._digest.hexdigest()

    @property
    def kept(self) -> bytes:
        """The log itself; empty unless it is kept."""
        self._flush()
        return bytes(self._kept or b"")

    def _flush(self) -> None:
        if self._repeats:
            self._write(("again", self._repeats))
        self._rows, self._repeats = (), 0

    def _write(self, record: tuple[object, ...]) -> None:
        data = _encode(record)
        self._digest.update(data)
        if self._kept is not None:
            self._kept += data
