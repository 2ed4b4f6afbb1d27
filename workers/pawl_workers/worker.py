"""Worker: one model on one device. Told what to do by step plans, it answers with step results.

Knows no scheduling, no sockets and no Ray. Its KV and its rows are soft state: `reset` forgets them, and the
scheduler can send every sequence again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pawl_workers.batch import Batch, IntArray
from pawl_workers.decodes import Decodes
from pawl_workers.errors import PlanError
from pawl_workers.facts import WorkerFacts, worker_facts
from pawl_workers.forward import choose, compute, finish
from pawl_workers.graphs import DecodeGraphs, bucket_of
from pawl_workers.host_cache import HostCache
from pawl_workers.kernels.cpu_program import CpuProgram
from pawl_workers.kernels.cpu_seconds import KernelSeconds
from pawl_workers.kv_cache import KvCache
from pawl_workers.model.loading import load_weights
from pawl_workers.model.rotary import rotary_table
from pawl_workers.model.weights import Weights
from pawl_workers.options import WorkerOptions
from pawl_workers.outcome import Work, conclude
from pawl_workers.parallel import set_num_threads
from pawl_workers.pending import DoneStep, PendingStep
from pawl_workers.pipeline import FAILED_EARLIER, Pipeline
from pawl_workers.plan import LEAST_SAMPLES, RowFailure, StepPlan, StepResult
from pawl_workers.prepare import BatchSettings, build_batch, staged_elements, with_masks
from pawl_workers.row_masks import MaskSource
from pawl_workers.rows import RowTable
from pawl_workers.sampling.batch import QueueingSampler
from pawl_workers.self_test import SelfTest, run_self_test
from pawl_workers.start_plan import StartPlan, plan_start

__all__ = ["Progress", "Worker", "WorkerFacts", "WorkerOptions"]

Progress = Callable[[str, float, float], None]
"""Called with a phase (`weights` or `memory`), bytes done and bytes in all."""


class Worker:
    """A loaded model with its KV cache and row table."""

    def __init__(
        self,
        plan: StartPlan,
        weights: Weights,
        facts: WorkerFacts,
        settings: BatchSettings,
    ) -> None:
        self.facts = facts
        self._config, self._weights, self._settings = plan.config, weights, settings
        with torch.inference_mode():
            self._cache = KvCache.allocate(
                weights.spec, settings.kernels, facts.num_blocks, settings.device, settings.dtype
            )
            self._cache.compile(weights)
            cache_dtype = settings.kernels.cache_dtype(settings.dtype)
            self._host = HostCache(self._cache, facts.num_host_blocks, settings.device, cache_dtype)
            if facts.num_host_blocks:
                fixed_s, block_s = self._host.measure(facts.num_blocks)
                self.facts = dataclasses.replace(facts, restore_fixed_s=fixed_s, restore_block_s=block_s)
        self._step = self._epoch = 0
        self._table = self._new_table()
        self._pipeline = self._new_pipeline()
        self._graphs = self._prepare_graphs()
        self._decodes: Decodes | None = None  # of the last step, if it was one that may go on

    def _prepare_graphs(self) -> DecodeGraphs | None:
        facts, settings, staging = self.facts, self._settings, self._settings.staging
        if staging is not None:  # as large as it will ever have to be: graphs know where their inputs lie
            most_rows = bucket_of(facts.max_running) or facts.max_running
            most_blocks = -(-self._reachable_context // facts.block_size)
            most_samples = max(most_rows, LEAST_SAMPLES)
            most_tokens = max(facts.max_batch_tokens, most_rows)
            staging.begin(staged_elements(most_tokens, most_rows, most_blocks, most_samples))
            staging.send()
        if facts.kernels != "triton" or not DecodeGraphs.serve(self._weights, settings):
            return None
        return DecodeGraphs(self._weights, self._cache, settings)

    @property
    def _reachable_context(self) -> int:
        """Most tokens that a row can have: its last one needs no KV. A context may be longer than any memory."""
        return min(self.facts.max_context, self.facts.num_blocks * self.facts.block_size + 1)

    def _new_table(self) -> RowTable:
        facts = self.facts
        return RowTable(
            facts.max_running,
            self._reachable_context,
            facts.block_size,
            facts.num_blocks,
            facts.vocab_size,
            facts.num_host_blocks,
        )

    def _new_pipeline(self) -> Pipeline | None:
        settings = self._settings
        if self.facts.max_in_flight == 1:
            return None
        sampler = settings.kernels.sampler
        assert isinstance(sampler, QueueingSampler)  # noqa: S101 - narrows the type
        return Pipeline(self._table, self._cache, sampler, settings.device)

    @classmethod
    def load(cls, options: WorkerOptions, on_progress: Progress | None = None) -> Worker:
        """Load a checkpoint and allocate its KV cache.

        Raises:
            CheckpointError: the checkpoint cannot be found, read or understood.
            OutOfMemoryError: weights or KV do not fit.
            WorkerError: the device, type or kernels are not available.
        """
        started = time.perf_counter()
        report = on_progress or (lambda phase, done, total: None)
        set_num_threads(options.num_threads)
        plan = plan_start(options)
        plan.divide_memory()  # refuses what cannot fit before anything is read
        with torch.inference_mode():
            weights = load_weights(
                plan.config,
                plan.kernels,
                plan.device,
                plan.dtype,
                plan.available_bytes,
                lambda done, total: report("weights", done, total),
                reading=plan.reading,
            )
        memory = plan.divide_memory(weights.num_bytes)
        settings = BatchSettings(
            kernels=plan.kernels,
            shape=plan.shape,
            rotaries=tuple(rotary_table(rotary, plan.max_context, plan.device) for rotary in weights.spec.rotaries),
            device=plan.device,
            dtype=plan.dtype,
            staging=plan.staging,
        )
        facts = worker_facts(plan, weights, memory, started)
        worker = cls(plan, weights, facts, settings)
        report("memory", float(memory.kv_bytes), float(memory.kv_bytes))
        return worker

    def execute(self, plan: StepPlan, masks: MaskSource | None = None) -> StepResult:
        """Run one step.

        Args:
            plan: what to compute.
            masks: asked after the forward pass for what some rows may choose; None = all rows may choose anything.

        Raises:
            PlanError: the plan breaks the contract; nothing has changed.
            Exception: what `masks` raised; the worker must be reset.
        """
        return self.launch(plan, masks).result()

    def launch(
        self, plan: StepPlan, masks: MaskSource | None = None, began: Callable[[], object] | None = None
    ) -> PendingStep:
        """Begin one step: on a device it is queued, and the next may be launched before its tokens have come back.

        Settles the steps before it where it needs what they gave, which is before or, for masks and penalties, after
        its forward pass is queued; else all but one of them.

        Args:
            plan: what to compute.
            masks: as of `execute`.
            began: called when the step is prepared, as its forward pass begins; not where nothing is to be computed.

        Raises:
            PlanError: the plan breaks the contract; nothing has changed.
            Exception: what `masks` raised; the worker must be reset.
        """
        started = time.perf_counter()
        if plan.epoch != self._epoch or plan.step != self._step + 1:
            raise PlanError(
                f"step {plan.step} of epoch {plan.epoch} was sent; the worker is after step {self._step} of "
                f"epoch {self._epoch}"
            )
        decodes, self._decodes = self._decodes, None
        with torch.inference_mode():
            if decodes is not None and (batch := decodes.next(plan)) is not None:
                self._step = plan.step
                work = Work(plan, decodes.rows, decodes.num_tokens, [], started, decodes)
                return self._run(work, batch, masks, began)
            return self._launch_anew(plan, masks, started, began)

    def _launch_anew(
        self, plan: StepPlan, masks: MaskSource | None, started: float, began: Callable[[], object] | None
    ) -> PendingStep:
        self._table.check(plan)
        if self._pipeline is not None:
            self._pipeline.make_room()
        self._table.apply(plan)
        self._step = plan.step
        rows, num_tokens = np.array(plan.rows, dtype=np.int64), np.array(plan.num_tokens, dtype=np.int64)
        pipeline = self._pipeline
        if pipeline is not None:
            queues = pipeline.can_queue(plan, rows)
            if not queues:
                pipeline.settle_all()
            pipeline = pipeline if queues else None
        if plan.swap_out or plan.swap_in:
            self._host.swap_out(plan.swap_out)
            self._host.swap_in(plan.swap_in)
        alive = ~self._table.failed[rows]
        failures = [RowFailure(row, FAILED_EARLIER) for row in rows[~alive].tolist()]
        rows, num_tokens = rows[alive], num_tokens[alive]
        if len(rows) == 0:
            self._cache.copy_blocks(plan.copies)
            seconds = time.perf_counter() - started
            return DoneStep(StepResult(plan.step, plan.epoch, [], [], [], [], failures, seconds, 0.0, 0.0))
        num_drafts = _num_drafts(plan, rows) if plan.drafts else None
        padded = self._graph_rows(rows, num_tokens) if num_drafts is None else None
        batch, _ = build_batch(self._table, rows, num_tokens, self._settings, padded, num_drafts)
        if pipeline is None:
            decodes = Decodes.after(batch, rows, self._table, self._settings) if num_drafts is None else None
            return self._run(Work(plan, rows, num_tokens, failures, started, decodes), batch, masks, began, padded)
        pipeline.insert(batch)
        prepared = time.perf_counter()
        if began is not None:
            began()
        stream, scores = self._compute(batch, len(rows), padded)
        if masks is not None or pipeline.choice_must_wait(plan):
            pipeline.settle_all()
        if masks is not None:
            batch = with_masks(batch, masks())
        return pipeline.add(plan, rows, num_tokens, failures, stream, scores, batch.sampling, started, prepared)

    def _run(
        self,
        work: Work,
        batch: Batch,
        masks: MaskSource | None,
        began: Callable[[], object] | None,
        padded: int | None = None,
    ) -> DoneStep:
        """Compute a step, and wait for it; what may go on from it is kept if no row fails."""
        prepared = time.perf_counter()
        if began is not None:
            began()
        output = choose(batch, self._weights, self._cache) if masks is None else None
        if output is None:
            stream, scores = self._compute(batch, len(work.rows), padded)
            if masks is not None:
                batch = with_masks(batch, masks())
            output = finish(stream, scores, batch, self._weights)
        forward_s = time.perf_counter() - prepared - output.sampled.sample_s
        result = conclude(work, batch.sampling, output, self._table, self._cache, prepared - work.started, forward_s)
        self._decodes = None if output.sampled.failures or result.failures else work.decodes
        return DoneStep(result)

    def _compute(self, batch: Batch, num_rows: int, padded: int | None) -> tuple[Tensor, Tensor]:
        if self._graphs is None or padded is None:
            return compute(batch, self._weights, self._cache)
        stream, scores = self._graphs.run(batch)
        return stream[:num_rows], scores[:num_rows]

    def _graph_rows(self, rows: IntArray, num_tokens: IntArray) -> int | None:
        """Rows of the captured graph that computes a step; None where none can."""
        if self._graphs is None:
            return None
        table = self._table
        samples = table.samples[rows] & (table.num_computed[rows] + num_tokens == table.num_tokens[rows])
        return self._graphs.rows_of(num_tokens, int(samples.sum()))

    def take_kernel_seconds(self) -> KernelSeconds | None:
        """Seconds by the kernels' own clocks since this was last called; None where kernels do not count."""
        program = self._cache.program
        return program.take_seconds() if isinstance(program, CpuProgram) else None

    def reset(self, epoch: int) -> None:
        """Forget every row and begin an epoch: the next plan is its step 1. KV blocks keep their contents."""
        self._table = self._new_table()
        self._pipeline = self._new_pipeline()
        self._decodes = None
        self._step, self._epoch = 0, epoch

    def self_test(self) -> SelfTest:
        """Generate tokens and compare them with the reference kernels. Forgets every row.

        Raises:
            SelfTestError: the log-probabilities differ by more than the tolerance.
        """
        epoch = self._epoch
        self.reset(epoch)
        try:
            return run_self_test(
                self.execute,
                epoch,
                self._weights,
                self._settings,
                self.facts.max_context,
                self.facts.num_blocks,
                self._config.bos_token_id,
            )
        finally:
            self.reset(epoch)


def _num_drafts(plan: StepPlan, rows: IntArray) -> IntArray:
    counts = {row: len(ids) for row, ids in plan.drafts}
    return np.array([counts.get(row, 0) for row in rows.tolist()], dtype=np.int64)
