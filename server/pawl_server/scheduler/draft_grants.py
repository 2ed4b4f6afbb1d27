"""Drafts in a step: whose, and how many the step has room for. Reads the state, writes the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pawl_server.scheduler.admission import SchedulerLimits, blocks_for
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import LEAST_SAMPLES

if TYPE_CHECKING:
    from pawl_server.scheduler.plan import Plan

__all__ = ["grant_drafts"]


def grant_drafts(plan: Plan, state: SchedulerState, limits: SchedulerLimits, num_behind: int) -> None:
    """Give drafts to those who decode, out of what the step has left.

    Only where no token is being sampled, for the last one must be known, and not where others fork from what the step
    computes. Drafts take at most half of the budget that decodes leave, so that prompts go on beside them; they take
    blocks, but nobody's: what does not fit is cut. Call it after the decodes are granted and before anything else is.

    Args:
        plan: with its decodes, and nothing else.
        state: with a speculation.
        limits: what the step may hold.
        num_behind: sequences in mid-prompt, which may come to sample in this step.
    """
    slots, speculation = state.slots, state.speculation
    if speculation is None or not speculation.num_looks:
        return
    rows = plan.rows[slots.draft_at[plan.rows] <= slots.length[plan.rows]]
    if not len(rows):
        return
    may_start = min(len(state.queue), len(plan.free_rows))
    may_start += sum(len(leader.followers) for leader in state.leaders.values())
    num_samples = max(limits.max_running, LEAST_SAMPLES) - plan.num_decodes - num_behind - may_start
    may_draft = slots.samples[rows] & (slots.expected[rows] == slots.length[rows])
    if state.leaders:
        may_draft &= ~np.isin(rows, [leader.row for leader in state.leaders.values()])
    proposals = speculation.propose(slots, rows[may_draft], plan.load, min(plan.budget // 2, num_samples))
    plan.proposals = proposals
    if not proposals.drafts:
        return
    appended = {row: len(blocks) for row, blocks in plan.append_blocks}
    size = limits.block_size
    for row, ids in list(proposals.drafts.items()):
        planned = int(slots.planned[row]) + 1
        capacity = int(slots.capacity[row]) + size * appended.get(row, 0)
        blocks = plan.draft.take(max(0, blocks_for(planned + len(ids) - capacity, size)))
        if blocks is None:
            del ids[max(0, capacity - planned) :]
        elif blocks:
            plan.append_blocks.append((row, blocks))
            plan.num_draft_blocks += len(blocks)
        if not ids:
            del proposals.drafts[row]
            continue
        plan.grants[np.searchsorted(plan.rows, row)] += len(ids)
        plan.num_drafts += len(ids)
        plan.num_pairs += len(ids) * planned + len(ids) * (len(ids) + 1) // 2
        plan.num_read += len(ids)
    plan.budget -= plan.num_drafts
