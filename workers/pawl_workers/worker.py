"""Worker: one model on one device. Told what to do by step plans, it answers with step results.

Knows no scheduling, no sockets and no Ray. Its KV and its rows are soft state: `reset` forgets them, and the
scheduler can send every sequence again.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pawl_workers.batch import AttentionShape, IntArray
from pawl_workers.errors import PlanError, WorkerError
from pawl_workers.forward import StepOutput, forward
from pawl_workers.host_cache import HostCache
from pawl_workers.kernels import Kernels, choose_backend
from pawl_workers.kv_cache import KvCache
from pawl_workers.memory import MemoryPlan, activation_bytes, available_bytes, plan_memory
from pawl_workers.model.loading import CheckpointConfig, load_weights, read_config
from pawl_workers.model.rotary import rotary_table
from pawl_workers.model.source import checkpoint_revision, resolve_checkpoint
from pawl_workers.model.weights import Weights
from pawl_workers.parallel import set_num_threads
from pawl_workers.plan import RowFailure, StepPlan, StepResult
from pawl_workers.prepare import BatchSettings, build_batch
from pawl_workers.rows import RowTable
from pawl_workers.self_test import SelfTest, run_self_test

__all__ = ["Progress", "Worker", "WorkerFacts", "WorkerOptions"]

Progress = Callable[[str, float, float], None]
"""Called with a phase (`weights` or `memory`), bytes done and bytes in all."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker is started with."""

    model: str  # a folder, a hub id, or `demo`
    device: str = "cpu"
    dtype: str = "auto"  # auto: float32 on cpu, bfloat16 on cuda
    kernels: str = "auto"
    num_threads: int = 1
    max_context: int | None = None  # None: the model's
    max_running: int = 64  # rows
    max_batch_tokens: int = 512
    num_blocks: int | None = None  # None: from kv_bytes or memory_fraction
    memory_fraction: float = 0.5  # share of the memory left beside weights and activations that KV may take
    kv_bytes: int | None = None
    host_kv_bytes: int = 0  # second tier of KV blocks in host memory; 0 = none
    revision: str | None = None  # of a hub id


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a loaded worker is. `num_blocks` are usable: their ids are 1 to num_blocks."""

    architectures: tuple[str, ...]
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    data_type: str
    revision: str
    block_size: int
    num_blocks: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    num_parameters: int
    kernels: str
    device: str
    num_threads: int
    max_running: int
    max_batch_tokens: int
    num_host_blocks: int
    restore_fixed_s: float  # measured: of bringing any number of blocks back from the host
    restore_block_s: float  # and of each of them
    load_s: float


class Worker:
    """A loaded model with its KV cache and row table."""

    def __init__(
        self,
        options: WorkerOptions,
        config: CheckpointConfig,
        weights: Weights,
        kernels: Kernels,
        facts: WorkerFacts,
        settings: BatchSettings,
    ) -> None:
        self.facts = facts
        self._options, self._config, self._weights, self._settings = options, config, weights, settings
        device, dtype = settings.device, settings.dtype
        with torch.inference_mode():
            self._cache = KvCache.allocate(weights.spec, kernels, facts.num_blocks, device, dtype)
            self._host = HostCache(self._cache, facts.num_host_blocks, device, dtype)
            if facts.num_host_blocks:
                fixed_s, block_s = self._host.measure(facts.num_blocks)
                self.facts = dataclasses.replace(facts, restore_fixed_s=fixed_s, restore_block_s=block_s)
        self._step = self._epoch = 0
        self._table = self._new_table()

    def _new_table(self) -> RowTable:
        facts = self.facts
        return RowTable(
            facts.max_running,
            facts.max_context,
            facts.block_size,
            facts.num_blocks,
            facts.vocab_size,
            facts.num_host_blocks,
        )

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
        device, dtype = _device(options.device), _dtype(options)
        config = read_config(resolve_checkpoint(options.model, options.revision))
        spec = config.spec
        shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        kernels = choose_backend(device, dtype, shape, options.kernels)
        element_bytes = torch.empty(0, dtype=dtype).element_size()
        available = available_bytes(device)
        with torch.inference_mode():
            weights = load_weights(
                config,
                kernels,
                device,
                dtype,
                available,
                lambda done, total: report("weights", done, total),
            )
        max_context = min(spec.max_context, options.max_context or spec.max_context)
        per_sequence = -(-max_context // kernels.block_size)
        activations = activation_bytes(spec, options.max_batch_tokens, options.max_running, element_bytes)
        block_bytes = spec.num_layers * element_bytes * sum(map(math.prod, kernels.cache_shapes(1, shape)))
        memory = plan_memory(
            available=available,
            weights=weights.num_bytes,
            activations=activations,
            block_bytes=block_bytes,
            most_blocks=options.max_running * per_sequence,
            num_blocks=options.num_blocks,
            kv_bytes=options.kv_bytes,
            memory_fraction=options.memory_fraction,
        )
        settings = BatchSettings(
            kernels=kernels,
            shape=shape,
            rotaries=tuple(rotary_table(rotary, max_context, device) for rotary in spec.rotaries),
            device=device,
            dtype=dtype,
        )
        facts = _facts(
            options, config, weights, memory, settings, max_context, options.host_kv_bytes // block_bytes, started
        )
        worker = cls(options, config, weights, kernels, facts, settings)
        report("memory", float(memory.kv_bytes), float(memory.kv_bytes))
        return worker

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step.

        Raises:
            PlanError: the plan breaks the contract; nothing has changed.
        """
        started = time.perf_counter()
        if plan.epoch != self._epoch or plan.step != self._step + 1:
            raise PlanError(
                f"step {plan.step} of epoch {plan.epoch} was sent; the worker is after step {self._step} of "
                f"epoch {self._epoch}"
            )
        self._table.check(plan)
        self._table.apply(plan)
        self._step = plan.step
        self._move(plan)
        rows, num_tokens = np.array(plan.rows, dtype=np.int64), np.array(plan.num_tokens, dtype=np.int64)
        alive = ~self._table.failed[rows]
        failures = [RowFailure(row, "the row failed in an earlier step") for row in rows[~alive].tolist()]
        rows, num_tokens = rows[alive], num_tokens[alive]
        if len(rows) == 0:
            return StepResult(plan.step, plan.epoch, [], [], [], [], failures, time.perf_counter() - started, 0.0, 0.0)
        with torch.inference_mode():
            batch, sampling_rows = build_batch(self._table, rows, num_tokens, self._settings)
            prepared = time.perf_counter()
            output = forward(batch, self._weights, self._cache)
            forward_s = time.perf_counter() - prepared - output.sampled.sample_s
            failed = self._find_failures(output, rows, num_tokens, sampling_rows)
        self._table.num_computed[rows] += num_tokens
        failures += [RowFailure(row, message) for row, message in failed.items()]
        return self._settle(plan, output, sampling_rows, failed, failures, prepared - started, forward_s)

    def _move(self, plan: StepPlan) -> None:
        if plan.swap_out or plan.swap_in or plan.copies:
            with torch.inference_mode():
                self._host.swap_out(plan.swap_out)
                self._host.swap_in(plan.swap_in)
                self._cache.copy_blocks(plan.copies)

    def _find_failures(
        self, output: StepOutput, rows: IntArray, num_tokens: IntArray, sampling_rows: IntArray
    ) -> dict[int, str]:
        failed = {int(sampling_rows[i]): message for i, message in output.sampled.failures.items()}
        # Where a stream is not finite, neither are the keys and values just written.
        finite = output.stream.sum(dim=-1, dtype=torch.float32).isfinite()
        if not bool(finite.all()):
            tokens = np.repeat(rows, num_tokens)[~finite.cpu().numpy()]
            for row in np.unique(tokens).tolist():
                failed[row] = "the hidden state is not finite"
                self._cache.make_finite(self._table.blocks_of(row).tolist())
        for row in failed:
            self._table.failed[row] = True
        return failed

    def _settle(
        self,
        plan: StepPlan,
        output: StepOutput,
        sampling_rows: IntArray,
        failed: dict[int, str],
        failures: list[RowFailure],
        prepare_s: float,
        forward_s: float,
    ) -> StepResult:
        sampled = output.sampled
        result_rows, token_ids, kept = [], [], []
        for i, (row, token_id) in enumerate(zip(sampling_rows.tolist(), sampled.token_ids, strict=True)):
            if token_id is not None and row not in failed:
                result_rows.append(row)
                token_ids.append(token_id)
                kept.append(i)
        self._table.append_tokens(result_rows, token_ids)
        return StepResult(
            step=plan.step,
            epoch=plan.epoch,
            rows=result_rows,
            token_ids=token_ids,
            logprobs=[sampled.logprobs[i] for i in kept] if sampled.logprobs else [],
            prompt_logprobs=[entry for entry in output.prompts if entry.row not in failed],
            failures=failures,
            prepare_s=prepare_s,
            forward_s=forward_s,
            sample_s=sampled.sample_s,
        )

    def reset(self, epoch: int) -> None:
        """Forget every row and begin an epoch: the next plan is its step 1. KV blocks keep their contents."""
        self._table = self._new_table()
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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WorkerError(f"there is no device {name!r}; known: cpu, cuda, cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise WorkerError(f"device {name!r} is not supported; known: cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise WorkerError("this torch finds no CUDA device; use --device cpu")
    return device


def _dtype(options: WorkerOptions) -> torch.dtype:
    if options.dtype == "auto":
        return torch.float32 if options.device == "cpu" else torch.bfloat16
    if options.dtype not in _DTYPES:
        raise WorkerError(f"dtype {options.dtype!r} is not supported; known: auto, {', '.join(_DTYPES)}")
    return _DTYPES[options.dtype]


def _facts(
    options: WorkerOptions,
    config: CheckpointConfig,
    weights: Weights,
    memory: MemoryPlan,
    settings: BatchSettings,
    max_context: int,
    num_host_blocks: int,
    started: float,
) -> WorkerFacts:
    return WorkerFacts(
        architectures=config.architectures,
        vocab_size=weights.spec.vocab_size,
        max_context=max_context,
        eos_token_ids=config.eos_token_ids,
        data_type=str(settings.dtype).removeprefix("torch."),
        revision=checkpoint_revision(config.folder),
        block_size=settings.kernels.block_size,
        num_blocks=memory.num_blocks,
        weight_bytes=memory.weight_bytes,
        kv_bytes=memory.kv_bytes,
        activation_bytes=memory.activation_bytes,
        num_parameters=weights.num_parameters,
        kernels=settings.kernels.name,
        device=str(settings.device),
        num_threads=options.num_threads,
        max_running=options.max_running,
        max_batch_tokens=options.max_batch_tokens,
        num_host_blocks=num_host_blocks,
        restore_fixed_s=0.0,
        restore_block_s=0.0,
        load_s=time.perf_counter() - started,
    )
