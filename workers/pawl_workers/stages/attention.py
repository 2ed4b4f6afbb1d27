"""Queries meet keys: each new token gathers from the tokens before it."""

from __future__ import annotations

from torch import Tensor

from pawl_workers.batch import Batch
from pawl_workers.kv_cache import LayerCache
from pawl_workers.model.weights import AttentionWeights

__all__ = ["attend"]


def attend(x: Tensor, w: AttentionWeights, cache: LayerCache, batch: Batch) -> Tensor:
    """Attend each new token to every earlier token of its own sequence and to itself.

    Writes the new keys and values into `cache` before reading it; changes nothing else.

    Args:
        x: normalised stream, [T, D].
        w: projections of this layer.
        cache: this layer's blocks.
        batch: of this step.

    Returns:
        [T, D].

    Source: Vaswani et al., 2017, section 3.2; Ainslie et al., 2023 (grouped queries); Kwon et al., 2023,
    section 4.1 (paged KV).
    """
    num_tokens, num_heads = x.shape[0], w.num_heads
    heads = w.qkv(x).view(num_tokens, num_heads + 2 * w.num_kv_heads, w.head_dim)
    q = cache.place(heads, w, batch)
    return w.output(cache.attend(q, w, batch).reshape(num_tokens, num_heads * w.head_dim))
