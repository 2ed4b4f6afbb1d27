"""Whether what a worker answered can be committed: the last look at a result before the scheduler takes it."""

from __future__ import annotations

import itertools

from pawl_workers.plan import StepPlan, StepResult

__all__ = ["BadResultError", "check_result"]


class BadResultError(RuntimeError):
    """A worker answered with what its plan cannot have given."""


def check_result(plan: StepPlan, result: StepResult, vocab_size: int) -> None:
    """Check that a result can be committed, before anything of it is.

    Raises:
        BadResultError: naming what does not fit.
    """
    if (result.step, result.epoch) != (plan.step, plan.epoch):
        raise BadResultError(
            f"result of step {result.step} epoch {result.epoch}, in flight is {plan.step} epoch {plan.epoch}"
        )
    if len(result.token_ids) != len(result.rows):
        raise BadResultError(f"step {plan.step}: {len(result.token_ids)} tokens for {len(result.rows)} sampled rows")
    rows = _check_accepted(plan, result) if plan.drafts else result.rows
    if len(set(rows)) != len(rows) or not set(rows) <= set(plan.rows):
        raise BadResultError(f"step {plan.step}: the result names rows that the plan does not")
    if result.logprobs and len(result.logprobs) != len(result.rows):
        raise BadResultError(f"step {plan.step}: {len(result.logprobs)} log-probabilities for {len(result.rows)} rows")
    if result.token_ids and not (min(result.token_ids) >= 0 and max(result.token_ids) < vocab_size):
        raise BadResultError(f"step {plan.step}: a token id is outside the vocabulary of {vocab_size}")


def _check_accepted(plan: StepPlan, result: StepResult) -> list[int]:
    """Check that a row gives its drafts before its last token; the rows, each once if its tokens stand together."""
    drafts, rows = dict(plan.drafts), []
    for row, tokens in itertools.groupby(zip(result.rows, result.token_ids, strict=True), key=lambda pair: pair[0]):
        accepted = [token_id for _, token_id in tokens][:-1]
        if accepted != drafts.get(row, [])[: len(accepted)]:
            raise BadResultError(f"step {plan.step}: row {row} gives tokens that it has no drafts for")
        rows.append(row)
    return rows
