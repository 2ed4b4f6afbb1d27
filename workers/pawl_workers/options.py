"""What a worker is started with, and the device and type that this means here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from pawl_workers.errors import WorkerError
from pawl_workers.kernels import Precision

__all__ = ["WorkerOptions", "choose_device", "choose_dtype", "choose_precision"]

_KV_DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_WEIGHT_DTYPES: dict[str, tuple[torch.dtype | None, int | None]] = {
    "auto": (None, None),
    "int8": (torch.int8, None),
    "int8_g32": (torch.int8, 32),
    "int8_g64": (torch.int8, 64),
    "int8_g128": (torch.int8, 128),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker is started with."""

    model: str  # a folder, a hub id, or `demo`
    device: str = "cpu"
    dtype: str = "auto"  # auto: float32 on cpu, bfloat16 on cuda
    kernels: str = "auto"
    kv_dtype: str = "auto"  # of cached keys and values; auto: as computed; float16 and int8 on the cpu kernels
    weight_dtype: str = "auto"  # of linear layers; auto: exact; int8 per output feature, int8_gN per N inputs of it
    num_threads: int = 1
    max_context: int | None = None  # None: the model's
    max_running: int = 64  # rows
    max_batch_tokens: int = 512
    memory_bytes: int | None = None  # most of its device's memory, where others share it; None: all that is free
    num_blocks: int | None = None  # None: from kv_bytes or memory_fraction
    memory_fraction: float = 0.5  # share of the memory left beside weights and activations that KV may take
    most_kv_bytes: int | None = None  # bounds what memory_fraction gives
    kv_bytes: int | None = None
    host_kv_bytes: int = 0  # second tier of KV blocks in host memory; 0 = none
    revision: str | None = None  # of a hub id
    strict: bool = False  # on cuda: bits that depend on nothing else in the step, at some cost; a cpu always does so
    screen_head: bool = True  # on the cpu kernels: the head in bytes too, for greedy rows
    dummy_weights: bool = False  # random ones in the configured shapes, bf16; none are read


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


def choose_precision(options: WorkerOptions) -> Precision:
    """Find how exactly keys, values and weights are kept.

    Raises:
        WorkerError: a type is not known.
    """
    choices: tuple[tuple[str, str, Collection[str]], ...] = (
        ("kv_dtype", options.kv_dtype, _KV_DTYPES),
        ("weight_dtype", options.weight_dtype, _WEIGHT_DTYPES),
    )
    for name, value, known in choices:
        if value not in known:
            raise WorkerError(f"{name} {value!r} is not supported; known: {', '.join(known)}")
    return Precision(_KV_DTYPES[options.kv_dtype], *_WEIGHT_DTYPES[options.weight_dtype], screened=options.screen_head)
