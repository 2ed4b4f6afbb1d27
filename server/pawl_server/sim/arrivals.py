"""When requests arrive: open-loop schedules drawn from a seed.

An open loop keeps its schedule whatever the server does, so a stall shows as latency and not as a lower rate
("coordinated omission"). Knows nothing of what is sent or to whom.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Arrivals", "OnOff", "parse_arrivals"]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A renewal process: independent gamma-distributed gaps.

    Attributes:
        rate: mean arrivals per second, > 0.
        variation: coefficient of variation of the gaps; 1 = Poisson, above = bursts, below = even.
        seed: same seed, same schedule.
    """

    rate: float
    variation: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate = {self.rate}: must be above 0 arrivals per second")
        if not self.variation > 0:
            raise ValueError(f"variation = {self.variation}: must be above 0 (1 = Poisson)")

    def due_times(self) -> Iterator[float]:
        """Seconds after the start at which each request is due; endless, never falling."""
        shape = 1.0 / self.variation**2
        scale = 1.0 / (self.rate * shape)
        draw = random.Random(self.seed)  # noqa: S311 (a schedule, not a secret)
        due = 0.0
        while True:
            due += draw.gammavariate(shape, scale)
            yield due

    def split(self, workers: int, index: int) -> Arrivals:
        """The share of one of several load generators; Poisson shares add up to the whole process."""
        return Arrivals(self.rate / workers, self.variation, seed=self.seed * 1009 + index + 1)


@dataclass(frozen=True, slots=True)
class OnOff:
    """A Poisson process that is switched on and off: exponential spells with these means, in seconds.

    `rate` is the mean over both; while it is on, arrivals come at `rate * (on_s + off_s) / on_s` per second.
    """

    rate: float
    on_s: float
    off_s: float
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rate, self.on_s, self.off_s) <= 0:
            raise ValueError(f"rate = {self.rate}, on_s = {self.on_s}, off_s = {self.off_s}: must be above 0")

    def due_times(self) -> Iterator[float]:
        """Seconds after the start at which each request is due; endless, never falling."""
        draw = random.Random(self.seed)  # noqa: S311 (a schedule, not a secret)
        rate_on = self.rate * (self.on_s + self.off_s) / self.on_s
        begins = 0.0
        while True:
            ends = begins + draw.expovariate(1 / self.on_s)
            due = begins + draw.expovariate(rate_on)
            while due < ends:
                yield due
                due += draw.expovariate(rate_on)
            begins = ends + draw.expovariate(1 / self.off_s)


def parse_arrivals(text: str, rate: float, seed: int) -> Arrivals:
    """`poisson`, `gamma:VARIATION`, or the name of a public trace: `azure-conversation`, `azure-code`.

    Raises:
        ValueError: none of these.
    """
    # Variations computed from the Azure 2023 inference traces (CC-BY 4.0).
    known = {"poisson": 1.0, "azure-conversation": 1.09, "azure-code": 13.0}
    if text in known:
        return Arrivals(rate, known[text], seed)
    name, _, value = text.partition(":")
    if name == "gamma" and value:
        return Arrivals(rate, float(value), seed)
    raise ValueError(f"arrivals = {text!r}: must be gamma:VARIATION or one of {', '.join(known)}")
