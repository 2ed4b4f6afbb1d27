"""What a worker is started with, and the device and type that this means here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pawl_workers.errors import WorkerError

__all__ = ["WorkerOptions", "choose_device", "choose_dtype"]

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
    most_kv_bytes: int | None = None  # bounds what memory_fraction gives
    kv_bytes: int | None = None
    host_kv_bytes: int = 0  # second tier of KV blocks in host memory; 0 = none
    revision: str | None = None  # of a hub id
    strict: bool = False  # on cuda: bits that depend on nothing else in the step, at some cost; a cpu always does so


def choose_device(name: str) -> torch.device:
    """Find a device by its name.

    Raises:
        WorkerError: there is none, or it is of a kind that is not supported.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WorkerError(f"there is no device {name!r}; known: cpu, cuda, cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise WorkerError(f"device {name!r} is not supported; known: cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise WorkerError("this torch finds no CUDA device; use --device cpu")
    return device


def choose_dtype(options: WorkerOptions) -> torch.dtype:
    """Find the type in which a worker of these options computes.

    Raises:
        WorkerError: it is not supported.
    """
    if options.dtype == "auto":
        return torch.float32 if options.device == "cpu" else torch.bfloat16
    if options.dtype not in _DTYPES:
        raise WorkerError(f"dtype {options.dtype!r} is not supported; known: auto, {', '.join(_DTYPES)}")
    return _DTYPES[options.dtype]
