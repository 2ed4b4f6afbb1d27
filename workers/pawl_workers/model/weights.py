"""The named tensors of a loaded model, as frozen dataclasses in the order the forward pass meets them.

Knows no file formats and no kernels: a linear layer is anything that can be applied and read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pawl_workers.model.spec import Activation, ModelSpec, NormKind

__all__ = [
    "AttentionWeights",
    "EmbeddingWeights",
    "LayerWeights",
    "MlpWeights",
    "NormWeights",
    "PackedActivation",
    "PackedLinear",
    "PackedNorm",
    "Packer",
    "Weights",
]


class PackedLinear(Protocol):
    """A linear layer in the form its kernel backend wants."""

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        ...

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """The bias, [out]."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory that the packed weight takes."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, [T, in] -> [T, out]."""
        ...

    def unpack(self) -> Tensor:
        """Return the weight, [out, in], bit for bit as it was packed."""
        ...


@dataclass(frozen=True, slots=True)
class NormWeights:
    """Normalisation over the last axis: `weight` and `bias` are [D]; RMS norms have no bias."""

    kind: NormKind
    weight: Tensor
    bias: Tensor | None
    epsilon: float


class PackedNorm(Protocol):
    """A norm as its kernel backend computes it."""

    @property
    def weights(self) -> NormWeights:
        """What it was made from."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise each row of x, [T, D], to [T, D]."""
        ...


class PackedActivation(Protocol):
    """An activation as its kernel backend computes it: [T, I] -> [T, I], or, gated, [T, 2I] -> [T, I]."""

    def __call__(self, hidden: Tensor) -> Tensor: ...  # noqa: D102 - as the class says


class Packer(Protocol):
    """Turns what a checkpoint holds into the form of a kernel backend."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Pack a weight [out, in] and a bias [out]."""
        ...

    def pack_norm(self, weights: NormWeights) -> PackedNorm:
        """Bind a norm to its kernel."""
        ...

    def pack_activation(self, activation: Activation, *, gated: bool) -> PackedActivation:
        """Choose the kernel of an activation."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Merged query-key-value projection [(H + 2K) * head_dim, D] and output projection [D, H * head_dim]."""

    qkv: PackedLinear
    output: PackedLinear
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """`up` is [I, D], or gate above up, [2I, D], when `gated`; `down` is [D, I]."""

    up: PackedLinear
    activate: PackedActivation
    down: PackedLinear
    activation: Activation
    gated: bool


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block: attention, then MLP, each behind its norm."""

    attention_norm: PackedNorm
    attention: AttentionWeights
    mlp_norm: PackedNorm
    mlp: MlpWeights


@dataclass(frozen=True, slots=True)
class EmbeddingWeights:
    """Token vectors [V, D] and, for learned positions, position vectors [max_context, D]."""

    tokens: Tensor
    positions: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a model. `num_bytes` counts what the tensors hold in memory, `num_parameters` what was read."""

    spec: ModelSpec
    embedding: EmbeddingWeights
    layers: tuple[LayerWeights, ...]
    final_norm: PackedNorm
    head: PackedLinear
    num_parameters: int
    num_bytes: int
