"""Memory: how much there is, and how it is divided into weights, activations, KV blocks and a reserve."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pawl_workers.control_groups import host_memory_left
from pawl_workers.errors import OutOfMemoryError
from pawl_workers.model.spec import ModelSpec
from pawl_workers.plan import LEAST_SAMPLES

__all__ = ["MemoryPlan", "activation_bytes", "available_bytes", "elements_per_token", "gpu_share", "plan_memory"]

_ATTENTION_WORKSPACE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where memory goes, in bytes. The reserve is what is left to the rest of the machine."""

    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    reserve_bytes: int
    num_blocks: int  # without the null block


def available_bytes(device: torch.device) -> int:
    """Memory that this process could still take on a device; on a cpu, what machine and control groups both allow."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return host_memory_left()


def gpu_share(device: torch.device, replicas: int) -> int:
    """Bytes of a GPU that each of the replicas on it may take: as much of its whole memory, whoever starts first."""
    _, total = torch.cuda.mem_get_info(device)
    return int(total) // replicas


def activation_bytes(spec: ModelSpec, max_batch_tokens: int, max_running: int, element_bytes: int) -> int:
    """Estimate the most that the tensors of one step take."""
    logits = max(max_running, LEAST_SAMPLES) * spec.vocab_size * 4 * 3
    return max_batch_tokens * elements_per_token(spec) * element_bytes + logits + _ATTENTION_WORKSPACE_BYTES


def elements_per_token(spec: ModelSpec) -> int:
    """Numbers that a token takes in the layers, at most.

    Stage by stage those of the widest moment; in the CPU's program those of all its buffers, which are kept.
    """
    hidden, gates = spec.hidden_size, 3 if spec.gated_mlp else 2
    inner, routed, routed_buffers = spec.intermediate_size, 0, 0
    if spec.experts is not None:
        shared = spec.experts.shared_size
        inner = max(inner, shared)
        # A row for each token at each of its experts.
        num_scores, active, expert = spec.experts.num_experts, spec.experts.num_active, spec.experts.intermediate_size
        routed = num_scores + active * (2 * hidden + expert * gates)
        routed_buffers = num_scores + active * (2 * hidden + expert) + (hidden + 1 if shared else 0)
    widest = 3 * hidden + max(inner * gates, 3 * spec.qkv_size, routed)
    buffers = 4 * hidden + spec.qkv_size + 2 * spec.num_heads * spec.head_dim + inner + routed_buffers
    return max(widest, buffers)


def plan_memory(
    *,
    available: int,
    weights: int,
    activations: int,
    block_bytes: int,
    most_blocks: int,
    num_blocks: int | None,
    kv_bytes: int | None,
    memory_fraction: float,
    most_kv_bytes: int | None = None,
) -> MemoryPlan:
    """Decide how many KV blocks there are.

    Args:
        available: bytes before the weights were loaded.
        weights: bytes of the weights.
        activations: bytes of a step.
        block_bytes: of a block in all layers, as the kernels lay it out.
        most_blocks: more than this could not be used; bounds the automatic choice.
        num_blocks: the number wanted, if it was given.
        kv_bytes: the bytes wanted for KV, if they were given.
        memory_fraction: else the share of what remains for KV.
        most_kv_bytes: bounds that share.

    Raises:
        OutOfMemoryError: not even one block fits, or what was asked for does not.
    """
    remaining = available - weights - activations
    if num_blocks is None:
        budget = int(remaining * memory_fraction) if kv_bytes is None else kv_bytes
        if kv_bytes is None and most_kv_bytes is not None:
            budget = min(budget, most_kv_bytes)
        num_blocks = budget // block_bytes - 1  # one for the null block
        if kv_bytes is None:
            num_blocks = min(num_blocks, most_blocks)
    used = (num_blocks + 1) * block_bytes
    if num_blocks < 1 or used > remaining:
        least = (max(num_blocks, 1) + 1) * block_bytes
        raise OutOfMemoryError(
            f"weights {_size(weights)} + activations of a step {_size(activations)} + KV {_size(least)} "
            f"({max(num_blocks, 1)} and the null block of {_size(block_bytes)}) = "
            f"{_size(weights + activations + least)} do not fit into {_size(available)}"
            f"{_share(remaining, memory_fraction, kv_bytes)}. "
            f"{_remedy(weights, activations, 2 * block_bytes, available)}"
        )
    return MemoryPlan(weights, activations, used, remaining - used, num_blocks)


def _share(remaining: int, memory_fraction: float, kv_bytes: int | None) -> str:
    """What KV may have, where that is less than what is left."""
    if kv_bytes is not None:
        return f" of memory, with kv_bytes {_size(kv_bytes)}"
    rest = f", where KV may take {memory_fraction:g} of what weights and activations leave" if remaining > 0 else ""
    return f" of memory{rest}"


def _remedy(weights: int, activations: int, least_kv: int, available: int) -> str:
    if weights >= available:
        return "Use a smaller model, one stored in 16 bits, or a machine or memory limit with more"
    if weights + activations + least_kv > available:
        return "Lower max_batch_tokens or max_running, or raise the memory limit"
    return "Lower num_blocks, or raise kv_bytes or the memory fraction of KV"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
