"""The steps in flight of a worker whose device computes step k while the host prepares step k + 1.

The input ids of step k + 1 do not pass through the host: the row table holds a reference where a token will stand, and
the device replaces it by the token. What is settled here is the host's half, once the ids are back: tokens go into the
table, rows that failed are marked, what they wrote is cleaned.

Source: asynchronous scheduling as in vLLM and SGLang ("overlap scheduler"); the ids that stay on the device are the
latter's future tokens.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch
from torch import Tensor

from pawl_workers.batch import Batch, IntArray
from pawl_workers.errors import WorkerError
from pawl_workers.kv_cache import KvCache
from pawl_workers.pending import Arrival, QueuedStep
from pawl_workers.plan import RowFailure, StepPlan, StepResult
from pawl_workers.rows import RowTable
from pawl_workers.sampling.batch import QueueingSampler, SamplingBatch
from pawl_workers.stages.sample import MESSAGES

__all__ = ["FAILED_EARLIER", "MAX_IN_FLIGHT", "Pipeline"]

MAX_IN_FLIGHT = 2
"""Launched steps whose results are not settled, at most."""

FAILED_EARLIER = "the row failed in an earlier step"
"""What is reported of a row that a plan computes though it has failed."""


class Pipeline:
    """The steps in flight of one worker, oldest first.

    A block may be given away before it is known that what a row wrote to it is not finite: the kernels that go with a
    `QueueingSampler` read nothing behind the last token of a sequence.

    Args:
        table: the worker's rows.
        cache: what its steps write.
        sampler: that can leave ids on the device.
        device: of the worker.
    """

    def __init__(self, table: RowTable, cache: KvCache, sampler: QueueingSampler, device: torch.device) -> None:
        self._table, self._cache, self._sampler = table, cache, sampler
        self._in_flight: deque[QueuedStep] = deque()
        self._arrivals = [Arrival(device) for _ in range(MAX_IN_FLIGHT)]
        self._turn = 0
        self._arrived_at = 0.0  # of the last settled step
        self._broken: Exception | None = None

    def make_room(self) -> None:
        """Settle steps until one more may be launched.

        Raises:
            WorkerError: a step failed since the last reset.
        """
        if self._broken is not None:
            raise WorkerError(f"a step in flight failed, reset the worker first: {self._broken}") from self._broken
        while len(self._in_flight) >= MAX_IN_FLIGHT:
            self._settle_oldest()

    def settle_all(self) -> None:
        """Settle every step in flight."""
        while self._in_flight:
            self._settle_oldest()

    def can_queue(self, plan: StepPlan, rows: IntArray) -> bool:
        """Whether a step of these rows gives one token for each that samples, and nothing else; its plan is applied."""
        table = self._table
        scored = (table.prompt_alternatives[rows] >= 0) & (table.num_computed[rows] < table.num_prompt[rows])
        # What is copied must be finite, which is known when the step has come back.
        return not plan.copies and not plan.drafts and not scored.any()

    def choice_must_wait(self, plan: StepPlan) -> bool:
        """Whether a step's choice, not its forward pass, needs tokens of the step in flight: penalties count them."""
        table = self._table
        penalised = [row for row in table.sampling.seen.keys() & set(plan.rows) if table.known[row]]
        return any(table.token_ids[row, table.num_tokens[row] - 1] < 0 for row in penalised)

    def insert(self, batch: Batch) -> None:
        """Replace references in a batch's token ids by the tokens; queued after the batch's integers."""
        if self._in_flight:
            self._sampler.insert(batch.token_ids, self._in_flight[-1].chosen)

    def add(
        self,
        plan: StepPlan,
        rows: IntArray,
        num_tokens: IntArray,
        failures: list[RowFailure],
        stream: Tensor,
        scores: Tensor,
        sampling: SamplingBatch,
        launched_at: float,
        prepared_at: float,
    ) -> QueuedStep:
        """Queue the choice of a step's tokens and their way back, and note in the table what is known already.

        Args:
            plan: of the step.
            rows: that compute, [R].
            num_tokens: of each, [R].
            failures: rows of the plan that failed earlier.
            stream: after the last layer, [T, D].
            scores: logits, [S, V].
            sampling: how, one sample for each row that samples.
            launched_at: when the launch began.
            prepared_at: when its batch was ready.
        """
        table = self._table
        chosen = self._sampler.queue(scores, sampling)
        found = [chosen]
        if len(sampling) < stream.shape[0]:  # where all tokens sample, the choice finds out what is not finite
            found.append(stream.sum(dim=-1, dtype=torch.float32).isfinite())
        alternatives = table.sampling.alternatives[sampling.rows]
        described = np.flatnonzero(alternatives >= 0)
        if len(described):
            found += self._sampler.queue_description(scores, described, chosen, int(alternatives.max()))
        self._turn = (self._turn + 1) % MAX_IN_FLIGHT
        arrival = self._arrivals[self._turn]
        arrival.send(found)
        table.num_computed[rows] += num_tokens
        step = QueuedStep(
            plan=plan,
            rows=rows,
            num_tokens=num_tokens,
            sampling_rows=sampling.rows,
            positions=table.reserve(sampling.rows),
            generations=table.generation.copy(),
            chosen=chosen,
            described=described,
            alternatives=alternatives[described],
            arrival=arrival,
            failures=failures,
            settle=self._settle_through,
            launched_at=launched_at,
            prepared_at=prepared_at,
        )
        self._in_flight.append(step)
        return step

    def _settle_through(self, step: QueuedStep) -> None:
        while not step.future.done():
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        step = self._in_flight[0]
        try:
            step.wait()
            result = self._settle(step)
        except Exception as error:  # those after it stand on what it did not give
            self._broken = error
            while self._in_flight:
                self._in_flight.popleft().future.set_exception(error)
            raise
        self._in_flight.popleft()
        self._arrived_at = step.arrived_at
        step.future.set_result(result)

    def _settle(self, step: QueuedStep) -> StepResult:
        started = time.perf_counter()
        table = self._table
        chosen, *found = step.arrival.read()
        token_ids = chosen.astype(np.int64)
        same = table.generation == step.generations  # else the row has been freed since
        failed = {
            int(step.sampling_rows[i]): MESSAGES[int(token_ids[i])] for i in np.flatnonzero(token_ids < 0).tolist()
        }
        if len(token_ids) < step.num_tokens.sum():
            spoiled = np.flatnonzero(found.pop(0) == 0)
            failed |= dict.fromkeys(
                np.repeat(step.rows, step.num_tokens)[spoiled].tolist(), "the hidden state is not finite"
            )
        logprobs = step.entries(token_ids, found) if found else []
        spoiled_blocks = [block for row in failed if same[row] for block in table.blocks_of(row).tolist()]
        if spoiled_blocks:
            with torch.inference_mode():
                self._cache.make_finite(spoiled_blocks)
        for row in step.rows[same[step.rows] & table.failed[step.rows]].tolist():
            failed.setdefault(row, FAILED_EARLIER)
        for row in failed:
            table.failed[row] |= same[row]
        kept = np.flatnonzero(~np.isin(step.sampling_rows, list(failed))) if failed else np.arange(len(token_ids))
        rows, token_ids, positions = step.sampling_rows[kept], token_ids[kept], step.positions[kept]
        mine = same[rows]
        table.fill(rows[mine], positions[mine], token_ids[mine])
        begin = max(step.launched_at, self._arrived_at)  # what the step added to the time that passed
        prepare_s = max(0.0, step.prepared_at - begin)
        return StepResult(
            step=step.plan.step,
            epoch=step.plan.epoch,
            rows=rows.tolist(),
            token_ids=token_ids.tolist(),
            logprobs=[logprobs[i] for i in kept.tolist()] if logprobs else [],
            prompt_logprobs=[],
            failures=step.failures + [RowFailure(row, message) for row, message in failed.items()],
            prepare_s=prepare_s,
            forward_s=max(0.0, step.arrived_at - begin - prepare_s),
            sample_s=time.perf_counter() - started,
        )
