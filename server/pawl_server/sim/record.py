"""What a run leaves behind: times of every request and tallies of every step, kept in numpy columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pawl_server.scheduler.endings import Ended, EndReason
from pawl_server.sim.cost import StepShape
from pawl_server.sim.streams import IntArray
from pawl_server.sim.tenants import TenantService
from pawl_server.sim.trace import SimulatedRequest

__all__ = ["Gaps", "Record"]

_BINS_PER_E = 200  # bins are half a percent wide
_NUM_BINS = 32 * _BINS_PER_E  # up to e^32 ns, a day


class Gaps:
    """A histogram of times between tokens, in bins half a percent wide."""

    def __init__(self) -> None:
        self._counts = np.zeros(_NUM_BINS, np.int64)

    def add(self, gaps_ns: npt.NDArray[np.int64], weight: int = 1) -> None:
        """Count gaps, each `weight` times."""
        bins = (np.log(np.maximum(gaps_ns, 1)) * _BINS_PER_E).astype(np.int64)
        np.add.at(self._counts, np.minimum(bins, _NUM_BINS - 1), weight)

    def add_alike(self, gap_ns: int, count: int) -> None:
        """Count one gap so many times."""
        self._counts[min(int(math.log(max(gap_ns, 1)) * _BINS_PER_E), _NUM_BINS - 1)] += count

    def percentile_s(self, percent: float) -> float:
        """A percentile in seconds; NaN when there is no gap."""
        total = int(self._counts.sum())
        if not total:
            return math.nan
        bin_index = int(np.searchsorted(np.cumsum(self._counts), percent / 100 * total))
        return math.exp((bin_index + 0.5) / _BINS_PER_E) / 1e9


class Record:
    """Columns by request (-1 where it did not come so far), and tallies over steps. Times in nanoseconds."""

    def __init__(self, requests: Sequence[SimulatedRequest], num_blocks: int, *, keep_tokens: bool = False) -> None:
        count = len(requests)
        self.num_blocks = num_blocks
        self.arrived_ns = np.full(count, -1, np.int64)
        self.first_token_ns = np.full(count, -1, np.int64)
        self.last_token_ns = np.full(count, -1, np.int64)
        self.ended_ns = np.full(count, -1, np.int64)
        self.longest_gap_ns = np.zeros(count, np.int64)
        self.num_output = np.zeros(count, np.int64)
        self.num_preempted = np.zeros(count, np.int64)
        self.cached_tokens = np.zeros(count, np.int64)
        self.reasons: dict[int, str] = {}
        self.gaps = Gaps()
        self.tokens: dict[int, list[int]] | None = {} if keep_tokens else None
        self.service = TenantService(requests)
        self.num_steps = self.num_skipped = self.num_recomputed = self.num_computed = 0
        self.busy_ns = self.blocked_ns = 0
        self.used_block_ns = 0  # blocks in use, times their time
        self.scheduler_s = 0.0  # of this machine's time: differs from run to run

    def step(self, shape: StepShape, duration_ns: int, used_blocks: int, *, blocked: bool, times: int = 1) -> None:
        """Tally `times` steps that took `duration_ns` together. `blocked`: someone waited for blocks, not for a row."""
        self.num_steps += times
        self.num_computed += shape.num_tokens * times
        self.busy_ns += duration_ns
        self.used_block_ns += used_blocks * duration_ns
        self.blocked_ns += duration_ns if blocked else 0

    def emitted(self, indices: IntArray, token_ids: Sequence[int], now_ns: int) -> None:
        """One token of each of these requests."""
        if not len(indices):
            return
        last = self.last_token_ns[indices]
        if int(last.min()) == int(last.max()) != -1:
            gap_ns = now_ns - int(last[0])
            self.gaps.add_alike(gap_ns, len(indices))
            self.longest_gap_ns[indices] = np.maximum(self.longest_gap_ns[indices], gap_ns)
        else:
            begun = last >= 0
            self.first_token_ns[indices[~begun]] = now_ns
            going = indices[begun]
            gaps_ns = now_ns - last[begun]
            self.gaps.add(gaps_ns)
            self.longest_gap_ns[going] = np.maximum(self.longest_gap_ns[going], gaps_ns)
        self.last_token_ns[indices] = now_ns
        self.num_output[indices] += 1
        if self.tokens is not None:
            for index, token_id in zip(indices.tolist(), token_ids, strict=True):
                self.tokens.setdefault(index, []).append(token_id)

    def emitted_alike(self, indices: IntArray, tokens: IntArray, times_ns: IntArray) -> None:
        """Tokens [steps, requests] of steps that ended at these times; each request got one right before them."""
        before = int(self.last_token_ns[indices[0]])
        gaps_ns = np.diff(times_ns, prepend=before)
        self.gaps.add(gaps_ns, len(indices))
        self.longest_gap_ns[indices] = np.maximum(self.longest_gap_ns[indices], int(gaps_ns.max()))
        self.last_token_ns[indices] = times_ns[-1]
        self.num_output[indices] += len(times_ns)
        if self.tokens is not None:
            for index, column in zip(indices.tolist(), tokens.T.tolist(), strict=True):
                self.tokens[index] += column

    def ended(self, index: int, ended: Ended, now_ns: int) -> None:
        """A request ended."""
        self.ended_ns[index] = now_ns
        self.num_preempted[index] = ended.preemption_count
        self.cached_tokens[index] = ended.cached_prompt_tokens
        self.reasons[index] = ended.reason.value

    def refused(self, index: int, reason: str, now_ns: int) -> None:
        """A request was refused."""
        self.ended_ns[index] = now_ns
        self.reasons[index] = reason

    @property
    def finished(self) -> npt.NDArray[np.bool_]:
        """Which requests ran to their end: by end of text or by their limit."""
        whole = {EndReason.EOS.value, EndReason.MAX_TOKENS.value, EndReason.CONTEXT_LENGTH.value}
        return np.asarray([self.reasons.get(index) in whole for index in range(len(self.ended_ns))], np.bool_)
