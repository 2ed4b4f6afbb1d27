"""What the worker remembers of a row for sampling: its spec, and the tokens seen if a penalty needs them.

Costs nothing per vocabulary entry: only tokens that occurred are held.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pawl_workers.plan import SamplingSpec

__all__ = ["RowSampler"]


class _SeenTokens:
    """Distinct tokens of a row and how often each was output; prompt tokens count zero."""

    __slots__ = ("_counts", "_ids", "_index", "_size")

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        self._size = 0

    def add(self, token_ids: Iterable[int], count: int) -> None:
        for token_id in token_ids:
            at = self._index.get(token_id)
            if at is None:
                at = self._index[token_id] = self._size
                if at == len(self._ids):
                    self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                    self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
                self._ids[at] = token_id
                self._size += 1
            self._counts[at] += count

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: self._size]


class RowSampler:
    """The sampling state of one row."""

    __slots__ = ("_bias_ids", "_bias_values", "_seen", "_suppressed", "plain_greedy", "spec")

    def __init__(self, spec: SamplingSpec, prompt_ids: Iterable[int], output_ids: Iterable[int]) -> None:
        self.spec = spec
        self._seen: _SeenTokens | None = None
        if spec.repetition_penalty != 1.0 or spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0:
            self._seen = _SeenTokens()
            self._seen.add(prompt_ids, 0)
            self._seen.add(output_ids, 1)
        self._bias_ids = np.fromiter(spec.logit_bias.keys(), np.int64, len(spec.logit_bias))
        self._bias_values = np.fromiter(spec.logit_bias.values(), np.float32, len(spec.logit_bias))
        self._suppressed = np.array(spec.suppressed_ids, dtype=np.int64)
        adjusts = self._seen is not None or spec.logit_bias or (spec.min_output_tokens and spec.suppressed_ids)
        self.plain_greedy = spec.temperature == 0.0 and not adjusts

    def observe(self, token_id: int) -> None:
        """Note a token that was output."""
        if self._seen is not None:
            self._seen.add((token_id,), 1)

    def adjust(self, scores: NDArray[np.float32], num_output_tokens: int) -> NDArray[np.float32]:
        """Apply penalties, bias and suppression to a row of logits, [V].

        Repetition divides positive logits of every token seen (prompt and output) by the penalty and
        multiplies negative ones (Keskar et al., CTRL, 2019, section 4.1); presence and frequency are
        subtracted for output tokens, once and per occurrence (the OpenAI API's definition).

        Returns:
            A new row, or the given one when nothing applies.
        """
        spec = self.spec
        suppress = num_output_tokens < spec.min_output_tokens and len(self._suppressed) > 0
        if self._seen is None and not spec.logit_bias and not suppress:
            return scores
        scores = scores.copy()
        if self._seen is not None:
            ids, counts = self._seen.ids, self._seen.counts
            seen = scores[ids]
            penalty = np.float32(spec.repetition_penalty)
            seen = np.where(seen > 0, seen / penalty, seen * penalty)
            seen -= np.float32(spec.presence_penalty) * (counts > 0)
            seen -= np.float32(spec.frequency_penalty) * counts
            scores[ids] = seen
        scores[self._bias_ids] += self._bias_values
        if suppress:
            scores[self._suppressed] = -np.inf
        return scores
