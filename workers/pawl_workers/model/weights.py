"""The named tensors of a loaded model, as frozen dataclasses in the order the forward pass meets them.

Knows no file formats and no kernels: what a backend packs is known by what it does (`packed`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pawl_workers.model.packed import PackedActivation, PackedExperts, PackedLinear, PackedNorm
from pawl_workers.model.spec import Activation, ModelSpec, QueryKeyNorm

__all__ = [
    "AttentionRule",
    "AttentionWeights",
    "EmbeddingWeights",
    "ExpertWeights",
    "HeadWeights",
    "LayerWeights",
    "MlpWeights",
    "QueryKeyNormWeights",
    "SharedExpertWeights",
    "Weights",
    "asks_host",
]


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
