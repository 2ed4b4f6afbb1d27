"""The rotary turn in plain torch, for the backends that have none of their own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["split_and_turn"]


def split_and_turn(
    heads: Tensor, rotary: tuple[Tensor, Tensor] | None, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [T, H + 2K, head_dim] into queries, keys and values, and turn the first two by their positions' angles.

    Each pair (i, i + head_dim / 2) is turned; the sines are negative in their first half.

    Source: Su et al., RoFormer, 2021, section 3.4.
    """
    num_heads = heads.shape[1] - 2 * num_kv_heads
    turned, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
    if rotary is not None:
        cosines, signed_sines = rotary
        half = heads.shape[-1] // 2
        swapped = torch.cat((turned[..., half:], turned[..., :half]), dim=-1)
        turned = torch.addcmul(turned * cosines, swapped, signed_sines)
    return turned[:, :num_heads], turned[:, num_heads:], v
