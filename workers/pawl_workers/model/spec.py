"""ModelSpec: the sizes and flags that the forward pass needs, and nothing else of a configuration.

A family builds one from `config.json`; no stage ever asks which family it serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from pawl_workers.errors import CheckpointError

__all__ = ["Activation", "ConfigReader", "ModelSpec", "NormKind", "RotarySpec", "TensorTarget"]


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
    """Rotary position embedding: `theta` and how the frequencies are stretched.

    `kind` is `default`, `linear` (positions divided by `factor`) or `llama3` (low frequencies divided by
    `factor`, high ones kept, blended in between).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_position: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and flags of one model. Counts are of the whole model, not of a shard."""

    architecture: str
    num_layers: int
    hidden_size: int  # D
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int
    intermediate_size: int
    vocab_size: int  # V
    max_context: int  # positions
    norm: NormKind
    norm_epsilon: float
    activation: Activation
    gated_mlp: bool
    rotary: RotarySpec | None  # None: learned position embeddings
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    tied_head: bool

    @property
    def qkv_size(self) -> int:
        """Rows of the merged query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of KV one token needs over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True, slots=True)
class TensorTarget:
    """Where one checkpoint tensor goes: a slot, and which rows of it when several are merged.

    Slots are named `embedding`, `positions`, `final_norm.weight`, `head.weight`, `layers.0.qkv.weight` and
    so on (`families.slots` has them all). `row` and `num_rows` count output features; `transposed` marks
    tensors stored as [in, out].
    """

    slot: str
    row: int = 0
    num_rows: int = 0  # 0 = all
    transposed: bool = False


class ConfigReader:
    """Typed access to a `config.json`; a wrong type is an error that names the key."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def integer(self, key: str, default: int | None = None) -> int:
        """Read a positive integer; null and absent mean the default."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {key} must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """Read a number; null and absent mean the default."""
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"config.json: {key} must be a number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Read a boolean; null and absent mean the default."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def text(self, key: str, default: str) -> str:
        """Read a string; null and absent mean the default."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise CheckpointError(f"config.json: {key} must be a string, not {value!r}")
        return value

    def section(self, key: str) -> ConfigReader | None:
        """Read a nested object; None when it is null or absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CheckpointError(f"config.json: {key} must be an object, not {value!r}")
        return ConfigReader(value)

    def activation(self, key: str, default: str) -> Activation:
        """Read an activation by its name in a configuration."""
        name = self.text(key, default)
        known = {
            "silu": Activation.SILU,
            "swish": Activation.SILU,
            "gelu": Activation.GELU,
            "gelu_new": Activation.GELU_TANH,
            "gelu_pytorch_tanh": Activation.GELU_TANH,
            "relu": Activation.RELU,
        }
        if name not in known:
            raise CheckpointError(f"config.json: {key} {name!r} is not supported; known: {', '.join(known)}")
        return known[name]
