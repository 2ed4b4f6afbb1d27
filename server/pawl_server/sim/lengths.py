"""How long prompts and outputs are: lognormal lengths fitted to public traces.

A lognormal is fixed by its median and its 90th percentile. The fits are those of the Azure LLM inference
traces of 2023 (CC-BY 4.0): medians and percentiles alone are used, no data file. Knows nothing of tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["WORKLOADS", "LengthPair", "Lognormal", "Workload"]

# Standard normal quantile of 0.9.
_Z90 = 1.2815515655446004


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Lengths in tokens, by median and 90th percentile, cut to [low, high]."""

    median: float
    p90: float
    low: int = 1
    high: int = 1 << 20

    def __post_init__(self) -> None:
        if not 0 < self.median <= self.p90:
            raise ValueError(f"median = {self.median}, p90 = {self.p90}: must be 0 < median <= p90")
        if not 0 < self.low <= self.high:
            raise ValueError(f"low = {self.low}, high = {self.high}: must be 0 < low <= high")

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm."""
        return math.log(self.p90 / self.median) / _Z90

    def draw(self, random_source: random.Random) -> int:
        """One length."""
        value = random_source.lognormvariate(math.log(self.median), self.sigma)
        return max(self.low, min(self.high, round(value)))


@dataclass(frozen=True, slots=True)
class LengthPair:
    """Tokens of one request."""

    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompt and output lengths, drawn independently."""

    prompt: Lognormal
    output: Lognormal

    def lengths(self, seed: int) -> Iterator[LengthPair]:
        """Endless; same seed, same lengths."""
        draw = random.Random(seed)  # noqa: S311 (a workload, not a secret)
        while True:
            yield LengthPair(self.prompt.draw(draw), self.output.draw(draw))

    def scaled(self, factor: float, max_context: int) -> Workload:
        """The same shape with lengths times `factor`, cut so that prompt + output fits a context."""
        half = max(1, max_context // 2)

        def scale(lengths: Lognormal) -> Lognormal:
            return Lognormal(
                max(1.0, lengths.median * factor), max(1.0, lengths.p90 * factor), 1, min(lengths.high, half)
            )

        return Workload(scale(self.prompt), scale(self.output))


WORKLOADS: dict[str, Workload] = {
    "azure-conversation": Workload(Lognormal(1020, 2735, high=4142), Lognormal(129, 424, high=601)),
    "azure-code": Workload(Lognormal(1469, 5194, high=7436), Lognormal(13, 55, high=252)),
}
