"""All layers in a row, with what a block adds to the stream and the norm of the sum in one kernel.

The sum is rounded before it is normalised, as it is where two kernels do it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pawl_workers.batch import Batch
from pawl_workers.kernels import Kernels
from pawl_workers.kernels.steady_activation import steady_sigmoid
from pawl_workers.kernels.triton.experts import TritonExperts
from pawl_workers.kernels.triton.linear import GpuLinear
from pawl_workers.kernels.triton.one_row import add_row, fire_row, multiply_row
from pawl_workers.kernels.triton.rows import TritonActivation, TritonRmsNorm
from pawl_workers.model.packed import PackedNorm
from pawl_workers.model.weights import AttentionWeights, ExpertWeights, LayerWeights, MlpWeights

__all__ = ["TritonProgram"]


class TritonProgram:
    """Takes a step's stream through all layers, whose MLPs are dense, or routed ones computed together.

    Args:
        kernels: of the backend.
        layers: in their order.
        caches: keys and values of each.

    `fits_one_row`: a step of one row has kernels of its own.
    """

    def __init__(
        self, kernels: Kernels, layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self._kernels, self._layers, self._caches = kernels, layers, caches
        self.fits_one_row = all(map(_fits_one_row, layers))

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """Run all layers over the stream, [T, D], in place; writes keys and values into the caches."""
        if x.shape[0] == 1 and self.fits_one_row:
            return self._pass_one_row(x, batch)
        normed = _normalise(x, self._layers[0].attention_norm)
        following = [*(w.attention_norm for w in self._layers[1:]), None]
        for w, cache, next_norm in zip(self._layers, self._caches, following, strict=True):
            found = self._attend(normed, w.attention, cache, batch)
            if w.parallel:
                fired = _fire(normed if w.mlp_norm is None else w.mlp_norm(x), w.mlp)
                x.add_(found, alpha=w.residual_scale)
            else:
                found = _normalise(found, w.attention_output_norm)
                fired = _fire(_add(x, found, w.residual_scale, w.mlp_norm), w.mlp)
            normed = _add(x, _normalise(fired, w.mlp_output_norm), w.residual_scale, next_norm)
        return x

    def _pass_one_row(self, x: Tensor, batch: Batch) -> Tensor:
        """The same with seven kernels a layer: what surrounds a product is done in its pass over the weight."""
        for w, cache in zip(self._layers, self._caches, strict=True):
            attention = w.attention
            qkv, output, before, middle = attention.qkv, attention.output, w.attention_norm, w.mlp_norm
            # These and the rest are as `_fits_one_row` found.
            assert isinstance(qkv, GpuLinear) and isinstance(output, GpuLinear)  # noqa: S101, PT018
            assert isinstance(before, TritonRmsNorm) and isinstance(middle, TritonRmsNorm)  # noqa: S101, PT018
            heads = multiply_row(x, qkv.weight, qkv.bias, x.dtype, before)
            attended = self._attend_heads(heads, attention, cache, batch)
            add_row(x, attended, output.weight, output.bias, w.residual_scale)
            _add_fired_row(x, w.mlp, middle, w.residual_scale)
        return x

    def _attend(self, x: Tensor, w: AttentionWeights, cache: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        return w.output(self._attend_heads(w.qkv(x), w, cache, batch))

    def _attend_heads(self, heads: Tensor, w: AttentionWeights, cache: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        num_tokens = heads.shape[0]
        heads = heads.view(num_tokens, w.num_heads + 2 * w.num_kv_heads, w.head_dim)
        rotary = None if w.rotary is None else batch.rotary[w.rotary]
        q = self._kernels.place(heads, rotary, w.norms, *cache, batch.attention)
        attended = self._kernels.attend(q, w.rule, *cache, batch.attention)
        return attended.view(num_tokens, w.num_heads * w.head_dim)


def _fits_one_row(w: LayerWeights) -> bool:
    """Whether a layer is of the most frequent form: norms before its blocks alone, 16-bit weights, not strict."""
    attention, mlp = w.attention, w.mlp
    if w.parallel or w.attention_output_norm is not None or w.mlp_output_norm is not None:
        return False
    if not isinstance(w.attention_norm, TritonRmsNorm) or not isinstance(w.mlp_norm, TritonRmsNorm):
        return False
    linears = [attention.qkv, attention.output]
    if isinstance(mlp, ExpertWeights):
        if mlp.shared is not None or not isinstance(mlp.together, TritonExperts):
            return False
        linears.append(mlp.router)
    elif isinstance(mlp.activate, TritonActivation):
        linears += [mlp.up, mlp.down]
    else:
        return False
    return all(isinstance(linear, GpuLinear) and linear.weight.dtype is not torch.float32 for linear in linears)


def _add_fired_row(x: Tensor, mlp: MlpWeights | ExpertWeights, norm: TritonRmsNorm, scale: float) -> None:
    """Add what an MLP makes of one row, normalised, to that row, [1, D], in place."""
    if isinstance(mlp, ExpertWeights):
        router, experts = mlp.router, mlp.together
        assert isinstance(router, GpuLinear) and isinstance(experts, TritonExperts)  # noqa: S101, PT018
        scores = multiply_row(x, router.weight, router.bias, x.dtype, norm)
        experts.add_row(x, scores, scale, norm)
        return
    up, down, activate = mlp.up, mlp.down, mlp.activate
    assert isinstance(up, GpuLinear) and isinstance(down, GpuLinear)  # noqa: S101, PT018
    assert isinstance(activate, TritonActivation)  # noqa: S101
    hidden = fire_row(x, up.weight, up.bias, activate, norm)
    add_row(x, hidden, down.weight, down.bias, scale)


def _fire(x: Tensor, mlp: MlpWeights | ExpertWeights) -> Tensor:
    if isinstance(mlp, MlpWeights):
        return mlp.down(mlp.activate(mlp.up(x)))
    assert mlp.together is not None  # noqa: S101 - the backend compiles no others
    found = mlp.together(x, mlp.router(x))
    if mlp.shared is not None:
        found += _fire(x, mlp.shared.mlp) * steady_sigmoid(mlp.shared.gate(x))
    return found


def _normalise(x: Tensor, norm: PackedNorm | None) -> Tensor:
    return x if norm is None else norm(x)


def _add(x: Tensor, update: Tensor, scale: float, norm: PackedNorm | None) -> Tensor:
    if isinstance(norm, TritonRmsNorm):
        return norm.add(x, update, scale)
    return _normalise(x.add_(update, alpha=scale), norm)
