"""Slots: where tensors wait until their parts are complete, and how complete ones become `Weights`.

Knows shapes and merging; reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pawl_workers.model.spec import ModelSpec, TensorTarget
from pawl_workers.model.weights import (
    AttentionWeights,
    EmbeddingWeights,
    LayerWeights,
    MlpWeights,
    NormWeights,
    PackedLinear,
    PackedNorm,
    Packer,
    Weights,
)

__all__ = ["Slots", "slot_shapes"]

_LINEARS = ("qkv", "attention_output", "up", "down", "head")


def slot_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name every slot a model of this spec may have, with the shape of the whole, merged tensor."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (spec.vocab_size, hidden),
        "positions": (spec.max_context, hidden),
        "final_norm.weight": (hidden,),
        "final_norm.bias": (hidden,),
        "head.weight": (spec.vocab_size, hidden),
    }
    for i in range(spec.num_layers):
        for name, rows, columns in (
            ("qkv", spec.qkv_size, hidden),
            ("attention_output", hidden, spec.num_heads * spec.head_dim),
            ("up", inner * (2 if spec.gated_mlp else 1), hidden),
            ("down", hidden, inner),
        ):
            shapes[f"layers.{i}.{name}.weight"] = (rows, columns)
            shapes[f"layers.{i}.{name}.bias"] = (rows,)
        for name in ("attention_norm", "mlp_norm"):
            shapes[f"layers.{i}.{name}.weight"] = (hidden,)
            shapes[f"layers.{i}.{name}.bias"] = (hidden,)
    return shapes


class Slots:
    """Collects tensors by slot; a linear layer is packed, and its tensors dropped, once it is whole."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], packer: Packer, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._shapes = shapes  # of the slots that will be filled
        self._packer = packer
        self._device, self._dtype = device, dtype
        self._tensors: dict[str, Tensor] = {}
        self._missing_rows = {slot: shape[0] for slot, shape in shapes.items()}
        self._linears: dict[str, PackedLinear] = {}

    def put(self, target: TensorTarget, tensor: Tensor) -> None:
        """Store one tensor of the checkpoint, converted and in its place among those it is merged with."""
        slot, shape = target.slot, self._shapes[target.slot]
        whole = self._tensors.get(slot)
        if whole is None:
            whole = self._tensors[slot] = torch.empty(shape, dtype=self._dtype, device=self._device)
        num_rows = target.num_rows or shape[0]
        whole[target.row : target.row + num_rows].copy_(tensor.t() if target.transposed else tensor)
        self._missing_rows[slot] -= num_rows
        name, _, part = slot.rpartition(".")
        if part in {"weight", "bias"} and name.rpartition(".")[2] in _LINEARS:
            weight, bias = f"{name}.weight", f"{name}.bias"
            if self._missing_rows[weight] == 0 and self._missing_rows.get(bias, 0) == 0:
                self._linears[name] = self._packer.pack_linear(self._tensors.pop(weight), self._tensors.pop(bias, None))

    def assemble(self, spec: ModelSpec, num_parameters: int) -> Weights:
        """Put the slots together; every slot must be filled."""
        embedding = self._tensors["embedding"]
        layers = []
        for i in range(spec.num_layers):
            at = f"layers.{i}."
            linears = self._linears
            attention = AttentionWeights(
                linears[at + "qkv"],
                linears[at + "attention_output"],
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
            )
            mlp = MlpWeights(
                linears[at + "up"],
                self._packer.pack_activation(spec.activation, gated=spec.gated_mlp),
                linears[at + "down"],
                spec.activation,
                spec.gated_mlp,
            )
            attention_norm, mlp_norm = self._norm(spec, at + "attention_norm"), self._norm(spec, at + "mlp_norm")
            layers.append(LayerWeights(attention_norm, attention, mlp_norm, mlp))
        head = self._packer.pack_linear(embedding, None) if spec.tied_head else self._linears["head"]
        packed = list(self._linears.values()) + ([head] if spec.tied_head else [])
        biases = [linear.bias for linear in packed if linear.bias is not None]
        kept = [*self._tensors.values(), *biases]
        return Weights(
            spec=spec,
            embedding=EmbeddingWeights(embedding, self._tensors.get("positions")),
            layers=tuple(layers),
            final_norm=self._norm(spec, "final_norm"),
            head=head,
            num_parameters=num_parameters,
            num_bytes=sum(linear.num_bytes for linear in packed) + sum(tensor.nbytes for tensor in kept),
        )

    def _norm(self, spec: ModelSpec, name: str) -> PackedNorm:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias")
        return self._packer.pack_norm(NormWeights(spec.norm, weight, bias, spec.norm_epsilon))
