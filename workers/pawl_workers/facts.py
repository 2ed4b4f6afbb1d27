"""What a loaded worker says of itself."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pawl_workers.memory import MemoryPlan
from pawl_workers.model.source import checkpoint_revision
from pawl_workers.model.weights import Weights, asks_host
from pawl_workers.pipeline import MAX_IN_FLIGHT
from pawl_workers.sampling.batch import QueueingSampler
from pawl_workers.start_plan import StartPlan

__all__ = ["WorkerFacts", "worker_facts"]


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a loaded worker is. `num_blocks` are usable: their ids are 1 to num_blocks."""

    architectures: tuple[str, ...]
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    data_type: str  # that it computes in
    weight_type: str  # that its linear layers are kept in; of several, the one of most bytes first
    kv_type: str  # of the cache; with weights that are not exact, these too: who shares KV must agree in both
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
    max_in_flight: int  # steps that gain from being launched before the one before is settled
    num_host_blocks: int
    restore_fixed_s: float  # measured: of bringing any number of blocks back from the host
    restore_block_s: float  # and of each of them
    load_s: float


def worker_facts(plan: StartPlan, weights: Weights, memory: MemoryPlan, started: float) -> WorkerFacts:
    """Say what a worker is that was planned so, with these weights, and began to load at `started`."""
    options = plan.options
    return WorkerFacts(
        architectures=plan.config.architectures,
        vocab_size=weights.spec.vocab_size,
        max_context=plan.max_context,
        eos_token_ids=plan.config.eos_token_ids,
        data_type=str(plan.dtype).removeprefix("torch."),
        weight_type=" and ".join(str(dtype).removeprefix("torch.") for dtype in weights.linear_types),
        kv_type=_kv_type(plan),
        revision=checkpoint_revision(plan.config.folder, dummy_weights=options.dummy_weights),
        block_size=plan.kernels.block_size,
        num_blocks=memory.num_blocks,
        weight_bytes=memory.weight_bytes,
        kv_bytes=memory.kv_bytes,
        activation_bytes=memory.activation_bytes,
        num_parameters=weights.num_parameters,
        kernels=plan.kernels.name,
        device=str(plan.device),
        num_threads=options.num_threads,
        max_running=options.max_running,
        max_batch_tokens=options.max_batch_tokens,
        max_in_flight=_max_in_flight(plan, weights),
        num_host_blocks=options.host_kv_bytes // plan.block_bytes,
        restore_fixed_s=0.0,
        restore_block_s=0.0,
        load_s=time.perf_counter() - started,
    )


def _max_in_flight(plan: StartPlan, weights: Weights) -> int:
    """Where experts are chosen on the host, a step waits in its middle; and not every sampler leaves its ids there."""
    queues = isinstance(plan.kernels.sampler, QueueingSampler) and not asks_host(weights)
    return MAX_IN_FLIGHT if queues else 1


def _kv_type(plan: StartPlan) -> str:
    cache = str(plan.kernels.cache_dtype(plan.dtype)).removeprefix("torch.")
    return cache if plan.options.weight_dtype == "auto" else f"{cache}, weights {plan.options.weight_dtype}"
