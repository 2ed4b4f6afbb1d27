"""How probable tokens were, as arrays and as entries of a step result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pawl_workers.plan import TokenLogprobs

__all__ = ["TokenScores"]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """N tokens, each under its own distribution.

    Attributes:
        logprobs: natural logarithms, [N] float32.
        ranks: 1 = best, [N].
        alternative_ids: best first, [N, most]; what lies past a token's own number is undefined.
        alternative_logprobs: [N, most] float32.
    """

    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int64]
    alternative_ids: NDArray[np.int64]
    alternative_logprobs: NDArray[np.float32]

    def entries(self, token_ids: NDArray[np.int64], num_alternatives: NDArray[np.int64]) -> list[TokenLogprobs]:
        """Give one entry per token, for a step result."""
        return [
            TokenLogprobs(token_id, logprob, rank, ids[:count], logprobs[:count])
            for token_id, count, logprob, rank, ids, logprobs in zip(
                token_ids.tolist(),
                num_alternatives.tolist(),
                self.logprobs.tolist(),
                self.ranks.tolist(),
                self.alternative_ids.tolist(),
                self.alternative_logprobs.tolist(),
                strict=True,
            )
        ]
