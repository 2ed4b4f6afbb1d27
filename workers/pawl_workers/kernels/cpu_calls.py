"""The C structures filled with what stays from step to step: weights, sizes, rules and the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pawl_workers.kernels.native.structures import NO_WINDOW, AttentionCall, EmbeddingCall, NormCall, PlaceCall
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation, NormKind, QueryKeyNorm
from pawl_workers.model.weights import AttentionRule, EmbeddingWeights, QueryKeyNormWeights

__all__ = ["activation_number", "attention_call", "embedding_call", "norm_call", "padded_dim", "place_call"]

_ACTIVATIONS = {Activation.SILU: 1, Activation.GELU: 2, Activation.GELU_TANH: 3, Activation.RELU: 4}  # as in vector.h
_NORMS = {NormKind.RMS: 0, NormKind.LAYER: 1}  # as in elementwise.h
_DIM_MULTIPLE = 16
_VECTORS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in linear.h


def padded_dim(head_dim: int) -> int:
    """Dimensions of a head in the cache."""
    return -(-head_dim // _DIM_MULTIPLE) * _DIM_MULTIPLE


def activation_number(activation: Activation) -> int:
    """Number of an activation in C."""
    return _ACTIVATIONS[activation]


def embedding_call(w: EmbeddingWeights) -> EmbeddingCall:
    """Vectors of tokens, and of positions where these are learned."""
    return EmbeddingCall(
        vectors=w.tokens.data_ptr(),
        positions=None if w.positions is None else w.positions.data_ptr(),
        n=w.tokens.shape[1],
        format=_VECTORS[w.tokens.dtype],
        scale=w.scale,
    )


def norm_call(w: NormWeights) -> NormCall:
    """A norm without rows, input and output."""
    return NormCall(
        weight=w.weight.data_ptr(),
        bias=None if w.bias is None else w.bias.data_ptr(),
        n=w.weight.shape[0],
        kind=_NORMS[w.kind],
        epsilon=w.epsilon,
        factor=1.0,
    )


def place_call(
    norms: QueryKeyNormWeights | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cache: tuple[Tensor, Tensor],
    cache_format: int,
) -> PlaceCall:
    """The turn and write of a layer without rows, angles, slots, input and output."""
    return PlaceCall(
        query_norm=None if norms is None else norms.query.data_ptr(),
        key_norm=None if norms is None else norms.key.data_ptr(),
        keys=cache[0].data_ptr(),
        values=cache[1].data_ptr(),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        padded=padded_dim(head_dim),
        wide=norms is not None and norms.kind is QueryKeyNorm.WIDTH,
        format=cache_format,
        epsilon=0.0 if norms is None else norms.epsilon,
    )


def attention_call(
    rule: AttentionRule,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cache: tuple[Tensor, Tensor],
    cache_format: int,
) -> AttentionCall:
    """The attention of a layer without tables, tiles, input and output."""
    return AttentionCall(
        keys=cache[0].data_ptr(),
        values=cache[1].data_ptr(),
        sinks=None if rule.sinks is None else rule.sinks.data_ptr(),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        padded=padded_dim(head_dim),
        window=NO_WINDOW if rule.window is None else rule.window,
        scale=rule.scale,
        softcap=rule.softcap or 0.0,
        format=cache_format,
    )
