"""ModelSpec: the sizes and flags that the forward pass needs, and nothing else of a configuration.

A family builds one from `config.json`; no stage ever asks which family it serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = [
    "Activation",
    "ExpertSpec",
    "Interleaved",
    "LayerSpec",
    "ModelSpec",
    "NormKind",
    "QueryKeyNorm",
    "RotarySpec",
    "TensorTarget",
]


class NormKind(Enum):
    """Which normalisation a model uses."""

    RMS = "rms"
    LAYER = "layer"


class Activation(Enum):
    """The non-linearity inside the MLP, by its name in a configuration."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_new"
    RELU = "relu"


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """Rotary position embedding: which dimensions of a head turn, how fast, and how that is stretched.

    Attributes:
        theta: base of the frequencies.
        rotary_dim: leading dimensions of a head that turn; even.
        kind: `default`, `linear` (positions divided by `factor`), `llama3` and `yarn` (low frequencies divided by
            `factor`, high ones kept, blended in between), or `longrope` (each frequency divided by its own factor).
        attention_factor: of cosines and sines.
        low_frequency_factor, high_frequency_factor: of `llama3`.
        beta_slow, beta_fast, truncate: of `yarn`.
        short_factors, long_factors: of `longrope`, for contexts up to `original_max_position` and beyond.
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    factor: float = 1.0
    attention_factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_position: int = 0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


class QueryKeyNorm(Enum):
    """Over what queries and keys are normalised before they turn."""

    HEAD = "each head"
    WIDTH = "all heads of a token"


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """Routed MLPs: each token goes to `num_active` of `num_experts`, whose weights are `normalised` to add up to 1.

    `shared_size` is the inner width of one more MLP that every token goes to, by a share of its own; 0 = none.
    """

    num_experts: int
    num_active: int
    intermediate_size: int
    normalised: bool
    shared_size: int = 0


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer.

    Attributes:
        window: tokens that a query sees, itself included; None = all.
        rotary: which of the model's rotary embeddings turns queries and keys; None = none.
        routed: experts in place of one MLP.
    """

    window: int | None = None
    rotary: int | None = 0
    routed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes and flags of one model. Counts are of the whole model, not of a shard."""

    architecture: str
    layers: tuple[LayerSpec, ...]
    hidden_size: int  # D
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int
    intermediate_size: int
    vocab_size: int  # V
    max_context: int  # positions
    norm_epsilon: float
    tied_head: bool  # the head is the embedding, unless a checkpoint stores one
    rotaries: tuple[RotarySpec, ...]  # none: learned position embeddings
    norm: NormKind = NormKind.RMS
    activation: Activation = Activation.SILU
    gated_mlp: bool = True
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    parallel_blocks: bool = False  # attention and MLP read the same stream, through one norm unless it has two
    query_key_norm: QueryKeyNorm | None = None
    experts: ExpertSpec | None = None
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a block adds to the stream
    logit_divisor: float = 1.0
    logit_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def qkv_size(self) -> int:
        """Rows of the merged query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of KV one token needs over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Rows that lie head after head, `head_dim` each, whose first `rotary_dim` are pairs that turn, side by side."""

    head_dim: int
    rotary_dim: int


@dataclass(frozen=True, slots=True)
class TensorTarget:
    """Where one checkpoint tensor goes: a slot, and which rows of it when several are merged.

    Slots are named `embedding`, `positions`, `final_norm.weight`, `head.weight`, `layers.0.qkv.weight` and
    so on (`slots.slot_shapes` has them all). `row` and `num_rows` count output features; `transposed` marks
    tensors stored as [in, out]; `heads` those whose rows lie head after head, each with its query, key and value;
    `interleaved` those of queries and keys whose pairs are brought half of what turns apart, where kernels turn them;
    `added` is added to every value (norms that store their distance from 1).
    """

    slot: str
    row: int = 0
    num_rows: int = 0  # 0 = all
    transposed: bool = False
    heads: int = 0
    interleaved: Interleaved | None = None
    added: float = 0.0
