"""Pawl in this process: the production scheduler, the paged KV cache and a worker, step after step, without gRPC."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Protocol

from pawl_loadtest.peers.workloads import Workload
from pawl_server.config import EngineSettings
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.plan import Plan
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.pending import PendingStep
from pawl_workers.plan import SamplingSpec, StepPlan
from pawl_workers.worker import Worker, WorkerFacts, WorkerOptions

__all__ = ["InProcess", "StepRunner", "generate_all"]

_SETTINGS = EngineSettings()  # a server's, so that what gRPC and Ray cost is all that tells the two apart


class StepRunner(Protocol):
    """A worker, or what stands before one."""

    facts: WorkerFacts

    def launch(self, plan: StepPlan) -> PendingStep:
        """As a worker's."""
        ...


class InProcess:
    """A loaded model and a scheduler, without a prefix cache.

    Args:
        checkpoint: its folder.
        threads: compute threads.
        workloads: what it will be asked at most.
        options: of `WorkerOptions`, by field name, beyond those above.

    Raises:
        ValueError: this pawl's `WorkerOptions` has no such option.
    """

    def __init__(
        self,
        checkpoint: str,
        threads: int,
        workloads: Sequence[Workload],
        options: Mapping[str, str] | None = None,
    ) -> None:
        known = {field.name for field in fields(WorkerOptions)}
        for name in options or {}:
            if name not in known:
                raise ValueError(f"not available: this pawl's workers have no option {name!r}")
        max_requests = max(workload.requests for workload in workloads)
        max_context = max(workload.prompt_tokens + workload.output_tokens for workload in workloads)
        values: dict[str, object] = {
            "model": checkpoint,
            "num_threads": threads,
            "max_context": max_context,
            "max_running": max_requests,
            "max_batch_tokens": max(_SETTINGS.max_batch_tokens, max_requests),
            "num_blocks": max(map(_num_blocks, workloads)),
        }
        self.worker = Worker.load(WorkerOptions(**(values | dict(options or {}))))  # type: ignore[arg-type]
        self.facts: WorkerFacts = self.worker.facts
        self._limits = SchedulerLimits(
            num_blocks=self.facts.num_blocks,
            block_size=self.facts.block_size,
            max_running=max_requests,
            max_batch_tokens=self.facts.max_batch_tokens,
            max_context=max_context,
            max_prefill_chunk=_SETTINGS.max_prefill_chunk,
            max_partial_prefills=_SETTINGS.max_partial_prefills,
            prefix_cache=False,
        )
        self._epoch = 1

    def run(
        self, prompts: Sequence[Sequence[int]], output_tokens: int, *, through: StepRunner | None = None
    ) -> list[list[int]]:
        """Greedy tokens of each prompt, exactly `output_tokens` of them; `through`: what stands before the worker."""
        self._epoch += 1
        self.worker.reset(self._epoch)
        root = CacheRoot("bench", self.facts.data_type, self._limits.block_size)
        state = SchedulerState(self._limits, root, epoch=self._epoch)
        wanted = [(prompt, output_tokens) for prompt in prompts]
        return generate_all(state, self._limits, through or self.worker, wanted)


def generate_all(
    state: SchedulerState, limits: SchedulerLimits, worker: StepRunner, wanted: Sequence[tuple[Sequence[int], int]]
) -> list[list[int]]:
    """Greedy tokens for each (prompt, number of tokens), submitted at once to an empty scheduler and a reset worker.

    As many steps are in flight as the worker gains by.
    """
    output: dict[object, list[int]] = {}
    for number, (prompt_ids, output_tokens) in enumerate(wanted):
        output[number] = []
        refusal = state.submit(
            SequenceRequest(
                handle=number,
                request_id=str(number),
                prompt_ids=prompt_ids,
                cache_key=b"",
                sampling=SamplingSpec(temperature=0.0),
                max_output_tokens=output_tokens,
            ),
            0.0,
        )
        if refusal is not None:
            raise RuntimeError(refusal.message)
    in_flight: deque[tuple[Plan, PendingStep]] = deque()
    while True:
        planned = plan_step(state, limits, 0.0)
        if planned is not None:
            wire = planned.wire()
            launch(state, planned)
            in_flight.append((planned, worker.launch(wire)))
        elif not in_flight:
            return list(output.values())
        if planned is None or len(in_flight) == worker.facts.max_in_flight:
            plan, step = in_flight.popleft()
            committed = commit(state, plan, step.result(), 0.0)
            for handle, token_id in zip(committed.handles, committed.token_ids, strict=True):
                output[handle].append(token_id)


def _num_blocks(workload: Workload) -> int:
    """Blocks of 16 tokens, the smallest there are, so that nothing is preempted whatever the kernels' block size."""
    return workload.requests * (-(-(workload.prompt_tokens + workload.output_tokens) // 16) + 1)
