"""The sampling parameters of the worker's rows: an array per parameter, written when a row is given a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pawl_workers.plan import SamplingSpec
from pawl_workers.sampling.penalties import SeenTokens

__all__ = ["SamplingTable"]

_SEEDS = 1 << 64
_LEAST_REPETITION = 1e-30  # what is smaller chooses the same tokens, but makes logits infinite


class SamplingTable:
    """How each row samples. Nothing is rebuilt from step to step; a step reads the arrays at its rows.

    Attributes:
        temperature, top_p, min_p: [rows] float64; temperature 0 is greedy.
        top_k: [rows] int64, 0 = no limit.
        seed: [rows] uint64; seeds are taken modulo 2**64.
        repetition: [rows] float32, 1 = off.
        min_output: output tokens before which `suppressed` must not be chosen, [rows] int64.
        alternatives: best tokens to list with each log-probability, [rows] int64; -1 = no log-probabilities.
        adjusted: [rows] bool; whether penalties, bias or suppression may change the row's logits.
        seen: tokens seen, of the rows with a penalty.
        bias: tokens and what is added to their logits, of the rows with a bias.
        suppressed: tokens, of the rows with a minimum length.
    """

    def __init__(self, num_rows: int) -> None:
        self.temperature, self.top_p, self.min_p = (np.zeros(num_rows, dtype=np.float64) for _ in range(3))
        self.top_k, self.min_output, self.alternatives = (np.zeros(num_rows, dtype=np.int64) for _ in range(3))
        self.seed = np.zeros(num_rows, dtype=np.uint64)
        self.repetition = np.ones(num_rows, dtype=np.float32)
        self.adjusted = np.zeros(num_rows, dtype=np.bool_)
        self.seen: dict[int, SeenTokens] = {}
        self.bias: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}
        self.suppressed: dict[int, NDArray[np.int64]] = {}

    def add(self, row: int, spec: SamplingSpec, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Give a free row a sequence, in whatever state its output is."""
        self.temperature[row], self.top_p[row], self.min_p[row] = spec.temperature, spec.top_p, spec.min_p
        self.top_k[row], self.seed[row] = spec.top_k, spec.seed % _SEEDS
        self.min_output[row], self.alternatives[row] = spec.min_output_tokens, spec.logprobs
        self.repetition[row] = max(spec.repetition_penalty, _LEAST_REPETITION)
        if spec.repetition_penalty != 1.0 or spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0:
            presence, frequency = np.float32(spec.presence_penalty), np.float32(spec.frequency_penalty)
            self.seen[row] = SeenTokens(prompt_ids, output_ids, presence, frequency)
        if spec.logit_bias:
            ids, values = list(spec.logit_bias.keys()), list(spec.logit_bias.values())
            self.bias[row] = np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32)
        if spec.min_output_tokens and spec.suppressed_ids:
            self.suppressed[row] = np.array(spec.suppressed_ids, dtype=np.int64)
        self.adjusted[row] = row in self.seen or row in self.bias or row in self.suppressed

    def free(self, row: int) -> None:
        """Forget a row's lists; its numbers are overwritten by the next sequence."""
        for lists in (self.seen, self.bias, self.suppressed):
            lists.pop(row, None)
        self.adjusted[row] = False

    def observe(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Note the token that each of some rows has output."""
        if self.seen:
            for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
                if row in self.seen:
                    self.seen[row].add(token_id)
