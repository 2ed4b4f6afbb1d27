"""The least time that requests of mixed lengths take on a GPU, from bytes and floating-point operations alone.

The KV of every earlier token is read for every token that is generated, all weights are read once a step, and the
prefill multiplies each weight with each prompt token. Of routed layers a step reads the experts that its rows choose,
and a prompt token is multiplied with those that it chooses. The parts do not overlap, so their times add. Not counted:
the attention of the prefill, dispatch, sampling, norms, and the time that it takes to admit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pawl_loadtest.gpu_bench.shapes import RoutedShape
from pawl_loadtest.gpu_bench.workload import Request
from pawl_loadtest.peers.shapes import Shape

__all__ = ["ByteBound", "GpuLimits", "byte_bound"]


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """What was measured: bytes read per second, and 16-bit operations per second of a large matrix product."""

    read_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class ByteBound:
    """Bytes and operations that must be, and the least seconds that they take."""

    kv_bytes: float
    weight_bytes: float
    prefill_flops: float
    seconds: float

    def tokens_per_s(self, requests: Sequence[Request]) -> float:
        """Output tokens per second at the bound."""
        return sum(one.output_tokens for one in requests) / self.seconds


def byte_bound(
    shape: Shape,
    requests: Sequence[Request],
    limits: GpuLimits,
    element_bytes: int = 2,
    frequencies: Sequence[Sequence[float]] | None = None,
) -> ByteBound:
    """The bound of requests that all run at once, with weights and KV of `element_bytes` a number.

    `frequencies` are those of a routed shape's experts; see `RoutedShape.weights_read`.
    """
    pairs = sum(len(one.prompt_ids) * one.output_tokens + one.output_tokens**2 / 2 for one in requests)
    kv_bytes = pairs * shape.kv_per_token * element_bytes
    steps = max(one.output_tokens for one in requests)
    if isinstance(shape, RoutedShape):
        running = Counter(sum(one.output_tokens > step for one in requests) for step in range(steps))
        layers = sum(times * shape.weights_read(rows, frequencies) for rows, times in running.items())
    else:
        layers = steps * shape.layer_weights
    weight_bytes = float(layers + steps * shape.head_weights) * element_bytes
    prefill_flops = 2.0 * shape.layer_weights * sum(len(one.prompt_ids) for one in requests)
    seconds = (kv_bytes + weight_bytes) / limits.read_bytes + prefill_flops / limits.flops
    return ByteBound(kv_bytes, weight_bytes, prefill_flops, seconds)
