"""What a computed step came to: who failed, which tokens the others are given, and the answer to its plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pawl_workers.batch import IntArray, SamplingBatch
from pawl_workers.forward import StepOutput
from pawl_workers.kv_cache import KvCache
from pawl_workers.plan import RowFailure, StepPlan, StepResult
from pawl_workers.rows import RowTable
from pawl_workers.verify import append_accepted, find_accepted

__all__ = ["Work", "conclude"]


@dataclass(frozen=True, slots=True)
class Work:
    """A plan that the table has taken in.

    Attributes:
        rows: that compute, in the order of the plan, [S].
        num_tokens: of each, [S].
        failures: rows of the plan that had failed before and are passed over.
        started: when its launch began, seconds of `time.perf_counter`.
    """

    plan: StepPlan
    rows: IntArray
    num_tokens: IntArray
    failures: list[RowFailure]
    started: float


def conclude(
    work: Work,
    sampling: SamplingBatch,
    output: StepOutput,
    table: RowTable,
    cache: KvCache,
    prepare_s: float,
    forward_s: float,
) -> StepResult:
    """Note in the table what was computed and sampled, and mark rows that failed.

    Args:
        work: what was computed.
        sampling: how tokens were chosen.
        output: what came of it.
        table: of the rows.
        cache: what the step wrote; made finite where it is not.
        prepare_s: seconds until the forward pass.
        forward_s: seconds of the forward pass, up to the logits.
    """
    plan, rows, num_tokens = work.plan, work.rows, work.num_tokens
    failed = _find_failures(work, sampling, output, table, cache)
    if plan.copies:  # forked sequences get what the step wrote; where it was not finite, it has been made so by now
        cache.copy_blocks(plan.copies)
    table.num_computed[rows] += num_tokens
    failures = work.failures
    if failed:
        unsure = {row for row, _ in plan.drafts if row in failed}  # the drafts may have done it
        for row in unsure:
            table.num_computed[row] -= num_tokens[rows == row].item()
        certain = [row for row in failed if row not in unsure]
        table.failed[certain] = True
        failures = failures + [RowFailure(row, failed[row]) for row in certain]
    sampled = output.sampled
    sampled_rows, token_ids, logprobs = sampling.rows, sampled.token_ids, sampled.logprobs
    if plan.drafts or failed or sampled.failures:
        kept = find_accepted(token_ids, sampling, table) if plan.drafts else np.flatnonzero(token_ids >= 0)
        kept = kept[~np.isin(sampled_rows[kept], list(failed))]
        sampled_rows, token_ids = sampled_rows[kept], token_ids[kept]
        logprobs = [logprobs[i] for i in kept.tolist()] if logprobs else []
        append_accepted(table, sampled_rows, token_ids, sampling.positions[kept] - table.num_tokens[sampled_rows])
    else:
        table.append_tokens(sampled_rows, token_ids)
    return StepResult(
        step=plan.step,
        epoch=plan.epoch,
        rows=sampled_rows.tolist(),
        token_ids=token_ids.tolist(),
        logprobs=logprobs,
        prompt_logprobs=[entry for entry in output.prompts if entry.row not in failed],
        failures=failures,
        prepare_s=prepare_s,
        forward_s=forward_s,
        sample_s=sampled.sample_s,
    )


def _find_failures(
    work: Work, sampling: SamplingBatch, output: StepOutput, table: RowTable, cache: KvCache
) -> dict[int, str]:
    failures, known = output.sampled.failures, table.num_tokens
    if not failures and len(sampling) == output.stream.shape[0]:
        return {}  # every token's logits were found finite, which those of a stream that is not never are
    # What fails after a draft is not accepted; if it must, the row fails there once it comes there.
    reached = (i for i in failures if sampling.positions[i] == known[sampling.rows[i]])
    failed = {int(sampling.rows[i]): failures[i] for i in reached}
    # Where a stream is not finite, neither are the keys and values just written.
    finite = output.stream.sum(dim=-1, dtype=torch.float32).isfinite()
    if not bool(finite.all()):
        tokens = np.repeat(work.rows, work.num_tokens)[~finite.cpu().numpy()]
        for row in np.unique(tokens).tolist():
            failed[row] = "the hidden state is not finite"
            cache.make_finite(table.blocks_of(row).tolist())
    return failed
