"""Norms and the rotary turn of queries and keys in plain torch, for the backends that have none of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pawl_workers.model.spec import QueryKeyNorm
from pawl_workers.model.weights import QueryKeyNormWeights

__all__ = ["split_and_turn"]


def split_and_turn(
    heads: Tensor, rotary: tuple[Tensor, Tensor] | None, norms: QueryKeyNormWeights | None, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [T, H + 2K, head_dim] into queries, keys and values; normalise the first two, and turn them.

    Each pair (i, i + rotary_dim / 2) is turned by its position's angle; the sines are negative in their first half.

    Source: Su et al., RoFormer, 2021, section 3.4; Henry et al., 2020 (query-key normalisation).
    """
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        q, k = (_normalise(x, weight, norms) for x, weight in ((q, norms.query), (k, norms.key)))
    if rotary is not None:
        q, k = (_turn(x, *rotary) for x in (q, k))
    return q, k, v


def _normalise(x: Tensor, weight: Tensor, norms: QueryKeyNormWeights) -> Tensor:
    if norms.kind is QueryKeyNorm.HEAD:
        return functional.rms_norm(x, weight.shape, weight, norms.epsilon)
    return functional.rms_norm(x.flatten(1), weight.shape, weight, norms.epsilon).view(x.shape)


def _turn(x: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    rotary_dim = cosines.shape[-1]
    half = rotary_dim // 2
    turning = x[..., :rotary_dim]
    swapped = torch.cat((turning[..., half:], turning[..., :half]), dim=-1)
    turned = torch.addcmul(turning * cosines, swapped, signed_sines)
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), dim=-1)
