"""A worker without a model: it reads the production step plans, says what shape each has, and answers with tokens.

Which request a row belongs to travels in `SamplingSpec.seed`. Rows are numpy columns, so that a step costs a few
array operations and not one Python object per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pawl_server.sim.cost import StepShape
from pawl_server.sim.streams import EOS_TOKEN_ID, IntArray, output_stream, token_ids
from pawl_server.sim.trace import SimulatedRequest
from pawl_workers.plan import StepPlan, StepResult

__all__ = ["FakeExecutor", "PlanRefusedError"]


class PlanRefusedError(RuntimeError):
    """A plan that a worker would refuse: a wrong step or epoch, an unknown row, tokens nobody knows. A defect."""


class FakeExecutor:
    """Executes plans over token streams.

    Args:
        requests: the trace; request i generates the stream `output_stream(i)`.
        max_running: rows.
    """

    def __init__(self, requests: Sequence[SimulatedRequest], max_running: int) -> None:
        outputs = [request.output_tokens for request in requests]
        declared = [request.max_output_tokens for request in requests]
        self._ends_at = np.asarray(outputs, np.int64)  # tokens of output, the end-of-text token included
        self._ends_by_itself = self._ends_at < np.asarray(declared, np.int64)
        self._max_running = max_running
        self.num_tokens = 0  # computed, over all epochs
        self.reset(1)

    def reset(self, epoch: int) -> None:
        """Forget everything; the next plan is step 1 of this epoch."""
        self._epoch, self._step = epoch, 0
        self._request = np.full(self._max_running, -1, np.int64)  # -1: nobody
        self._known = np.zeros(self._max_running, np.int64)
        self._prompt = np.zeros(self._max_running, np.int64)
        self._computed = np.zeros(self._max_running, np.int64)

    def execute(self, plan: StepPlan) -> tuple[StepResult, StepShape]:
        """Run one step.

        Raises:
            PlanRefusedError: the plan does not follow from the ones before.
        """
        if (plan.step, plan.epoch) != (self._step + 1, self._epoch):
            raise PlanRefusedError(f"step {plan.step} epoch {plan.epoch} after {self._step} epoch {self._epoch}")
        self._step = plan.step
        self._request[plan.freed_rows] = -1
        for new in plan.new:
            if self._request[new.row] >= 0:
                raise PlanRefusedError(f"step {plan.step}: row {new.row} is taken")
            self._request[new.row] = new.sampling.seed
            self._known[new.row] = len(new.token_ids)
            self._prompt[new.row] = new.num_prompt_tokens
            self._computed[new.row] = new.num_computed
        rows = np.asarray(plan.rows, np.int64)
        counts = np.asarray(plan.num_tokens, np.int64)
        before = self._computed[rows]
        after = before + counts
        known = self._known[rows]
        if (self._request[rows] < 0).any() or (after > known).any() or (counts < 1).any():
            raise PlanRefusedError(f"step {plan.step}: a row is unknown or would compute tokens that are not")
        self._computed[rows] = after
        pairs = counts * before + counts * (counts + 1) // 2
        total = int(counts.sum())
        self.num_tokens += total
        shape = StepShape(total, len(rows), int(pairs.sum()), int(after.sum()))
        sampled = rows[after == known]
        tokens = self._sample(sampled, 1)[0]
        self._known[sampled] += 1
        result = StepResult(plan.step, plan.epoch, sampled.tolist(), tokens.tolist(), [], [], [], 0.0, 0.0, 0.0)
        return result, shape

    def repeat(self, rows: IntArray, times: int) -> IntArray:
        """Decode steps of the same rows that nothing distinguishes; returns their tokens, [times, rows]."""
        tokens = self._sample(rows, times)
        self._known[rows] += times
        self._computed[rows] += times
        self._step += times
        self.num_tokens += times * len(rows)
        return tokens

    def steps_before_an_end(self, rows: IntArray) -> int:
        """Tokens that each of these rows will still give and go on after."""
        left = self._ends_at[self._request[rows]] - (self._known[rows] - self._prompt[rows])
        return int(left.min()) - 1

    def requests_of(self, rows: IntArray) -> IntArray:
        """Indices of the requests in these rows."""
        return self._request[rows]

    def _sample(self, rows: IntArray, times: int) -> IntArray:
        """Next tokens of these rows, [times, rows]."""
        requests = self._request[rows]
        positions = (self._known[rows] - self._prompt[rows])[None, :] + np.arange(times)[:, None]
        tokens = token_ids(requests[None, :] + output_stream(0), positions)
        ends = self._ends_by_itself[requests] & (positions == self._ends_at[requests] - 1)
        return np.where(ends, EOS_TOKEN_ID, tokens)
