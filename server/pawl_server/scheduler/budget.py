"""How many prompt tokens a step may take, so that those who decode get their next token in time.

A step's time is fitted as c0 + c1 * tokens + c2 * pairs + c3 * KV read, and c4 more if it has drafts, by recursive
least squares with forgetting over measured steps. Pairs are (query, key) pairs of the attention: decodes read as much
KV as they have pairs; a chunk of a prompt has that many pairs for each of its tokens and reads the KV once. Pure: times
come in as numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["StepBudget", "StepLoad", "StepTimeModel"]

_SCALES = np.array([1.0, 1e-2, 1e-5, 1e-5, 1.0])  # brings the terms near each other, for a well-conditioned fit
_LEAST_STEPS = 8  # measured before the fit is trusted
_DAMPING = 1e-12  # relative: steps of microseconds, all of them decodes, leave the matrix singular otherwise
_LEAST_INFORMATION = 1e-4  # in every direction, for what is believed: steps that are all alike unteach nothing else


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step computes, as far as its time depends on it.

    Attributes:
        num_tokens: of all its sequences.
        num_pairs: (query, key) pairs: for each token those up to and including itself.
        num_read: tokens whose KV is read, for each sequence once.
        has_drafts: whether drafts are among its tokens.
    """

    num_tokens: int
    num_pairs: int
    num_read: int
    has_drafts: bool = False


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
        self._coefficients: NDArray[np.float64] = np.zeros(len(_SCALES))
        self._information: NDArray[np.float64] = np.eye(len(_SCALES)) * _LEAST_INFORMATION
        self.num_steps = 0

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """Seconds of a step, of a token, of a pair, and of a token's KV read; never negative."""
        step, token, pair, read, _ = np.maximum(0.0, self._coefficients * _SCALES).tolist()
        return step, token, pair, read

    @property
    def drafts_s(self) -> float:
        """Seconds that a step with drafts takes longer, however few they are; never negative.

        Without a CUDA graph, or with a few rows more than a kernel takes at once, the first draft costs more than the
        next. Believed ever less while no step has drafts, for else one that was held up could end them for good.
        """
        return max(0.0, float(self._coefficients[-1] * _SCALES[-1]))

    @property
    def trusted(self) -> bool:
        """Whether enough steps were measured."""
        return self.num_steps >= _LEAST_STEPS

    def predict(self, load: StepLoad) -> float:
        """Seconds that such a step takes."""
        step, token, pair, read = self.coefficients
        seconds = step + token * load.num_tokens + pair * load.num_pairs + read * load.num_read
        return seconds + self.drafts_s if load.has_drafts else seconds

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a measured step."""
        unit = max(seconds, 1e-7)
        if self.trusted:
            unit = max(unit, 0.25 * self.predict(load))
        if not load.has_drafts:
            self._coefficients[-1] *= self._keep
        x = np.array([1.0, load.num_tokens, load.num_pairs, load.num_read, load.has_drafts]) * _SCALES / unit
        error = seconds / unit - float(self._coefficients @ x)
        lost = (1.0 - self._keep) * _LEAST_INFORMATION
        self._information = self._keep * self._information + np.outer(x, x) + np.diag([lost] * len(_SCALES))
        damping = _DAMPING * float(np.trace(self._information)) * np.eye(len(_SCALES))
        self._coefficients = self._coefficients + np.linalg.solve(self._information + damping, x * error)
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

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a measured step."""
        if self.target_s > 0:
            self.model.observe(load, seconds)

    def chunk(self, load: StepLoad, num_decodes: int, context: int, most: int) -> int:
        """Tokens of a prompt that a step may take more, so that its predicted time stays within the target.

        Args:
            load: what the step computes so far.
            num_decodes: sequences in it that wait for their next token.
            context: tokens before the ones in question, whose KV they read; each of them attends to these.
            most: that the step may take otherwise.
        """
        if self.target_s <= 0 or num_decodes == 0 or not self.model.trusted:
            return most
        _, token, pair, read = self.model.coefficients
        slack = self.target_s - self.model.predict(load) - read * context
        # n tokens after `context` others have n * context + n^2 / 2 pairs, and their own KV is read with the rest.
        linear, square = token + read + pair * context, pair / 2
        if slack <= 0:
            tokens = 0.0
        elif square > 0:
            tokens = (math.sqrt(linear * linear + 4 * square * slack) - linear) / (2 * square)
        else:
            tokens = slack / linear if linear > 0 else most
        floor = self.floor - (load.num_tokens - num_decodes)  # less what other prompts got already
        return max(0, min(max(int(min(tokens, most)), floor), most))
