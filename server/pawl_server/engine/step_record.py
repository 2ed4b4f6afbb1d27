"""What the meter is told of a committed step, put together from its plan, its result and what the commit found."""

from __future__ import annotations

from pawl_server.engine.meter import StepRecord
from pawl_server.engine.recovery import InFlight
from pawl_server.scheduler.committer import Committed
from pawl_workers.plan import StepResult

__all__ = ["step_record", "worker_seconds"]


def worker_seconds(result: StepResult) -> float:
    """Seconds that the worker spent on a step."""
    return result.prepare_s + result.forward_s + result.sample_s


def step_record(
    step: InFlight, result: StepResult, committed: Committed, settled_before: float, elapsed_s: float
) -> StepRecord:
    """Divide the time that a step added among its parts.

    Args:
        step: what was planned, and when.
        result: what the worker gave.
        committed: what came of it.
        settled_before: when the step before it was settled, by the loop's clock; older than this step's plan, or, where
            steps overlap, younger.
        elapsed_s: what this one added to the time that passed.
    """
    plan, worker_s = step.plan, worker_seconds(result)
    schedule_s = min(step.launched_at - step.planned_at, max(0.0, elapsed_s - worker_s))
    return StepRecord(
        kind=plan.kind,
        num_sequences=plan.num_sequences,
        num_tokens=plan.num_tokens,
        idle_s=max(0.0, step.planned_at - settled_before),
        schedule_s=schedule_s,
        prepare_s=result.prepare_s,
        forward_s=result.forward_s,
        sample_s=result.sample_s,
        postprocess_s=max(0.0, elapsed_s - schedule_s - worker_s),
        num_output=len(committed.token_ids),
        num_prompt_computed=committed.num_prompt_computed,
        num_prompt_cached=committed.num_prompt_cached,
        num_recomputed=committed.num_recomputed,
        num_preempted=committed.num_preempted,
        num_gave_way=committed.num_gave_way,
        num_swapped_out=len(plan.draft.swap_out),
        num_swapped_in=len(plan.draft.swap_in),
        num_lost=committed.num_lost,
        num_drafts=plan.num_drafts,
        num_accepted=committed.num_accepted,
    )
