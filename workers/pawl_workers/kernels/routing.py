"""Which experts a token goes to, and how their results are weighed."""

from __future__ import annotations

from torch import Tensor

__all__ = ["choose_experts"]


def choose_experts(scores: Tensor, num_active: int, *, normalised: bool) -> tuple[Tensor, Tensor]:
    """Choose the experts that a router scores highest.

    Source: Shazeer et al., "Outrageously large neural networks", 2017, without noise; Jiang et al., "Mixtral of
    experts", 2024, for shares that add up to 1.

    Args:
        scores: of each expert, [T, E].
        num_active: experts of a token.
        normalised: whether the shares of a token add up to 1.

    Returns:
        Shares, float32, and experts, int64, both [T, num_active], in the order of falling shares.
    """
    shares, chosen = scores.float().softmax(dim=-1).topk(num_active, dim=-1)
    if normalised:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return shares, chosen
