"""Decode steps over the same rows: the batch of one step, moved on by a token, is that of the next."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pawl_workers.batch import Batch, IntArray
from pawl_workers.kernels.decode_mover import DecodeArrays, DecodeMover, MovesDecodes
from pawl_workers.plan import StepPlan
from pawl_workers.prepare import BatchSettings, batch_angles
from pawl_workers.rows import RowTable

__all__ = ["Decodes"]


class Decodes:
    """A step in which each row computed its last token and sampled one, as `build_batch` built it.

    Mostly the next step is of the same rows: then its arrays are those of this one, changed in place, and of its plan
    no more is to be checked than what it adds. Holds while the rows keep their sequences and none of them fails.

    Attributes:
        rows: that compute, in the order of the plan, [S].
        num_tokens: 1 of each, [S].
    """

    def __init__(self, arrays: DecodeArrays, mover: DecodeMover, table: RowTable, settings: BatchSettings) -> None:
        self.rows, self.num_tokens = arrays.rows, np.ones(len(arrays.rows), dtype=np.int64)
        self._batch, self._capacity, self._mover = arrays.batch, arrays.capacity, mover
        self._table, self._settings = table, settings
        self._named: list[int] = self.rows.tolist()
        self._granted = self.num_tokens.tolist()
        self._places = {row: place for place, row in enumerate(self._named)}
        self._furthest = int(self._batch.positions.max())
        self._end = table.max_context
        if arrays.rotaries:
            self._end = min(self._end, *(len(angles.cosines) for angles in arrays.rotaries))
        self._works_out = not arrays.rotaries

    @classmethod
    def after(cls, batch: Batch, rows: IntArray, table: RowTable, settings: BatchSettings) -> Decodes | None:
        """Prepare for the steps after this one, which has no drafts; None where its backend cannot move it on."""
        kernels = settings.kernels
        decodes = len(batch.sampling) == len(batch.token_ids) and not batch.prompts
        if not decodes or settings.staging is not None or not isinstance(kernels, MovesDecodes):
            return None
        furthest = int(batch.positions.max())
        looked_up = all(furthest + 1 < len(angles.cosines) for angles in settings.rotaries)
        arrays = DecodeArrays(
            batch=batch,
            rows=rows,
            known=table.token_ids,
            num_tokens=table.num_tokens,
            num_computed=table.num_computed,
            capacity=table.num_blocks[rows] * kernels.block_size,
            rotaries=settings.rotaries if looked_up else (),
        )
        mover = kernels.decode_mover(arrays)
        if mover is None or not _append_spare(mover, table, rows, shown=furthest // kernels.block_size + 1):
            return None
        return cls(arrays, mover, table, settings)

    def note(self, token_ids: IntArray) -> list[int]:
        """Write into the table that the step was computed and gave these tokens, [S]; the rows that they are of."""
        self._mover.note(token_ids)
        self._table.sampling.observe(self.rows, token_ids)
        return self._named

    def next(self, plan: StepPlan) -> Batch | None:
        """Apply a plan to the table and build its batch, out of the last one, whose tokens have been appended.

        Returns:
            None where the plan is of other rows or is more than a decode step, where it breaks the contract, or where
            the backend must lay it out anew; then nothing has changed, and this object is not to be used again.

        Raises:
            PlanError: it appends blocks against the contract; nothing has changed.
        """
        same = plan.rows == self._named and plan.num_tokens == self._granted
        if not same or plan.new or plan.freed_rows or plan.drafts or plan.copies or plan.swap_out or plan.swap_in:
            return None
        self._furthest += 1
        if self._furthest >= self._end or (plan.append_blocks and not self._append(plan)) or not self._mover.move_on():
            return None
        if plan.append_blocks:
            self._table.apply(plan)
        if self._works_out:
            angles = batch_angles(self._batch.positions, self._settings)
            return replace(self._batch, rotary=angles)
        return self._batch

    def _append(self, plan: StepPlan) -> bool:
        """Note the blocks that sequences are given; False where one is not of the step, named twice or has no room."""
        table, places = self._table, self._places
        given = table.check_appended(plan.append_blocks)
        if len(given) < len(plan.append_blocks) or not given.keys() <= places.keys():
            return False
        for row, block_ids in plan.append_blocks:
            self._capacity[places[row]] += len(block_ids) * self._settings.kernels.block_size
            if not self._mover.append(places[row], int(table.num_blocks[row]), block_ids):
                return False
        return True


def _append_spare(mover: DecodeMover, table: RowTable, rows: IntArray, shown: int) -> bool:
    """Note the blocks that rows hold beyond the batch's, `shown` of each: they were given for drafts that did not come.

    Returns:
        False where there is no room for one's.
    """
    return all(
        mover.append(place, shown, table.block_tables[rows[place], shown : table.num_blocks[rows[place]]].tolist())
        for place in np.flatnonzero(table.num_blocks[rows] > shown).tolist()
    )
