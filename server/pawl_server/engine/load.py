"""How an engine gets its worker. The one place in the server that imports torch, and only when it is called."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from pawl_server.config import EngineSettings, ModelSettings
from pawl_server.engine.engine_worker import EngineWorker
from pawl_server.engine.spec import EngineSpec
from pawl_workers.parallel import thread_environment

if TYPE_CHECKING:
    from pawl_workers.options import WorkerOptions

__all__ = ["LoadProgress", "LoadWorker", "load_torch_worker", "share_device", "worker_options"]

LoadProgress = Callable[[str, int, int], None]  # phase, done, total
LoadWorker = Callable[[EngineSpec, LoadProgress], EngineWorker]


def load_torch_worker(spec: EngineSpec, on_progress: LoadProgress) -> EngineWorker:
    """Load the model of a spec.

    Raises:
        pawl_workers.errors.WorkerError: the checkpoint is broken or does not fit.
    """
    num_threads = spec.num_threads or len(os.sched_getaffinity(0))
    # The fleets set these, too, but not whoever runs an engine in a process of their own.
    os.environ |= thread_environment(num_threads)
    from pawl_workers.worker import Worker  # noqa: PLC0415 (imports torch)

    on_progress("imports", 1, 1)
    options = worker_options(spec.model, spec.engine, num_threads)
    options = share_device(options, spec.memory_bytes, spec.replicas_per_gpu)
    return Worker.load(options, lambda phase, done, total: on_progress(phase, int(done), int(total)))


def worker_options(model: ModelSettings, engine: EngineSettings, num_threads: int) -> WorkerOptions:
    """What settings mean to a worker on this machine."""
    import torch  # noqa: PLC0415 (heavy)

    from pawl_workers.options import WorkerOptions  # noqa: PLC0415 (imports torch)

    cuda = model.device == "cuda" or (model.device == "auto" and torch.cuda.is_available())
    return WorkerOptions(
        model=model.model,
        revision=model.revision or None,
        device="cuda" if cuda else "cpu",
        dtype=model.dtype,
        kernels=model.kernels,
        kv_dtype=model.kv_dtype,
        weight_dtype=model.weight_dtype,
        strict=model.strict,
        screen_head=model.screen_head,
        num_threads=num_threads,
        max_context=model.max_context or None,
        max_running=engine.max_running,
        max_batch_tokens=engine.max_batch_tokens,
        num_blocks=engine.num_blocks or None,
        memory_fraction=engine.kv_memory_fraction,
        most_kv_bytes=engine.kv_max_bytes or None,
        host_kv_bytes=engine.host_kv_bytes,
        dummy_weights=model.dummy_weights,
    )


def share_device(options: WorkerOptions, host_bytes: int, replicas_per_gpu: int) -> WorkerOptions:
    """Bound a worker to its share of the device that it computes on.

    Args:
        options: of the worker alone.
        host_bytes: its share of the host's memory; 0 = no other replica is there.
        replicas_per_gpu: replicas on its GPU, itself included.
    """
    from pawl_workers.memory import gpu_share  # noqa: PLC0415 (imports torch)
    from pawl_workers.options import choose_device  # noqa: PLC0415 (imports torch)

    if options.device == "cpu":
        return dataclasses.replace(options, memory_bytes=host_bytes or None)
    if replicas_per_gpu == 1:
        return options
    return dataclasses.replace(options, memory_bytes=gpu_share(choose_device(options.device), replicas_per_gpu))
