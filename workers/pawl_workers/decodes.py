"""Decode steps over the same rows: the batch of one step, moved on by a token, is that of the next."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pawl_workers.batch import Batch, IntArray
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

    def __init__(self, table: RowTable, rows: IntArray, batch: Batch, settings: BatchSettings) -> None:
        self.rows, self.num_tokens = rows, np.ones(len(rows), dtype=np.int64)
        self._table, self._batch, self._settings = table, batch, settings
        self._named, self._granted = rows.tolist(), self.num_tokens.tolist()
        self._places = {row: place for place, row in enumerate(self._named)}
        self._positions, self._token_ids = batch.positions.numpy(), batch.token_ids.numpy()
        self._capacity = table.num_blocks[rows] * settings.kernels.block_size
        self._furthest = int(self._positions.max())

    @staticmethod
    def can_follow(batch: Batch, settings: BatchSettings) -> bool:
        """Whether a step is one that `Decodes` can move on, if it has no drafts and none of its rows fails."""
        return settings.staging is None and len(batch.sampling) == len(batch.token_ids) and not batch.prompts

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
        table, positions, furthest = self._table, self._positions, self._furthest + 1
        appended = self._appended(plan) if plan.append_blocks else []
        if appended is None or furthest >= table.max_context:
            return None
        positions += 1
        if (positions >= self._capacity).any() or not self._batch.attention.move_on(positions, appended):
            return None
        table.apply(plan)
        self._furthest = furthest
        self._token_ids[:] = table.token_ids[self.rows, positions]
        sampling = self._batch.sampling
        sampling.positions[:] += 1
        sampling.num_output[:] += 1
        return replace(self._batch, rotary=batch_angles(self._batch.positions, self._settings, furthest))

    def _appended(self, plan: StepPlan) -> list[tuple[int, int, list[int]]] | None:
        """The blocks that sequences are given, as of `move_on`; None where a row is not of the step, or named twice."""
        table, places = self._table, self._places
        given = table.check_appended(plan.append_blocks)
        if len(given) < len(plan.append_blocks) or not given.keys() <= places.keys():
            return None
        for row, num_blocks in given.items():
            self._capacity[places[row]] += num_blocks * self._settings.kernels.block_size
        return [(places[row], int(table.num_blocks[row]), block_ids) for row, block_ids in plan.append_blocks]
