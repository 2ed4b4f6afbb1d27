"""How many prompt tokens a step may take, so that those who decode get their next token in time.

A step's time is fitted as c0 + c1 * tokens + c2 * pairs, where pairs are (query, key) pairs of the attention, by
recursive least squares with forgetting over measured steps. Pure: times come in as numbers.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["StepBudget", "StepTimeModel"]

_SCALES = (1.0, 1e-2, 1e-5)  # of 1, tokens and pairs: brings them near each other, for a well-conditioned fit
_LEAST_STEPS = 8  # measured before the fit is trusted
_LEAST_INFORMATION = 1e-4  # in every direction, for what is believed: steps that are all alike unteach nothing else


class StepTimeModel:
    """Seconds of a step from what it computes.

    Source: recursive least squares with exponential forgetting, Haykin, Adaptive Filter Theory, chapter 10.

    Errors count relative to the step's own time, so that short steps are fitted as well as long ones and a step that
    was held up (a page fault, a neighbour) hardly counts.

    Args:
        memory_steps: steps after which a measurement counts for 1/e.
    """

    def __init__(self, memory_steps: float = 200.0) -> None:
        self._keep = math.exp(-1.0 / memory_steps)
        self._coefficients: NDArray[np.float64] = np.zeros(3)
        self._information: NDArray[np.float64] = np.eye(3) * _LEAST_INFORMATION
        self.num_steps = 0

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """Seconds of a step, of a token, and of a pair; never negative."""
        c0, c1, c2 = (max(0.0, float(value) * scale) for value, scale in zip(self._coefficients, _SCALES, strict=True))
        return c0, c1, c2

    @property
    def trusted(self) -> bool:
        """Whether enough steps were measured."""
        return self.num_steps >= _LEAST_STEPS

    def predict(self, num_tokens: int, num_pairs: int) -> float:
        """Seconds that such a step takes."""
        c0, c1, c2 = self.coefficients
        return c0 + c1 * num_tokens + c2 * num_pairs

    def observe(self, num_tokens: int, num_pairs: int, seconds: float) -> None:
        """Learn from a measured step."""
        unit = max(seconds, 1e-7)
        if self.trusted:
            unit = max(unit, 0.25 * self.predict(num_tokens, num_pairs))
        x = np.array([1.0, num_tokens, num_pairs]) * _SCALES / unit
        error = seconds / unit - float(self._coefficients @ x)
        lost = (1.0 - self._keep) * _LEAST_INFORMATION
        self._information = self._keep * self._information + np.outer(x, x) + np.diag([lost] * 3)
        self._coefficients = self._coefficients + np.linalg.solve(self._information, x * error)
        self.num_steps += 1


class StepBudget:
    """Holds a target time between tokens by the number of prompt tokens beside the decodes. Decodes are never cut.

    Args:
        target_s: time that a step with decodes should take; 0 = no target.
        floor: prompt tokens that every step may take, so that prompts go on whatever the target.
    """

    def __init__(self, target_s: float, floor: int = 16) -> None:
        self.target_s = target_s
        self.floor = floor
        self.model = StepTimeModel()

    def observe(self, num_tokens: int, num_pairs: int, seconds: float) -> None:
        """Learn from a measured step."""
        if self.target_s > 0:
            self.model.observe(num_tokens, num_pairs, seconds)

    def prompt_tokens(self, num_decodes: int, num_pairs: int, context: int, most: int) -> int:
        """Prompt tokens for which the step's predicted time stays within the target.

        Args:
            num_decodes: tokens of those who decode.
            num_pairs: their pairs.
            context: tokens before the prompt tokens in question; each of them attends to these.
            most: that the step may take otherwise.
        """
        if self.target_s <= 0 or num_decodes == 0 or not self.model.trusted:
            return most
        _, per_token, per_pair = self.model.coefficients
        slack = self.target_s - self.model.predict(num_decodes, num_pairs)
        # n tokens after `context` others have n * context + n^2 / 2 pairs.
        linear, square = per_token + per_pair * context, per_pair / 2
        if slack <= 0:
            tokens = 0.0
        elif square > 0:
            tokens = (math.sqrt(linear * linear + 4 * square * slack) - linear) / (2 * square)
        else:
            tokens = slack / linear if linear > 0 else most
        return max(min(int(min(tokens, most)), most), min(self.floor, most))
