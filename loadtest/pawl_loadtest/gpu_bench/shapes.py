"""Shapes that only a GPU is measured on: those whose MLPs are routed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pawl_loadtest.peers.shapes import SHAPES, Shape

__all__ = ["GPU_SHAPES", "RoutedShape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedShape(Shape):
    """Sizes of a decoder of the Qwen3-MoE kind, all of whose layers are routed; `intermediate_size` is an expert's."""

    num_experts: int
    num_active: int

    @property
    def expert_weights(self) -> int:
        """Weights of one expert of one layer."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def shared_weights(self) -> int:
        """Weights of all layers that every token is multiplied by: attention and routers."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.num_layers * self.hidden_size * (2 * queries + 2 * keys + self.num_experts)

    @property
    def layer_weights(self) -> int:
        """Weights of all layers that one token is multiplied by."""
        return self.shared_weights + self.num_layers * self.num_active * self.expert_weights

    def weights_read(self, num_rows: int, frequencies: Sequence[Sequence[float]] | None = None) -> float:
        """Weights of all layers that a step of so many rows is expected to read.

        An expert is read if a row chooses it, which 1 - (1 - f) ** rows of all steps do where a share f of tokens
        does and rows choose independently.

        Args:
            num_rows: that compute a token each.
            frequencies: f, of each expert of each layer; None = all alike. Those of a layer add up to `num_active`.
        """
        alike = [[self.num_active / self.num_experts] * self.num_experts] * self.num_layers
        read = sum(1.0 - (1.0 - f) ** num_rows for layer in frequencies or alike for f in layer)
        return self.shared_weights + read * self.expert_weights


GPU_SHAPES: Mapping[str, Shape] = {
    **SHAPES,
    # Eight of Qwen3-30B-A3B's 48 layers: ten gigabytes, which are written in seconds.
    "qwen3-30b-a3b-8": RoutedShape(
        "qwen3-30b-a3b-8", "qwen3_moe", 2048, 768, 8, 32, 4, 128, 151_936, 40_960, 1_000_000.0, 1e-6,
        num_experts=128, num_active=8,
    ),
    "tiny-moe": RoutedShape(
        "tiny-moe", "qwen3_moe", 64, 48, 2, 4, 2, 32, 512, 1024, 10_000.0, num_experts=6, num_active=2
    ),
}  # fmt: skip
"""By the name that `--shape` takes."""
