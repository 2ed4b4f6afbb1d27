"""`pawl plan MODEL`: what a server of these settings would take of this machine, without loading a weight.

Works out the same plan by which a worker starts (`pawl_workers.start_plan`), from the configuration and the headers
of the weights; of a model on the hub it fetches no more than these. Imports torch, for the kernels, and no Ray.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pawl_server.config import Config
from pawl_server.engine.load import share_device, worker_options
from pawl_server.engine.spec import check_engine
from pawl_server.fleet.local_fleet import visible_gpus
from pawl_server.fleet.specs import num_cores, replicas_per_gpu, replicas_per_machine, served_name
from pawl_workers.errors import OutOfMemoryError, WorkerError
from pawl_workers.memory import MemoryPlan
from pawl_workers.start_plan import StartPlan, explain_kernels, plan_checkpoint, plan_start

__all__ = ["Alternative", "ModelPlan", "plan_model"]

_Choice = tuple[str, str, str, str]  # kernels, dtype, kv_dtype, weight_dtype
_ALTERNATIVES: dict[str, tuple[_Choice, ...]] = {
    "cpu": (
        ("cpu", "float32", "auto", "auto"),
        ("cpu", "float32", "float16", "auto"),
        ("cpu", "float32", "int8", "auto"),
        ("cpu", "float32", "auto", "int8"),
        ("cpu", "float32", "auto", "int8_g128"),
        ("cpu", "float32", "auto", "int8_g64"),
        ("cpu", "float32", "auto", "int8_g32"),
        ("cpu", "float32", "float16", "int8"),
        ("cpu", "float32", "int8", "int8"),
        ("onednn", "float32", "auto", "auto"),
        ("reference", "float32", "auto", "auto"),
        ("reference", "bfloat16", "auto", "auto"),
    ),
    "cuda": (
        ("triton", "bfloat16", "auto", "auto"),
        ("triton", "float16", "auto", "auto"),
        ("triton", "float32", "auto", "auto"),
        ("reference", "bfloat16", "auto", "auto"),
    ),
}


@dataclass(frozen=True, slots=True)
class Alternative:
    """What other kernels or other types would take; `refused` says why they cannot serve or do not fit.

    `kv_dtype` and `weight_dtype` are as in the settings: "auto" is what the kernels compute in, and exact weights.
    """

    kernels: str
    dtype: str
    kv_dtype: str = "auto"
    weight_dtype: str = "auto"
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    cache_tokens: int = 0
    requests: int = 0
    refused: str = ""


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A plan in numbers, for `--json`; sizes in bytes, of one replica but for `available_bytes` and `reserve_bytes`.

    Attributes:
        replicas_sharing: replicas that take the available memory: on one machine, or one GPU of it.
        reserve_bytes: what all of them leave.
        weight_bytes: in memory; exact for fp16 weights, else the most: bf16 may be kept in 12 bits.
        stored_bytes: in the files.
        cache_tokens: tokens whose keys and values fit at once.
        requests: sequences of `max_context` tokens that fit at once.
        longest_request: tokens of prompt and output of the longest request that can be served.
        full_context_kv_bytes: KV that a single request of `max_context` tokens takes.
        refused: why it does not fit; empty if it does. Else blocks, tokens and requests are 0.
    """

    model: str
    architecture: str
    num_parameters: int
    num_layers: int
    vocab_size: int
    max_context: int
    replicas: int
    replicas_sharing: int
    num_threads: int
    device: str
    dtype: str
    stored_dtypes: tuple[str, ...]
    kernels: str
    kernels_reason: str
    available_bytes: int
    stored_bytes: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    reserve_bytes: int
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    cache_tokens: int
    requests: int
    longest_request: int
    full_context_kv_bytes: int
    refused: str
    alternatives: tuple[Alternative, ...]


def plan_model(config: Config) -> ModelPlan:
    """Plan the model of the settings.

    Raises:
        InvalidRequest: settings contradict each other.
        WorkerError: the checkpoint cannot be found, read or understood, or what was asked for cannot serve it.
    """
    check_engine(config.engine)
    replicas = config.fleet.replicas
    num_threads = config.engine.num_threads or max(1, num_cores() // replicas)
    options = worker_options(config.model, config.engine, num_threads)
    plan = plan_start(options, fetch=False)
    available = plan.available_bytes
    sharing = _replicas_sharing(config, plan.device.type)
    if sharing > 1:
        options = share_device(options, available // sharing, sharing)
        plan = plan_checkpoint(options, plan.config, plan.reading)
    spec, main = plan.config.spec, _numbers(plan)
    kv_bytes = reserve_bytes = num_blocks = longest = 0
    if not main.refused:
        memory = plan.divide_memory()
        kv_bytes, num_blocks = memory.kv_bytes, memory.num_blocks
        reserve_bytes = available - sharing * _replica_bytes(plan, memory)
        longest = min(plan.max_context, main.cache_tokens + 1)  # the last token's KV is never needed
    return ModelPlan(
        model=served_name(config),
        architecture=spec.architecture,
        num_parameters=plan.reading.num_parameters,
        num_layers=spec.num_layers,
        vocab_size=spec.vocab_size,
        max_context=plan.max_context,
        replicas=replicas,
        replicas_sharing=sharing,
        num_threads=num_threads,
        device=str(plan.device),
        dtype=main.dtype,
        stored_dtypes=plan.reading.stored_dtypes,
        kernels=main.kernels,
        kernels_reason=explain_kernels(plan),
        available_bytes=available,
        stored_bytes=plan.reading.stored_bytes,
        weight_bytes=main.weight_bytes,
        activation_bytes=plan.activation_bytes,
        kv_bytes=kv_bytes,
        reserve_bytes=reserve_bytes,
        block_size=plan.kernels.block_size,
        num_blocks=num_blocks,
        kv_bytes_per_token=main.kv_bytes_per_token,
        cache_tokens=main.cache_tokens,
        requests=main.requests,
        longest_request=longest,
        full_context_kv_bytes=(-(-(plan.max_context - 1) // plan.kernels.block_size) + 1) * plan.block_bytes,
        refused=main.refused,
        alternatives=tuple(_alternative(plan, *choice) for choice in _ALTERNATIVES[options.device]),
    )


def _replicas_sharing(config: Config, device_kind: str) -> int:
    """Replicas whose memory is that of one device."""
    if device_kind == "cpu":
        return replicas_per_machine(config)
    return replicas_per_gpu(config, len(visible_gpus(config)))


def _alternative(plan: StartPlan, kernels: str, dtype: str, kv_dtype: str, weight_dtype: str) -> Alternative:
    options = dataclasses.replace(
        plan.options, kernels=kernels, dtype=dtype, kv_dtype=kv_dtype, weight_dtype=weight_dtype
    )
    try:
        return _numbers(plan_checkpoint(options, plan.config, plan.reading))
    except WorkerError as error:
        return Alternative(kernels, dtype, kv_dtype, weight_dtype, refused=str(error))


def _numbers(plan: StartPlan) -> Alternative:
    options, block_size = plan.options, plan.kernels.block_size
    found = Alternative(
        kernels=plan.kernels.name,
        dtype=str(plan.dtype).removeprefix("torch."),
        kv_dtype=options.kv_dtype,
        weight_dtype=options.weight_dtype,
        weight_bytes=plan.weight_bytes,
        kv_bytes_per_token=plan.block_bytes // block_size,
    )
    try:
        memory = plan.divide_memory()
    except OutOfMemoryError as error:
        return dataclasses.replace(found, refused=str(error))
    tokens = memory.num_blocks * block_size
    return dataclasses.replace(found, cache_tokens=tokens, requests=tokens // plan.max_context)


def _replica_bytes(plan: StartPlan, memory: MemoryPlan) -> int:
    """All that one replica takes of the memory of its device."""
    host_bytes = plan.options.host_kv_bytes if plan.device.type == "cpu" else 0
    return memory.weight_bytes + memory.activation_bytes + memory.kv_bytes + host_bytes
