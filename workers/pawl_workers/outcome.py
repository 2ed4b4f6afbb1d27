"""What a computed step came to: who failed, which tokens the others are given, and the answer to its plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pawl_workers.batch import IntArray, SamplingBatch
from pawl_workers.decodes import Decodes
from pawl_workers.forward import StepOutput
from pawl_workers.kv_cache import KvCache
from pawl_workers.plan import RowFailure, StepPlan, StepResult, TokenLogprobs
from pawl_workers.rows import RowTable
from pawl_workers.stages.sample import Sampled
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
        decodes: the step, where it may go on as such.
    """

    plan: StepPlan
    rows: IntArray
    num_tokens: IntArray
    failures: list[RowFailure]
    started: float
    decodes: Decodes | None = None


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
    plan = work.plan
    failed = _find_failures(work, sampling, output, table, cache)
    if plan.copies:  # forked sequences get what the step wrote; where it was not finite, it has been made so by now
        cache.copy_blocks(plan.copies)
    sampled, failures = output.sampled, work.failures
    if work.decodes is not None and not failed and not sampled.failures:
        rows, token_ids, logprobs = work.decodes.note(sampled.token_ids), sampled.token_ids, sampled.logprobs
    else:
        failures = failures + _mark_failed(work, failed, table)
        rows, token_ids, logprobs = _append(work, sampling, sampled, failed, table)
    return StepResult(
        step=plan.step,
        epoch=plan.epoch,
        rows=rows,
        token_ids=token_ids.tolist(),
        logprobs=logprobs,
        prompt_logprobs=[entry for entry in output.prompts if entry.row not in failed],
        failures=failures,
        prepare_s=prepare_s,
        forward_s=forward_s,
        sample_s=sampled.sample_s,
    )


def _mark_failed(work: Work, failed: Mapping[int, str], table: RowTable) -> list[RowFailure]:
    """Count as computed what was, and mark who failed for good: not who may have failed by drafts alone."""
    plan, rows, num_tokens = work.plan, work.rows, work.num_tokens
    table.num_computed[rows] += num_tokens
    unsure = {row for row, _ in plan.drafts if row in failed}
    for row in unsure:
        table.num_computed[row] -= num_tokens[rows == row].item()
    certain = [row for row in failed if row not in unsure]
    table.failed[certain] = True
    return [RowFailure(row, failed[row]) for row in certain]


def _append(
    work: Work, sampling: SamplingBatch, sampled: Sampled, failed: Collection[int], table: RowTable
) -> tuple[list[int], IntArray, list[TokenLogprobs | None]]:
    """Append to the rows that did not fail what they sampled: the rows, each once for each of its tokens, and these."""
    rows, token_ids, logprobs = sampling.rows, sampled.token_ids, sampled.logprobs
    drafts = work.plan.drafts
    if not (drafts or failed or sampled.failures):
        table.append_tokens(rows, token_ids)
        return rows.tolist(), token_ids, logprobs
    kept = find_accepted(token_ids, sampling, table) if drafts else np.flatnonzero(token_ids >= 0)
    kept = kept[~np.isin(rows[kept], list(failed))]
    rows, token_ids = rows[kept], token_ids[kept]
    append_accepted(table, rows, token_ids, sampling.positions[kept] - table.num_tokens[rows])
    return rows.tolist(), token_ids, [logprobs[i] for i in kept.tolist()] if logprobs else []


def _find_failures(
    work: Work, sampling: SamplingBatch, output: StepOutput, table: RowTable, cache: KvCache
) -> dict[int, str]:
    failures, known = output.sampled.failures, table.num_tokens
    if not failures and (work.decodes is not None or len(sampling) == output.stream.shape[0]):
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
