"""Sizes of published models, and what follows from them: numbers of weights and bytes of KV per token.

Only the sizes are theirs; the weights of a benchmark are random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["SHAPES", "Shape"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder of the Llama or the Qwen3 kind (which normalises each head's queries and keys)."""

    name: str
    kind: str  # llama or qwen3
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    rope_theta: float
    norm_epsilon: float = 1e-5
    rope_scaling: Mapping[str, float | int | str] = field(default_factory=dict)

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices; norms are left out, they are some thousands."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * queries + 2 * keys)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def spared_weights(self) -> int:
        """Weights of the last layer that a row nobody asks about need not meet: all but those of keys and values."""
        return self.layer_weights // self.num_layers - 2 * self.hidden_size * self.num_kv_heads * self.head_dim

    @property
    def head_weights(self) -> int:
        """Weights of the output matrix, tied to the embedding in all these shapes."""
        return self.vocab_size * self.hidden_size

    @property
    def kv_per_token(self) -> int:
        """Numbers (not bytes) that one token leaves in the KV cache of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def attention_per_pair(self) -> int:
        """Floating-point operations of one query token with one key token: scores and weighted sum, all layers."""
        return 4 * self.num_layers * self.num_heads * self.head_dim


_LLAMA3_SCALING: Mapping[str, float | int | str] = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_ALL = (
    Shape("tiny", "llama", 64, 128, 2, 4, 2, 32, 512, 1024, 10_000.0),
    Shape("smollm2-135m", "llama", 576, 1536, 30, 9, 3, 64, 49152, 8192, 100_000.0),
    Shape("smollm2-360m", "llama", 960, 2560, 32, 15, 5, 64, 49152, 8192, 100_000.0),
    Shape("qwen3-0.6b", "qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, 40_960, 1_000_000.0, 1e-6),
    Shape("qwen3-8b", "qwen3", 4096, 12_288, 36, 32, 8, 128, 151_936, 40_960, 1_000_000.0, 1e-6),
    Shape(
        "llama-3.2-1b", "llama", 2048, 8192, 16, 32, 8, 64, 128_256, 131_072, 500_000.0, rope_scaling=_LLAMA3_SCALING
    ),
)
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in _ALL}
"""By the name that `--shape` takes."""
