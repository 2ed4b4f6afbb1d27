"""Ids that were chosen a step ago and have not left the device become the input of the next step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["insert"]

_BLOCK = 256


@triton.jit(do_not_specialize=["num_tokens"])
def _insert(token_ids: tl.tensor, chosen: tl.tensor, num_tokens: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = at < num_tokens
    ids = tl.load(token_ids + at, mask=exists, other=0)
    refers = exists & (ids < 0)
    found = tl.maximum(tl.load(chosen + (-1 - ids), mask=refers, other=0), 0)
    tl.store(token_ids + at, found.to(ids.dtype), mask=refers)


def insert(token_ids: Tensor, chosen: Tensor) -> None:
    """Replace each entry -1 - i of `token_ids`, [T], by `chosen[i]`, [S] int32, or by 0 where no token was chosen."""
    num_tokens = token_ids.shape[0]
    _insert[(triton.cdiv(num_tokens, _BLOCK),)](token_ids, chosen, num_tokens, BLOCK=_BLOCK, num_warps=4)
