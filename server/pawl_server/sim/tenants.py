"""How evenly tenants are served while they wait: service by tenant, and how far apart that of two of them drifts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pawl_server.sim.streams import IntArray
from pawl_server.sim.trace import SimulatedRequest

__all__ = ["TenantService"]


class TenantService:
    """The tenants of a trace. Requests are named by their index in it.

    The gap of two tenants is how far their service drifted apart since both have been waiting without a break.

    Attributes:
        served: tokens of each tenant, as they are weighted by the caller.
        largest_gap: of any two tenants, in such tokens.
    """

    def __init__(self, requests: Sequence[SimulatedRequest]) -> None:
        names = sorted({request.tenant for request in requests})
        self._tenant = np.asarray([names.index(request.tenant) for request in requests], np.int64)
        self.served = np.zeros(len(names), np.float64)
        self._unstarted = np.zeros(len(names), np.int64)  # requests that arrived and never ran
        self._started = np.zeros(len(requests), np.bool_)
        self._rivals: dict[tuple[int, int], float] = {}
        self.largest_gap = 0.0

    @property
    def shared(self) -> bool:
        """Whether there are several, so that it is worth calling `serve`."""
        return len(self.served) > 1

    def waits(self, index: int) -> None:
        """A request arrived."""
        self._unstarted[self._tenant[index]] += 1

    def starts(self, index: int) -> None:
        """A request runs, or has ended before it did; said again it changes nothing."""
        if not self._started[index]:
            self._started[index] = True
            self._unstarted[self._tenant[index]] -= 1

    def serve(self, indices: IntArray, tokens: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> None:
        """Add so many tokens of each of these requests to their tenants' accounts, and look at all gaps."""
        served = self.served
        served += np.bincount(self._tenant[indices], weights=tokens, minlength=len(served))
        backlogged = np.flatnonzero(self._unstarted).tolist()
        pairs = {(one, two) for one in backlogged for two in backlogged if one < two}
        for pair in list(self._rivals):
            if pair not in pairs:
                del self._rivals[pair]
        for one, two in pairs:
            difference = float(served[one] - served[two])
            begun = self._rivals.setdefault((one, two), difference)
            self.largest_gap = max(self.largest_gap, abs(difference - begun))
