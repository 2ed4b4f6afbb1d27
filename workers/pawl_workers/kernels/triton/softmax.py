"""Device code that decode and extend share: one tile of keys, and the merge of two splits.

Both kernels take keys in the same tiles and splits at the same absolute positions and fold them in the same order. Sums
of products are written as `fma`, so that no compiler chooses where to round.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_tile", "merge", "normalise"]


@triton.jit
def attend_tile(
    q: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    gathered: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    positions: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Fold a tile of keys and values into an online softmax (Milakov and Gimelshein, 2018), in base 2.

    `keys` and `values` point to the tile, `first` is its position, and of a masked one nothing from `end` on is read;
    `scale` makes scores base-2 exponents, or, with a softcap, the argument of tanh, and `cap` is the softcap in base 2.
    `top` [R], `total` [R] and `gathered` [R, WIDTH] are the state so far.
    """
    offsets = tl.arange(0, TILE)
    dims = tl.arange(0, WIDTH)
    if MASKED:
        exists = first + offsets < end
        k = tl.load(keys + offsets[None, :] * D + dims[:, None], mask=exists[None, :] & (dims[:, None] < D), other=0.0)
        v = tl.load(
            values + offsets[:, None] * D + dims[None, :], mask=exists[:, None] & (dims[None, :] < D), other=0.0
        )
    elif D == WIDTH:
        k = tl.load(keys + offsets[None, :] * D + dims[:, None])
        v = tl.load(values + offsets[:, None] * D + dims[None, :])
    else:
        k = tl.load(keys + offsets[None, :] * D + dims[:, None], mask=dims[:, None] < D, other=0.0)
        v = tl.load(values + offsets[:, None] * D + dims[None, :], mask=dims[None, :] < D, other=0.0)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if SOFTCAP:
        decay = tl.exp2(-2.8853900817779268 * tl.abs(scores))  # e ** (-2 |x|): never overflows
        bent = (1.0 - decay) / (1.0 + decay)
        scores = tl.where(scores < 0, -bent, bent) * cap
    if MASKED:
        seen = (first + offsets)[None, :]
        visible = seen <= positions[:, None]
        if WINDOW:
            visible = visible & (seen > positions[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = tl.fma(total, shrink, tl.sum(weights, 1))
    gathered = tl.dot(weights.to(v.dtype), v, gathered * shrink[:, None], input_precision="ieee")
    return new_top, total, gathered


@triton.jit
def merge(
    top: tl.tensor,
    total: tl.tensor,
    gathered: tl.tensor,
    split_top: tl.tensor,
    split_total: tl.tensor,
    split_gathered: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Fold the softmax of the next split into that of the splits before it, [R], [R] and [R, WIDTH] each."""
    new_top = tl.maximum(top, split_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    old, new = tl.exp2(top - base), tl.exp2(split_top - base)
    total = tl.fma(total, old, split_total * new)
    old, new = tl.broadcast_to(old[:, None], gathered.shape), tl.broadcast_to(new[:, None], gathered.shape)
    return new_top, total, tl.fma(gathered, old, split_gathered * new)


@triton.jit
def normalise(top: tl.tensor, total: tl.tensor, gathered: tl.tensor, sink: tl.tensor, SINKS: tl.constexpr) -> tl.tensor:
    """Divide by the sum of weights, in which a sink, [R] in base 2, takes part; a row without keys gives zeros."""
    if SINKS:
        new_top = tl.maximum(top, sink)
        shrink = tl.exp2(top - new_top)
        total = tl.fma(total, shrink, tl.exp2(sink - new_top))
        gathered = gathered * shrink[:, None]
    total = tl.where(total > 0, total, 1.0)
    return gathered / total[:, None]
