"""What each tenant has been served, so that those who wait get equal shares: virtual token counters.

Source: Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2. A tenant's counter grows
with the tokens it is served, divided by its weight; of those who wait, the one with the least is served next. A
tenant that comes back is lifted to the least counter of those who wait, so idle time earns nothing. Ours: tokens from
the prefix cache have a price of their own, and what is computed again after a preemption costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pawl_server.scheduler.slots import IntArray

__all__ = ["Prices", "TenantAccounts"]


@dataclass(frozen=True, slots=True)
class Prices:
    """Service of one token, by kind. An output token takes a step of its own, hence more than a prompt token."""

    prompt: float = 1.0
    cached: float = 0.1
    output: float = 2.0


class TenantAccounts:
    """Counters by tenant. A tenant has a number while it has live sequences, or still more service than others."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._vacant: list[int] = []
        self._live: list[int] = []
        self._num_live = 0
        self._counters: NDArray[np.float64] = np.zeros(8)
        self._weights: NDArray[np.float64] = np.ones(8)

    def __len__(self) -> int:
        return len(self._numbers)

    def enter(self, tenant: str, weight: float) -> int:
        """A sequence of a tenant arrives; gives the tenant's number."""
        number = self._numbers.get(tenant)
        if number is None:
            number = self._vacant.pop() if self._vacant else len(self._names)
            if number == len(self._names):
                self._names.append(tenant)
                self._live.append(0)
            if number == len(self._counters):
                self._counters = np.concatenate([self._counters, np.zeros(number)])
                self._weights = np.concatenate([self._weights, np.ones(number)])
            self._numbers[tenant] = number
            self._names[number], self._live[number], self._counters[number] = tenant, 0, 0.0
        self._weights[number] = weight
        self._live[number] += 1
        self._num_live += 1
        return number

    def leave(self, number: int) -> None:
        """A sequence of a tenant ended. When nobody is left, all counters are forgotten: they only compare."""
        self._live[number] -= 1
        self._num_live -= 1
        if not self._num_live:
            self._numbers.clear()
            self._names.clear()
            self._vacant.clear()
            self._live.clear()

    def forget_idle(self, floor: float) -> None:
        """Forget tenants without live sequences who have had no more than `floor`: they would be lifted to it."""
        for name, number in list(self._numbers.items()):
            if not self._live[number] and self._counters[number] <= floor:
                del self._numbers[name]
                self._vacant.append(number)

    def name(self, number: int) -> str:
        """The tenant with this number."""
        return self._names[number]

    def service(self, number: int) -> float:
        """Weighted tokens served to a tenant, over its weight."""
        return float(self._counters[number])

    def lift(self, number: int, floor: float) -> None:
        """A tenant that comes back has had at least this much."""
        self._counters[number] = max(self._counters[number], floor)

    def prompt_cost(self, number: int, num_computed: int, num_cached: int) -> float:
        """What a prompt adds to the counter, with so many of its tokens from the prefix cache."""
        tokens = self.prices.prompt * num_computed + self.prices.cached * num_cached
        return tokens / float(self._weights[number])

    def charge(self, number: int, cost: float) -> None:
        """Add to one counter."""
        self._counters[number] += cost

    def charge_output(self, numbers: IntArray) -> None:
        """One output token for each entry, a tenant's number."""
        if len(numbers):
            served = np.bincount(numbers, minlength=len(self._counters))
            self._counters += served * self.prices.output / self._weights
