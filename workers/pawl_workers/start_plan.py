"""The plan of a start: what options and checkpoint lead to, worked out before a single weight is read.

`Worker.load` starts by it and `pawl plan` prints it, so that what is promised is what happens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from pawl_workers.batch import AttentionShape
from pawl_workers.errors import CheckpointError, OutOfMemoryError, WorkerError
from pawl_workers.kernels import Kernels, choose_backend
from pawl_workers.memory import MemoryPlan, activation_bytes, available_bytes, plan_memory
from pawl_workers.model.checkpoint_config import CheckpointConfig, read_config
from pawl_workers.model.headers import StoredTensor, folder_headers, hub_headers
from pawl_workers.model.loading import Reading, plan_dummy, plan_reading
from pawl_workers.model.source import is_hub_id, resolve_checkpoint
from pawl_workers.options import WorkerOptions, choose_device, choose_dtype, choose_precision
from pawl_workers.staging import Staging

__all__ = ["StartPlan", "explain_kernels", "plan_checkpoint", "plan_start"]

_FAST_KERNELS = {"cuda": ("triton",), "cpu": ("cpu", "onednn")}  # by device, the fastest first


@dataclass(frozen=True, slots=True)
class StartPlan:
    """What a worker of these options will be.

    Attributes:
        dtype: in which it computes.
        staging: carries a step's integers to a GPU; the kernels' own.
        available_bytes: on the device, before anything is read, and no more than `memory_bytes` of the options.
        weight_bytes: packed; exact for fp16 weights, else the most: bf16 may be coded in 12 bits.
        activation_bytes: of the largest step, at most.
        block_bytes: of one KV block in all layers.
    """

    options: WorkerOptions
    config: CheckpointConfig
    reading: Reading
    device: torch.device
    dtype: torch.dtype
    kernels: Kernels
    staging: Staging | None
    shape: AttentionShape
    max_context: int
    available_bytes: int
    weight_bytes: int
    activation_bytes: int
    block_bytes: int

    def divide_memory(self, weight_bytes: int | None = None) -> MemoryPlan:
        """Divide the memory.

        Args:
            weight_bytes: what the weights take, once that is known.

        Raises:
            OutOfMemoryError: it is not enough; the message has every part and the remedy.
        """
        options = self.options
        needed = self.weight_bytes if weight_bytes is None else weight_bytes
        # Host blocks come out of the same memory on a CPU.
        host_bytes = options.host_kv_bytes if self.device.type == "cpu" else 0
        try:
            return plan_memory(
                available=self.available_bytes - host_bytes,
                weights=needed,
                activations=self.activation_bytes,
                block_bytes=self.block_bytes,
                most_blocks=options.max_running * -(-self.max_context // self.kernels.block_size),
                num_blocks=options.num_blocks,
                kv_bytes=options.kv_bytes,
                most_kv_bytes=options.most_kv_bytes,
                memory_fraction=options.memory_fraction,
            )
        except OutOfMemoryError as error:
            where, remedy = str(self.device), ""
            if options.memory_bytes is not None:
                where += f" beside the other replicas, of which each may take {options.memory_bytes / 1e6:.2f} MB"
                remedy = ", or lower replicas"
            raise OutOfMemoryError(f"{options.model} does not fit on {where}: {error}{remedy}") from error


def plan_start(options: WorkerOptions, *, fetch: bool = True) -> StartPlan:
    """Plan a start.

    Args:
        options: of the worker.
        fetch: get the weights of a hub id, too; else only its configuration and the headers of its weights.

    Raises:
        CheckpointError: the checkpoint cannot be found, read or understood.
        WorkerError: device, type or kernels are not available.
    """
    choose_device(options.device), choose_dtype(options)  # wrong ones are refused before anything is fetched
    config = read_config(
        resolve_checkpoint(options.model, options.revision, tokenizer_only=not fetch or options.dummy_weights)
    )
    if options.dummy_weights:
        return plan_checkpoint(options, config, plan_dummy(config))
    reading = plan_reading(config, _headers(options, config.folder, fetch=fetch))
    return plan_checkpoint(options, config, reading)


def plan_checkpoint(options: WorkerOptions, config: CheckpointConfig, reading: Reading) -> StartPlan:
    """Plan a start with a checkpoint whose configuration and headers are read, whatever model the options name.

    Raises:
        WorkerError: device, type or kernels are not available.
    """
    device, dtype, spec = choose_device(options.device), choose_dtype(options), config.spec
    shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    available = available_bytes(device)
    staging = Staging(device)
    kernels = choose_backend(
        device,
        dtype,
        shape,
        options.kernels,
        precision=choose_precision(options),
        staging=staging,
        strict=options.strict,
    )
    block_bytes = (
        spec.num_layers * kernels.cache_dtype(dtype).itemsize * sum(map(math.prod, kernels.cache_shapes(1, shape)))
    )
    if 0 < options.host_kv_bytes < block_bytes:
        raise WorkerError(
            f"host_kv_bytes = {options.host_kv_bytes} holds no KV block, which takes {block_bytes} bytes in all "
            "layers: raise it, or set 0 for no host tier"
        )
    if options.strict and device.type == "cuda" and kernels.name != "triton":
        raise WorkerError(
            f"strict on {device} needs the triton kernels, whose sums do not depend on the batch, not {kernels.name}: "
            "set kernels = triton to see why they do not serve, or leave strict out"
        )
    return StartPlan(
        options=options,
        config=config,
        reading=reading,
        device=device,
        dtype=dtype,
        kernels=kernels,
        staging=staging if device.type == "cuda" else None,
        shape=shape,
        max_context=min(spec.max_context, options.max_context or spec.max_context),
        available_bytes=available if options.memory_bytes is None else min(available, options.memory_bytes),
        weight_bytes=reading.held_bytes(kernels, dtype),
        activation_bytes=activation_bytes(spec, options.max_batch_tokens, options.max_running, dtype.itemsize),
        block_bytes=block_bytes,
    )


def _headers(options: WorkerOptions, folder: Path, *, fetch: bool) -> list[StoredTensor]:
    try:
        return folder_headers(folder)
    except CheckpointError:
        if fetch or not is_hub_id(options.model):
            raise
    return hub_headers(options.model, options.revision)


def explain_kernels(plan: StartPlan) -> str:
    """Say why a plan has the kernels it has: asked for, or the fastest that serve, and why no faster ones do."""
    asked, chosen = plan.options.kernels, plan.kernels.name
    if asked != "auto":
        return f"asked for (kernels = {asked})"
    reasons = []
    for name in _FAST_KERNELS[plan.device.type]:
        if name == chosen:
            break
        try:
            choose_backend(plan.device, plan.dtype, plan.shape, name, precision=choose_precision(plan.options))
        except WorkerError as error:
            reasons.append(f"not {name}: {error}")
    served = f"{str(plan.dtype).removeprefix('torch.')} on {plan.device}, heads of {plan.shape.head_dim}"
    return "; ".join([f"the fastest for {served}", *reasons])
