"""The least time of the parts of one step that bytes or operations bound."""

from __future__ import annotations

from pawl_loadtest.peers.bounds import MachineLimits
from pawl_loadtest.peers.shapes import Shape as ModelShape
from pawl_loadtest.steps import Shape

__all__ = ["limits_of_step"]


def limits_of_step(
    model: ModelShape, step: Shape, weight_bytes: float, kv_bytes: int, can: MachineLimits, num_samples: int
) -> dict[str, float]:
    """Least seconds of linears, of attention and of the head, which scores `num_samples` rows.

    In the last layer other rows need keys and values alone, and attention no more than the last row of each sequence.
    """

    def least(num_bytes: float, operations: float, flops: float) -> float:
        return max(num_bytes / can.read_bytes, operations / flops)

    pairs = sum(new * before + new * (new + 1) // 2 for new, before in zip(step.tokens, step.before, strict=True))
    tokens = sum(step.tokens)
    contexts = tokens + sum(step.before)
    pairs_in_layers = pairs - (pairs - contexts) / model.num_layers
    layer, head = model.layer_weights, model.head_weights
    products = layer * tokens - model.spared_weights * (tokens - num_samples)
    return {
        "linears": least(layer * weight_bytes, 2 * products, can.flops),
        "attention": least(
            contexts * model.kv_per_token * kv_bytes, pairs_in_layers * model.attention_per_pair, can.attention_flops
        ),
        "head": least(head * weight_bytes, 2 * head * num_samples, can.flops) if num_samples else 0.0,
    }
