"""One token is chosen for each sample."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pawl_workers.plan import TokenLogprobs
from pawl_workers.sampling.batch import NOT_FINITE, NOTHING_LEFT, IntArray, SamplingBatch

__all__ = ["MESSAGES", "Sampled", "chosen", "sample"]

MESSAGES = {
    NOT_FINITE: "the logits are not finite",
    NOTHING_LEFT: "bias, suppression and mask leave no token to choose",
}
"""Why there is no token, by what was chosen in its place."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen tokens, parallel to the samples of the batch.

    Attributes:
        token_ids: [S]; negative for a sample of `failures`.
        logprobs: empty when no sample asked, else parallel to `token_ids`.
        failures: why there is no token, by index.
        sample_s: seconds spent here.
    """

    token_ids: IntArray
    logprobs: list[TokenLogprobs | None]
    failures: dict[int, str]
    sample_s: float


def sample(scores: Tensor, sampling: SamplingBatch) -> Sampled:
    """Choose a token from each row of logits, [S, V] float32.

    A token is a function of its logits, of its row's parameters and tokens, and of (seed, position) alone. Samples
    whose logits are not finite fail and leave the others alone. Source of the order of operations: `SamplingSpec`.
    """
    started = time.perf_counter()
    if not len(sampling):
        return Sampled(np.zeros(0, dtype=np.int64), [], {}, time.perf_counter() - started)
    token_ids = sampling.sampler.choose(scores, sampling)
    failures = _failures(token_ids)
    logprobs = _describe(scores, sampling, token_ids) if sampling.describes else []
    return Sampled(token_ids, logprobs, failures, time.perf_counter() - started)


def chosen(token_ids: IntArray) -> Sampled:
    """What came of tokens, [S], that a backend chose without `sample`; negative ones failed, see `MESSAGES`."""
    return Sampled(token_ids, [], _failures(token_ids), 0.0)


def _failures(token_ids: IntArray) -> dict[int, str]:
    return {i: MESSAGES[token_id] for i, token_id in enumerate(token_ids.tolist()) if token_id < 0}


def _describe(scores: Tensor, sampling: SamplingBatch, token_ids: IntArray) -> list[TokenLogprobs | None]:
    alternatives = sampling.table.alternatives[sampling.rows]
    wanted = np.flatnonzero((alternatives >= 0) & (token_ids >= 0))
    if not len(wanted):
        return []
    chosen, counts = token_ids[wanted], alternatives[wanted]
    described: list[TokenLogprobs | None] = [None] * len(token_ids)
    entries = sampling.sampler.describe(scores, wanted, chosen, counts).entries(chosen, counts)
    for i, entry in zip(wanted.tolist(), entries, strict=True):
        described[i] = entry
    return described
