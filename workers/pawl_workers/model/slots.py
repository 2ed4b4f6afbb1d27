"""Slots: where tensors wait until their parts are complete, and how complete ones become `Weights`.

Knows shapes and merging; reads no files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pawl_workers.large_pages import passing_tensor
from pawl_workers.model.packed import ExpertPacker, NormWeights, PackedExperts, PackedLinear, PackedNorm, Packer
from pawl_workers.model.spec import Interleaved, ModelSpec, QueryKeyNorm, TensorTarget
from pawl_workers.model.weights import (
    AttentionRule,
    AttentionWeights,
    EmbeddingWeights,
    ExpertWeights,
    HeadWeights,
    LayerWeights,
    MlpWeights,
    QueryKeyNormWeights,
    SharedExpertWeights,
    Weights,
)

__all__ = ["Slot", "Slots", "held_bytes", "slot_shapes"]

_LINEARS = ("qkv", "attention_output", "up", "down", "router", "shared_gate", "head")
_EXPERT = re.compile(r"(layers\.\d+\.experts\.)(\d+)(\..*)")
_NORMS = ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm")


def slot_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name every slot a model of this spec may have, with the shape of the whole, merged tensor."""
    hidden = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (spec.vocab_size, hidden),
        "positions": (spec.max_context, hidden),
        "final_norm.weight": (hidden,),
        "final_norm.bias": (hidden,),
        "head.weight": (spec.vocab_size, hidden),
        "head.bias": (spec.vocab_size,),
    }
    wide = spec.query_key_norm is QueryKeyNorm.WIDTH
    for i, layer in enumerate(spec.layers):
        at = f"layers.{i}."
        linears = [
            ("qkv", spec.qkv_size, hidden),
            ("attention_output", hidden, spec.num_heads * spec.head_dim),
        ]
        if layer.routed and spec.experts is not None:
            linears.append(("router", spec.experts.num_experts, hidden))
            for e in range(spec.experts.num_experts):
                linears += _mlp_shapes(spec, spec.experts.intermediate_size, f"experts.{e}.")
            if spec.experts.shared_size:
                linears.append(("shared_gate", 1, hidden))
                linears += _mlp_shapes(spec, spec.experts.shared_size, "shared.")
        else:
            linears += _mlp_shapes(spec, spec.intermediate_size, "")
        for name, rows, columns in linears:
            shapes[f"{at}{name}.weight"] = (rows, columns)
            shapes[f"{at}{name}.bias"] = (rows,)
        for name in _NORMS:
            shapes[f"{at}{name}.weight"] = (hidden,)
            shapes[f"{at}{name}.bias"] = (hidden,)
        for name, heads in (("q_norm", spec.num_heads), ("k_norm", spec.num_kv_heads)):
            shapes[f"{at}{name}.weight"] = (spec.head_dim * (heads if wide else 1),)
    return shapes


def _mlp_shapes(spec: ModelSpec, inner: int, at: str) -> list[tuple[str, int, int]]:
    up = inner * (2 if spec.gated_mlp else 1)
    return [(f"{at}up", up, spec.hidden_size), (f"{at}down", spec.hidden_size, inner)]


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot that will be filled: the shape of the whole, and a type that holds every value as it is stored."""

    shape: tuple[int, ...]
    stored: torch.dtype


def _types(linears: Sequence[PackedLinear]) -> tuple[torch.dtype, ...]:
    sizes: dict[torch.dtype, int] = {}
    for linear in linears:
        sizes[linear.data_type] = sizes.get(linear.data_type, 0) + linear.num_bytes
    return tuple(sorted(sizes, key=lambda dtype: -sizes[dtype]))


def _apart(tensor: Tensor, rows: Interleaved) -> Tensor:
    """Of each head the even ones of the rows that turn, then the odd ones, then the rest: scores stay what they are."""
    turned = torch.arange(rows.rotary_dim)
    order = torch.cat([turned[::2], turned[1::2], torch.arange(rows.rotary_dim, rows.head_dim)])
    return tensor.view(-1, rows.head_dim, *tensor.shape[1:])[:, order].reshape(tensor.shape)


def _is_linear(name: str) -> bool:
    path, _, kind = name.rpartition(".")
    return kind == "weight" and path.rpartition(".")[2] in _LINEARS


def _stack_of(name: str) -> str:
    """The name that the same slot has in all experts of a layer."""
    return _EXPERT.sub(lambda found: found[1] + found[3][1:], name)


def _waiting_dtype(name: str, slot: Slot, packer: Packer, dtype: torch.dtype) -> torch.dtype:
    """The type in which a slot's tensor waits, and stays if it is not packed: the narrowest that loses nothing."""
    if _is_linear(name):
        return packer.linear_dtype(slot.stored, dtype)
    if name == "embedding" and torch.promote_types(slot.stored, dtype) is dtype:
        return slot.stored  # its rows are widened when they are looked up
    return dtype


def held_bytes(slots: Mapping[str, Slot], packer: Packer, dtype: torch.dtype) -> int:
    """Bytes that the weights of these slots will take, packed: exact for fp16 weights, else the most.

    Args:
        slots: all that will be filled; without a head the embedding is packed as one, too.
        packer: the kernel backend.
        dtype: the model's type.
    """
    total = 0
    for name, slot in slots.items():
        if _is_linear(name):
            count = packer.packed_head_bytes if name == "head.weight" else packer.packed_bytes
            total += count(slot.shape, slot.stored, dtype)
        else:
            total += math.prod(slot.shape) * _waiting_dtype(name, slot, packer, dtype).itemsize
        if name == "embedding" and "head.weight" not in slots:
            total += packer.packed_head_bytes(slot.shape, slot.stored, dtype)
    return total


class Slots:
    """Collects tensors by slot; a linear layer is packed, and its tensors dropped, once it is whole.

    Nothing is allocated for a slot before the first of its tensors arrives; where the backend computes the experts of a
    layer together, one tensor is allocated for all of them, of which each expert's weight is a view.
    """

    def __init__(self, slots: Mapping[str, Slot], packer: Packer, device: torch.device, dtype: torch.dtype) -> None:
        self._slots = slots  # all that will be filled
        self._packer = packer
        self._device, self._dtype = device, dtype
        self._tensors: dict[str, Tensor] = {}
        self._missing_rows = {name: slot.shape[0] for name, slot in slots.items()}
        self._linears: dict[str, PackedLinear] = {}
        self._stacks: dict[str, Tensor] = {}
        self._stack_sizes = Counter(map(_stack_of, slots)) if isinstance(packer, ExpertPacker) else Counter[str]()

    def put(self, target: TensorTarget, tensor: Tensor) -> None:
        """Store one tensor of the checkpoint, converted and in its place among those it is merged with."""
        slot, shape = target.slot, self._slots[target.slot].shape
        whole = self._tensors.get(slot)
        if whole is None:
            dtype = _waiting_dtype(slot, self._slots[slot], self._packer, self._dtype)
            whole = self._tensors[slot] = self._room(slot, shape, dtype)
        num_rows = target.num_rows or shape[0]
        if target.transposed:
            tensor = tensor.t()
        if target.heads:  # [heads, (q, k, v), head_dim] -> [(q, k, v), heads, head_dim]
            tensor = tensor.view(target.heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
        if target.interleaved is not None:
            tensor = _apart(tensor, target.interleaved)
        part = whole[target.row : target.row + num_rows].copy_(tensor)
        if target.added:
            part += target.added
        self._missing_rows[slot] -= num_rows
        name, _, kind = slot.rpartition(".")
        if kind in {"weight", "bias"} and name.rpartition(".")[2] in _LINEARS:
            weight, bias = f"{name}.weight", f"{name}.bias"
            if self._missing_rows.get(weight) == 0 and self._missing_rows.get(bias, 0) == 0:
                pack = self._packer.pack_head if name == "head" else self._packer.pack_linear
                self._linears[name] = pack(self._tensors.pop(weight), self._tensors.pop(bias, None))

    def _room(self, slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        stack, expert = _stack_of(slot), _EXPERT.match(slot)
        if expert and _is_linear(slot) and self._stack_sizes[stack]:
            if stack not in self._stacks:
                whole = (self._stack_sizes[stack], *shape)
                self._stacks[stack] = torch.empty(whole, dtype=dtype, device=self._device)
            return self._stacks[stack][int(expert[2])]
        if _is_linear(slot) and self._device.type == "cpu":
            return passing_tensor(shape, dtype)  # until it is packed
        return torch.empty(shape, dtype=dtype, device=self._device)

    def assemble(self, spec: ModelSpec, num_parameters: int) -> Weights:
        """Put the slots together; every slot must be filled."""
        embedding = self._tensors["embedding"]
        layers = tuple(self._layer(spec, i) for i in range(spec.num_layers))
        is_tied = "head" not in self._linears
        head = self._tied_head(embedding) if is_tied else self._linears["head"]
        final_norm = self._norm(spec, "final_norm")
        if final_norm is None:
            raise AssertionError("every family has a final norm")
        packed = list(self._linears.values()) + ([head] if is_tied else [])
        biases = [linear.bias for linear in packed if linear.bias is not None]
        kept = [*self._tensors.values(), *biases]
        return Weights(
            spec=spec,
            embedding=EmbeddingWeights(embedding, self._tensors.get("positions"), self._dtype, spec.embedding_scale),
            layers=layers,
            final_norm=final_norm,
            head=HeadWeights(head, spec.logit_divisor, spec.logit_softcap),
            num_parameters=num_parameters,
            num_bytes=sum(linear.num_bytes for linear in packed) + sum(tensor.nbytes for tensor in kept),
            linear_types=_types(packed),
        )

    def _tied_head(self, embedding: Tensor) -> PackedLinear:
        dtype = self._packer.linear_dtype(embedding.dtype, self._dtype)
        return self._packer.pack_head(embedding.to(dtype), self._tensors.pop("head.bias", None))

    def _layer(self, spec: ModelSpec, index: int) -> LayerWeights:
        at, layer = f"layers.{index}.", spec.layers[index]
        scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        attention = AttentionWeights(
            self._linears[at + "qkv"],
            self._linears[at + "attention_output"],
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            AttentionRule(scale, layer.window, spec.attention_softcap),
            layer.rotary if spec.rotaries else None,
            self._query_key_norm(spec, at),
        )
        mlp: MlpWeights | ExpertWeights
        if layer.routed and spec.experts is not None:
            experts = (self._mlp(spec, f"{at}experts.{e}.") for e in range(spec.experts.num_experts))
            shared = None
            if spec.experts.shared_size:
                shared = SharedExpertWeights(self._mlp(spec, f"{at}shared."), self._linears[at + "shared_gate"])
            mlp = ExpertWeights(
                self._linears[at + "router"],
                tuple(experts),
                spec.experts.num_active,
                spec.experts.normalised,
                shared,
                self._experts_together(spec, at),
            )
        else:
            mlp = self._mlp(spec, at)
        before, after, mlp_before, mlp_after = (self._norm(spec, at + name) for name in _NORMS)
        return LayerWeights(
            before, attention, after, mlp_before, mlp, mlp_after, spec.parallel_blocks, spec.residual_scale
        )

    def _experts_together(self, spec: ModelSpec, at: str) -> PackedExperts | None:
        up, down = self._stacks.get(f"{at}experts.up.weight"), self._stacks.get(f"{at}experts.down.weight")
        if not isinstance(self._packer, ExpertPacker) or spec.experts is None or up is None or down is None:
            return None
        if self._stack_sizes[f"{at}experts.up.bias"] or self._stack_sizes[f"{at}experts.down.bias"]:
            return None
        activate = self._packer.pack_activation(spec.activation, gated=spec.gated_mlp)
        num_active, normalised = spec.experts.num_active, spec.experts.normalised
        return self._packer.pack_experts(up, down, activate, num_active, normalised=normalised)

    def _mlp(self, spec: ModelSpec, at: str) -> MlpWeights:
        activate = self._packer.pack_activation(spec.activation, gated=spec.gated_mlp)
        up, down = self._linears[at + "up"], self._linears[at + "down"]
        return MlpWeights(up, activate, down, spec.activation, spec.gated_mlp)

    def _query_key_norm(self, spec: ModelSpec, at: str) -> QueryKeyNormWeights | None:
        if spec.query_key_norm is None:
            return None
        query, key = self._tensors[at + "q_norm.weight"], self._tensors[at + "k_norm.weight"]
        return QueryKeyNormWeights(spec.query_key_norm, query, key, spec.norm_epsilon)

    def _norm(self, spec: ModelSpec, name: str) -> PackedNorm | None:
        weight, bias = self._tensors.get(f"{name}.weight"), self._tensors.get(f"{name}.bias")
        if weight is None:
            return None
        return self._packer.pack_norm(NormWeights(spec.norm, weight, bias, spec.norm_epsilon))
