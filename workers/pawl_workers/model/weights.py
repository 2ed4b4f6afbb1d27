"""The named tensors of a loaded model, as frozen dataclasses in the order the forward pass meets them.

Knows no file formats and no kernels: a linear layer is anything that can be applied and read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pawl_workers.model.spec import Activation, ModelSpec, NormKind, QueryKeyNorm

__all__ = [
    "AttentionRule",
    "AttentionWeights",
    "EmbeddingWeights",
    "ExpertPacker",
    "ExpertWeights",
    "HeadWeights",
    "LayerWeights",
    "MlpWeights",
    "NormWeights",
    "PackedActivation",
    "PackedExperts",
    "PackedLinear",
    "PackedNorm",
    "Packer",
    "QueryKeyNormWeights",
    "SharedExpertWeights",
    "Weights",
    "asks_host",
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
    def data_type(self) -> torch.dtype:
        """The type in which the weight is kept."""
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

    def linear_dtype(self, stored: torch.dtype, computed: torch.dtype) -> torch.dtype:
        """Say in which type `pack_linear` takes a weight.

        Args:
            stored: the checkpoint's type.
            computed: the model's.

        Returns:
            One that holds what is wanted of the stored values: `stored` itself spares a wider copy.
        """
        ...

    def packed_bytes(self, shape: tuple[int, ...], stored: torch.dtype, computed: torch.dtype) -> int:
        """Return the most that a packed weight of this shape, [out, in], takes; types as for `linear_dtype`."""
        ...

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Pack a weight [out, in], in the type of `linear_dtype`, and a bias [out], in the model's type."""
        ...

    def pack_head(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Pack the projection to the vocabulary likewise; its results may be of a wider type than the model's."""
        ...

    def pack_norm(self, weights: NormWeights) -> PackedNorm:
        """Bind a norm to its kernel."""
        ...

    def pack_activation(self, activation: Activation, *, gated: bool) -> PackedActivation:
        """Choose the kernel of an activation."""
        ...


class PackedExperts(Protocol):
    """All routed experts of a layer as one operation of their kernel backend."""

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        """Compute, for each row of x, [T, D], the experts that its scores, [T, E], choose, and add them up: [T, D].

        The host is not asked which they are. They are added in the order of their numbers.
        """
        ...


@runtime_checkable
class ExpertPacker(Packer, Protocol):
    """A packer whose kernels compute all experts of a layer at once.

    Their weights are to lie one after the other; each is packed by `pack_linear`, as a view, as well.
    """

    def pack_experts(
        self, up: Tensor, down: Tensor, activate: PackedActivation, num_active: int, *, normalised: bool
    ) -> PackedExperts:
        """Bind experts without biases to their kernels.

        Args:
            up: gate above up, [E, 2I, D], or up alone, [E, I, D].
            down: [E, D, I].
            activate: of `pack_activation`.
            num_active: experts of a token.
            normalised: whether the shares of a token add up to 1.
        """
        ...


@dataclass(frozen=True, slots=True)
class QueryKeyNormWeights:
    """RMS norms of queries and keys: each [head_dim], or, over all heads of a token, [H * head_dim], [K * head_dim]."""

    kind: QueryKeyNorm
    query: Tensor
    key: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How queries meet keys in one layer.

    Attributes:
        scale: of the scores.
        window: tokens that a query sees, itself included; None = all.
        softcap: c, where scores s become c * tanh(s / c) (Bello et al., 2016).
        sinks: [H] float32: a score per head that takes part in the softmax and brings no value (Xiao et al., 2023).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Merged query-key-value projection [(H + 2K) * head_dim, D] and output projection [D, H * head_dim].

    `rotary` says which of the step's angles turn queries and keys; None = none.
    """

    qkv: PackedLinear
    output: PackedLinear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rule: AttentionRule
    rotary: int | None
    norms: QueryKeyNormWeights | None


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """`up` is [I, D], or gate above up, [2I, D], when `gated`; `down` is [D, I]."""

    up: PackedLinear
    activate: PackedActivation
    down: PackedLinear
    activation: Activation
    gated: bool


@dataclass(frozen=True, slots=True)
class SharedExpertWeights:
    """An MLP that every token goes to; `gate`, [1, D], scores with how large a share."""

    mlp: MlpWeights
    gate: PackedLinear


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Routed MLPs: `router` is [E, D]; each token goes to `num_active` experts, and to the shared one if there is.

    `together` computes all of `experts`, of which it holds the same tensors, where the backend can.
    """

    router: PackedLinear
    experts: tuple[MlpWeights, ...]
    num_active: int
    normalised: bool
    shared: SharedExpertWeights | None = None
    together: PackedExperts | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block: attention, then MLP, between their norms; None = no norm there.

    `parallel`: both read one stream, and where the MLP has no norm, it reads what attention's norm gives.
    """

    attention_norm: PackedNorm | None
    attention: AttentionWeights
    attention_output_norm: PackedNorm | None
    mlp_norm: PackedNorm | None
    mlp: MlpWeights | ExpertWeights
    mlp_output_norm: PackedNorm | None
    parallel: bool
    residual_scale: float


@dataclass(frozen=True, slots=True)
class EmbeddingWeights:
    """Token vectors [V, D], their scale and, for learned positions, position vectors [max_context, D].

    `tokens` may be of a narrower type than the model's, `dtype`, which then holds each of its values.
    """

    tokens: Tensor
    positions: Tensor | None
    dtype: torch.dtype
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """The projection to the vocabulary, [V, D], and what becomes of its scores."""

    linear: PackedLinear
    divisor: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a model. `num_bytes` counts what the tensors hold in memory, `num_parameters` what was read.

    `linear_types` are those that the linear layers are kept in, the one of most bytes first.
    """

    spec: ModelSpec
    embedding: EmbeddingWeights
    layers: tuple[LayerWeights, ...]
    final_norm: PackedNorm
    head: HeadWeights
    num_parameters: int
    num_bytes: int
    linear_types: tuple[torch.dtype, ...]


def asks_host(weights: Weights) -> bool:
    """Whether a step has to know on the host which experts are chosen, and so waits for the device in its middle."""
    return any(isinstance(layer.mlp, ExpertWeights) and layer.mlp.together is None for layer in weights.layers)
