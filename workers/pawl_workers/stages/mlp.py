"""Features ignite: each token's vector is read by many detectors, and those that fire write back."""

from __future__ import annotations

import torch
from torch import Tensor

from pawl_workers.kernels.routing import choose_experts
from pawl_workers.kernels.steady_activation import steady_sigmoid
from pawl_workers.model.weights import ExpertWeights, MlpWeights

__all__ = ["mlp"]


def mlp(x: Tensor, w: MlpWeights | ExpertWeights) -> Tensor:
    """Expand, activate (times the ungated half when gated), contract: [T, D] -> [T, D]; routed, by a few experts.

    Source: Shazeer, "GLU variants improve transformer", 2020, for the gate.
    """
    if isinstance(w, ExpertWeights):
        return _route(x, w)
    return w.down(w.activate(w.up(x)))


def _route(x: Tensor, w: ExpertWeights) -> Tensor:
    """A token adds up its experts by number, then the shared one."""
    scores = w.router(x)
    gathered = _one_by_one(x, scores, w) if w.together is None else w.together(x, scores)
    if w.shared is not None:
        gathered += mlp(x, w.shared.mlp) * steady_sigmoid(w.shared.gate(x))
    return gathered


def _one_by_one(x: Tensor, scores: Tensor, w: ExpertWeights) -> Tensor:
    """Each expert computes all its tokens at once. Asks the host which are chosen."""
    shares, chosen = choose_experts(scores, w.num_active, normalised=w.normalised)
    gathered = torch.zeros_like(x)
    for expert in sorted(set(chosen.flatten().tolist())):
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        found = mlp(x[tokens], w.experts[expert])
        gathered[tokens] += found * shares[tokens, place].unsqueeze(1).to(x.dtype)
    return gathered
