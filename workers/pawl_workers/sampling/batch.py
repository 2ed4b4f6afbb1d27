"""What is to be sampled in one step, and the protocol of the kernels that do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pawl_workers.sampling.logprobs import TokenScores
from pawl_workers.sampling.table import SamplingTable

__all__ = ["NOTHING_LEFT", "NOT_FINITE", "IntArray", "QueueingSampler", "Sampler", "SamplingBatch", "TokenMasks"]

IntArray = NDArray[np.int64]

NOT_FINITE = -1
"""Chosen where a logit is infinite or not a number."""

NOTHING_LEFT = -2
"""Chosen where bias, suppression and mask leave no token."""


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens some samples may choose, one bit each, as grammar libraries write them.

    Attributes:
        words: [masks, words] uint32, contiguous; bit i of word w stands for token 32 w + i, 1 = allowed. Tokens past
            the last word are not allowed.
        of_sample: the mask of each sample, [S]; -1 = all tokens are allowed.
    """

    words: NDArray[np.uint32]
    of_sample: IntArray


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The S samples of a step: (row, position) pairs. A row whose drafts are verified has several, one per position.

    Attributes:
        sampler: the kernels.
        table: parameters, by row.
        rows: [S], rows of the table.
        positions: [S], where the new token will stand in its sequence; with the row's seed it names the noise.
        num_output: [S], output tokens before it.
        drafts: [S, drafts]; tokens between the row's last known token and the position, which a penalty counts as
            output; -1 past the end. Width 0 where nothing is drafted.
        masks: None where all tokens are allowed to all.
        words: [S, 2 * WORDS] int32 on the device, `parameter_words` by their halves; None where a step's integers do
            not travel together.
        adjusts: False where it is known that no row has penalties, bias or suppression.
        describes: False where it is known that no row wants log-probabilities.
        greedy: True where it is known that of each sample the best token is wanted, and nothing else.
    """

    sampler: Sampler
    table: SamplingTable
    rows: IntArray
    positions: IntArray
    num_output: IntArray
    drafts: IntArray
    masks: TokenMasks | None = None
    words: Tensor | None = None
    adjusts: bool = True
    describes: bool = True
    greedy: bool = False

    def __len__(self) -> int:
        return len(self.rows)


class Sampler(Protocol):
    """Chooses and describes tokens. Each row by itself: no bits depend on what else is in the batch."""

    def choose(self, scores: Tensor, batch: SamplingBatch) -> IntArray:
        """Choose a token from each row of logits.

        The order is: penalties, bias, suppression, mask; then temperature 0 takes the best token, the lowest id
        among equals; else temperature, top-k, top-p and min-p, and a draw by the inverse of the cumulative
        distribution in the order of ids, at the noise of (seed, position). Of equal logits top-k and top-p keep the
        lower ids. Top-p keeps a token while those before it do not reach the mass, and always the best.

        Args:
            scores: [S, V] float32; not changed.
            batch: of S samples.

        Returns:
            [S]: a token id, `NOT_FINITE` or `NOTHING_LEFT`.
        """
        ...

    def describe(self, scores: Tensor, rows: IntArray, token_ids: IntArray, num_alternatives: IntArray) -> TokenScores:
        """Describe tokens under the softmax of untouched logits, without sorting them.

        Args:
            scores: [S, V] float32.
            rows: [N], row of `scores` of each token.
            token_ids: [N].
            num_alternatives: [N], how many best tokens to list; among equals the lower ids first.

        Returns:
            N descriptions. Rank 1 is the best; it is one more than the number of tokens with a higher logit, so
            equal logits share a rank.
        """
        ...


@runtime_checkable
class QueueingSampler(Sampler, Protocol):
    """A sampler whose choice can stay on the device, so that the next step begins before the host has seen it."""

    def queue(self, scores: Tensor, batch: SamplingBatch) -> Tensor:
        """Queue what `choose` does, and wait for nothing.

        Returns:
            [S] int32 on the device, as `choose` returns it.
        """
        ...

    def insert(self, token_ids: Tensor, chosen: Tensor) -> None:
        """Replace each entry -1 - i of some token ids, in place, by `chosen[i]`, or by 0 where that is negative.

        Args:
            token_ids: [T], on the device.
            chosen: [S] int32, as `queue` returns it.
        """
        ...

    def queue_description(
        self, scores: Tensor, samples: IntArray, chosen: Tensor, most: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queue what `describe` does, for some samples of a choice, and wait for nothing.

        Args:
            scores: [S, V] float32.
            samples: [N], of the choice.
            chosen: [S] int32, as `queue` returns it.
            most: best tokens to list.

        Returns:
            The fields of `TokenScores` on the device; undefined where nothing was chosen.
        """
        ...
