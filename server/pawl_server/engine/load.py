"""How an engine gets its worker. The one place in the server that imports torch, and only when it is called."""

from __future__ import annotations

import os
from collections.abc import Callable

from pawl_server.engine.executor import EngineWorker
from pawl_server.engine.spec import EngineSpec

__all__ = ["LoadProgress", "LoadWorker", "load_torch_worker"]

LoadProgress = Callable[[str, int, int], None]  # phase, done, total
LoadWorker = Callable[[EngineSpec, LoadProgress], EngineWorker]


def load_torch_worker(spec: EngineSpec, on_progress: LoadProgress) -> EngineWorker:
    """Load the model of a spec.

    Raises:
        pawl_workers.errors.WorkerError: the checkpoint is broken or does not fit.
    """
    num_threads = spec.num_threads or len(os.sched_getaffinity(0))
    # Read once, when torch is imported; spinning threads of one replica would starve those of the next.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # but not so soon asleep as to miss the next layer
    import torch  # noqa: PLC0415 (heavy)

    from pawl_workers.memory import available_bytes  # noqa: PLC0415 (imports torch)
    from pawl_workers.worker import Worker, WorkerOptions  # noqa: PLC0415 (imports torch)

    cuda = spec.model.device == "cuda" or (spec.model.device == "auto" and torch.cuda.is_available())
    fraction, most = spec.engine.kv_memory_fraction, spec.engine.kv_max_bytes
    if most:
        # The share is of what weights and activations leave, which is less: so this is at most `most` bytes.
        fraction = min(fraction, most / available_bytes(torch.device("cuda" if cuda else "cpu")))
    options = WorkerOptions(
        model=spec.model.model,
        revision=spec.model.revision or None,
        device="cuda" if cuda else "cpu",
        dtype=spec.model.dtype,
        kernels=spec.model.kernels,
        num_threads=num_threads,
        max_context=spec.model.max_context or None,
        max_running=spec.engine.max_running,
        max_batch_tokens=spec.engine.max_batch_tokens,
        num_blocks=spec.engine.num_blocks or None,
        memory_fraction=fraction,
    )
    return Worker.load(options, lambda phase, done, total: on_progress(phase, int(done), int(total)))
