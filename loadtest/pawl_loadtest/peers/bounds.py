"""The least time that a workload takes on a machine, from bytes and floating-point operations alone.

A step multiplies every weight with every token and reads every weight once, whichever of the two takes longer;
attention reads every earlier token's KV once and computes on it, whichever takes longer. In the last layer tokens that
are not sampled from need keys and values alone. Matrix products and attention do not overlap, so their times add.
Nothing else is counted: no dispatch, no sampling, no norms.
"""

from __future__ import annotations

from dataclasses import dataclass

from pawl_loadtest.peers.shapes import Shape
from pawl_loadtest.peers.workloads import Workload

__all__ = ["Bound", "MachineLimits", "Part", "Precision", "bound"]


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Rates per second: fp32 operations of linear layers and of attention, and bytes read."""

    flops: float
    read_bytes: float
    attention_flops: float


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes that a weight and a number of the KV cache take as the engine stores them.

    Attributes:
        tile_products: products of bfloat16 that one of linear layers takes in matrix tiles. An fp32 input is the sum of
            three bfloat16, so three where that is multiplied exactly; one where inputs are rounded.
    """

    weight_bytes: float
    kv_bytes: float
    tile_products: int = 3


@dataclass(frozen=True, slots=True)
class Part:
    """One of the terms: the seconds that its operations take, and those that its bytes take."""

    flops_s: float
    bytes_s: float

    @property
    def seconds(self) -> float:
        """Whichever takes longer."""
        return max(self.flops_s, self.bytes_s)


@dataclass(frozen=True, slots=True)
class Bound:
    """Least seconds, by part."""

    prefill_linear: Part
    prefill_attention: Part
    decode_linear: Part
    decode_attention: Part

    @property
    def seconds(self) -> float:
        """Of the whole workload."""
        return sum(self.by_limit.values())

    @property
    def by_limit(self) -> dict[str, float]:
        """Seconds by what takes them: multiplying or reading the weights, computing on the KV or reading it."""
        found = dict.fromkeys(("multiply", "read weights", "attend", "read KV"), 0.0)
        for part, by_flops, by_bytes in (
            (self.prefill_linear, "multiply", "read weights"),
            (self.decode_linear, "multiply", "read weights"),
            (self.prefill_attention, "attend", "read KV"),
            (self.decode_attention, "attend", "read KV"),
        ):
            found[by_flops if part.flops_s >= part.bytes_s else by_bytes] += part.seconds
        return found

    @property
    def binds(self) -> str:
        """The limit that takes most of those seconds."""
        found = self.by_limit
        return max(found, key=found.__getitem__)


def bound(shape: Shape, workload: Workload, precision: Precision, limits: MachineLimits) -> Bound:
    """The least time of a workload.

    The prefill yields each request's first token, so `output_tokens - 1` decode steps follow. In the prefill the head
    is computed for the last token of each prompt alone, and attention is causal: half of the square.
    """
    requests, prompt = workload.requests, workload.prompt_tokens
    layer, head = shape.layer_weights, shape.head_weights
    weights_s = (layer + head) * precision.weight_bytes / limits.read_bytes
    kv_token_bytes = shape.kv_per_token * precision.kv_bytes

    prefill_flops = 2 * requests * (prompt * layer - (prompt - 1) * shape.spared_weights + head)
    causal_pairs = prompt * (prompt + 1) / 2
    causal_pairs -= (causal_pairs - prompt) / shape.num_layers
    steps = workload.output_tokens - 1
    # The step that computes output token i attends to the prompt, the i tokens before it, and itself.
    pairs = sum(prompt + step for step in range(1, workload.output_tokens))
    return Bound(
        prefill_linear=Part(prefill_flops / limits.flops, weights_s),
        prefill_attention=_attention(shape, requests, prompt, causal_pairs, kv_token_bytes, limits),
        decode_linear=Part(steps * 2 * requests * (layer + head) / limits.flops, steps * weights_s),
        decode_attention=_attention(shape, requests, pairs, pairs, kv_token_bytes, limits),
    )


def _attention(
    shape: Shape, requests: int, tokens_read: int, pairs: float, kv_token_bytes: float, limits: MachineLimits
) -> Part:
    bytes_s = requests * tokens_read * kv_token_bytes / limits.read_bytes
    return Part(requests * pairs * shape.attention_per_pair / limits.attention_flops, bytes_s)
