"""One token is chosen for each row that asked."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from pawl_workers.batch import SamplingBatch
from pawl_workers.plan import TokenLogprobs
from pawl_workers.sampling.filters import choose
from pawl_workers.sampling.logprobs import describe_tokens
from pawl_workers.sampling.noise import uniform

__all__ = ["Sampled", "sample"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen tokens, parallel to the rows that sampled.

    Attributes:
        token_ids: a token each, or None for a row of `failures`.
        logprobs: empty when no row asked, else parallel to `token_ids`.
        failures: why there is no token, by index.
        sample_s: seconds spent here.
    """

    token_ids: list[int | None]
    logprobs: list[TokenLogprobs | None]
    failures: dict[int, str]
    sample_s: float


def sample(scores: Tensor, sampling: SamplingBatch) -> Sampled:
    """Choose a token from each row of logits, [S, V] float32.

    A row's token is a function of its logits, its sampling state and (seed, position) alone. Rows whose
    logits are not finite fail and leave the others alone.
    """
    started = time.perf_counter()
    token_ids: list[int | None] = [None] * len(sampling.rows)
    failures: dict[int, str] = {}
    if sampling.rows:
        # A sum is finite exactly when all logits are: they are far from the largest float.
        finite = scores.sum(dim=-1).isfinite().tolist()
        best = scores.argmax(dim=-1).tolist()  # the lowest id among equals
        for i, row in enumerate(sampling.rows):
            if not finite[i]:
                failures[i] = "the logits are not finite"
            elif row.plain_greedy:
                token_ids[i] = best[i]
            else:
                token_ids[i] = _choose(scores[i], sampling, i)
                if token_ids[i] is None:
                    failures[i] = "bias and suppression leave no token to choose"
    logprobs = _describe(scores, sampling, token_ids)
    return Sampled(token_ids, logprobs, failures, time.perf_counter() - started)


def _choose(scores: Tensor, sampling: SamplingBatch, index: int) -> int | None:
    row = sampling.rows[index]
    spec = row.spec
    adjusted = row.adjust(scores.cpu().numpy(), sampling.num_output_tokens[index])
    noise = uniform(spec.seed, sampling.positions[index])
    return choose(adjusted, spec.temperature, spec.top_k, spec.top_p, spec.min_p, noise)


def _describe(scores: Tensor, sampling: SamplingBatch, token_ids: list[int | None]) -> list[TokenLogprobs | None]:
    wanted = [
        (i, token_id, row.spec.logprobs)
        for i, (row, token_id) in enumerate(zip(sampling.rows, token_ids, strict=True))
        if token_id is not None and row.spec.logprobs >= 0
    ]
    if not wanted:
        return []
    indices, ids, counts = (list(column) for column in zip(*wanted, strict=True))
    described: list[TokenLogprobs | None] = [None] * len(token_ids)
    for i, entry in zip(indices, describe_tokens(scores[indices], ids, counts), strict=True):
        described[i] = entry
    return described
