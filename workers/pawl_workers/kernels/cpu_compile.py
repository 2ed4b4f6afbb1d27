"""Compiles the layers of a model into programs of C operations."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from pawl_workers.kernels.cpu_calls import (
    activation_number,
    attention_call,
    embedding_call,
    norm_call,
    padded_dim,
    place_call,
)
from pawl_workers.kernels.cpu_linear import CpuLinear
from pawl_workers.kernels.cpu_operations import Buffer, Cut, Kind, Router, Segment
from pawl_workers.kernels.cpu_program import CpuProgram
from pawl_workers.kernels.cpu_screen import CpuHead
from pawl_workers.kernels.native.library import Library
from pawl_workers.kernels.native.structures import MOST_ROTARIES, ExpertsCall, LinearCall, Operation
from pawl_workers.model.packed import PackedLinear, PackedNorm
from pawl_workers.model.weights import EmbeddingWeights, ExpertWeights, LayerWeights, MlpWeights

__all__ = ["compile_choice", "compile_embedding", "compile_head", "compile_program"]

Cache = tuple[Tensor, Tensor]
Steps = Iterator[Operation | Router]
_EXPERT_OPERATIONS = (Kind.GROUP, Kind.GATHER, Kind.UP, Kind.DOWN, Kind.COMBINE)


def compile_program(
    layers: Sequence[LayerWeights], caches: Sequence[Cache], cache_format: int, library: Library
) -> CpuProgram | None:
    """Compile layers; None where a gate cannot be fused, or angles are more than a frame holds."""
    if not all(_can_compile(w, library) for w in layers):
        return None
    segments: list[Segment] = []
    operations: list[Operation] = []
    kept: list[object] = []
    cut: Cut | None = None
    for w, cache in zip(layers, caches, strict=True):
        for step in _layer(w, cache, cache_format, kept):
            if isinstance(step, Router):
                segments.append(Segment(operations, step))
                operations = []
                continue
            operations.append(step)
            if step.kind == Kind.PLACE:  # the last one's stays
                cut = Cut(len(segments), len(operations), _read_later(w), w.attention.num_heads * w.attention.head_dim)
    assert cut is not None  # noqa: S101 - a model has layers
    segments.append(Segment(operations, None))
    attention = layers[0].attention
    kv_shape = attention.num_kv_heads, padded_dim(attention.head_dim)
    return CpuProgram(segments, cut, _widths(layers), kv_shape, _widest(layers), library, kept)


def compile_embedding(w: EmbeddingWeights) -> Operation:
    """Compile what begins the stream."""
    operation = Operation(kind=Kind.EMBED, target=Buffer.STREAM)
    operation.call.embedding = embedding_call(w)
    return operation


def compile_head(final_norm: PackedNorm | None, head: PackedLinear) -> list[Operation]:
    """Compile what comes after the layers, for the rows of the whole stream."""
    norm = list(_norm(final_norm, Buffer.STREAM, Buffer.NORMED))
    scoring = _linear(head, Buffer.NORMED if norm else Buffer.STREAM, Buffer.LOGITS)
    scoring.kind = Kind.SCORE
    return [*norm, scoring]


def compile_choice(final_norm: PackedNorm | None, head: PackedLinear) -> list[Operation]:
    """Compile what finds the best token of each row of a stream; nothing where the head has no screen."""
    if not isinstance(head, CpuHead) or head.screen is None:
        return []
    norm = list(_norm(final_norm, Buffer.STREAM, Buffer.NORMED))
    read = Buffer.NORMED if norm else Buffer.STREAM
    quantise = Operation(kind=Kind.QUANTISE, source=read)
    screen = Operation(kind=Kind.SCREEN)
    quantise.call.screen = screen.call.screen = head.screen.call()
    choose = _linear(head, read, read)
    choose.kind = Kind.CHOOSE
    return [*norm, quantise, screen, choose]


def _read_later(w: LayerWeights) -> tuple[Buffer, ...]:
    """What a layer still reads once its keys and values are written, but for the stream."""
    if not w.parallel or (w.mlp_norm is None and w.attention_norm is None):
        return (Buffer.QUERIES,)
    return Buffer.QUERIES, Buffer.NORMED if w.mlp_norm is None else Buffer.NORMED_AGAIN


def _can_compile(w: LayerWeights, library: Library) -> bool:
    fused = all(not mlp.gated or mlp.down.in_features % library.panel_width == 0 for mlp in _mlps(w))
    return fused and (w.attention.rotary is None or w.attention.rotary < MOST_ROTARIES)


def _mlps(w: LayerWeights) -> tuple[MlpWeights, ...]:
    if isinstance(w.mlp, MlpWeights):
        return (w.mlp,)
    return w.mlp.experts if w.mlp.shared is None else (*w.mlp.experts, w.mlp.shared.mlp)


def _widths(layers: Sequence[LayerWeights]) -> dict[Buffer, int]:
    attention = layers[0].attention
    hidden, queries = attention.qkv.in_features, attention.num_heads * attention.head_dim
    widths = dict.fromkeys((Buffer.NORMED, Buffer.NORMED_AGAIN, Buffer.FOUND), hidden)
    widths |= {Buffer.HEADS: attention.qkv.out_features, Buffer.QUERIES: queries, Buffer.ATTENDED: queries}
    for w in layers:
        if isinstance(w.mlp, MlpWeights):
            _widen(widths, {Buffer.HIDDEN: w.mlp.down.in_features})
            continue
        rows = w.mlp.num_active  # of each token
        _widen(
            widths,
            {
                Buffer.SCORES: len(w.mlp.experts),
                Buffer.GATHERED: rows * hidden,
                Buffer.EXPERT_HIDDEN: rows * w.mlp.experts[0].down.in_features,
                Buffer.EXPERT_FOUND: rows * hidden,
            },
        )
        if w.mlp.shared is not None:
            inner = w.mlp.shared.mlp.down.in_features
            _widen(widths, {Buffer.HIDDEN: inner, Buffer.SHARED_FOUND: hidden, Buffer.SHARED_SCORES: 1})
    return widths


def _widen(widths: dict[Buffer, int], needed: Mapping[Buffer, int]) -> None:
    for buffer, width in needed.items():
        widths[buffer] = max(width, widths.get(buffer, 0))


def _widest(layers: Sequence[LayerWeights]) -> int:
    attentions, mlps = [w.attention for w in layers], [mlp for w in layers for mlp in _mlps(w)]
    linears = [*(a.qkv for a in attentions), *(a.output for a in attentions), *(mlp.down for mlp in mlps)]
    return max(linear.in_features for linear in linears)


def _layer(w: LayerWeights, cache: Cache, cache_format: int, kept: list[object]) -> Steps:
    attention, factor = w.attention, w.residual_scale
    if w.parallel:  # before attention adds to the stream
        yield from _norm(w.mlp_norm, Buffer.STREAM, Buffer.NORMED_AGAIN)
    yield from _norm(w.attention_norm, Buffer.STREAM, Buffer.NORMED)
    read = Buffer.STREAM if w.attention_norm is None else Buffer.NORMED
    yield _linear(attention.qkv, read, Buffer.HEADS)
    num_heads, num_kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    place = Operation(kind=Kind.PLACE, source=Buffer.HEADS, target=Buffer.QUERIES)
    place.rotary = -1 if attention.rotary is None else attention.rotary
    place.call.place = place_call(attention.norms, num_heads, num_kv_heads, head_dim, cache, cache_format)
    yield place
    for kind in (Kind.ATTEND, Kind.MERGE):
        attend = Operation(kind=kind, source=Buffer.QUERIES, target=Buffer.ATTENDED)
        attend.call.attention = attention_call(attention.rule, num_heads, num_kv_heads, head_dim, cache, cache_format)
        yield attend
    yield from _add(attention.output, w.attention_output_norm, Buffer.ATTENDED, factor)
    if w.parallel:
        read = read if w.mlp_norm is None else Buffer.NORMED_AGAIN
    else:
        yield from _norm(w.mlp_norm, Buffer.STREAM, Buffer.NORMED)
        read = Buffer.STREAM if w.mlp_norm is None else Buffer.NORMED
    if isinstance(w.mlp, ExpertWeights):
        yield from _experts(w.mlp, w.mlp_output_norm, read, factor, kept)
    else:
        yield _fire(w.mlp, read)
        yield from _add(w.mlp.down, w.mlp_output_norm, Buffer.HIDDEN, factor)


def _experts(w: ExpertWeights, norm: PackedNorm | None, read: Buffer, factor: float, kept: list[object]) -> Steps:
    """The router's scores and the shared expert; then, once experts are chosen, each of them over its tokens."""
    num_experts = len(w.experts)
    yield _linear(w.router, read, Buffer.SCORES)
    if w.shared is not None:
        yield _linear(w.shared.gate, read, Buffer.SHARED_SCORES)
        yield _fire(w.shared.mlp, read)
        yield _linear(w.shared.mlp.down, Buffer.HIDDEN, Buffer.SHARED_FOUND)
    yield Router(num_experts, w.num_active, w.normalised, w.shared is not None)
    ups = (LinearCall * num_experts)(*(_up(mlp) for mlp in w.experts))
    downs = (LinearCall * num_experts)(*(_call(mlp.down) for mlp in w.experts))
    kept += ups, downs
    call = ExpertsCall(
        up=ctypes.addressof(ups),
        down=ctypes.addressof(downs),
        num_experts=num_experts,
        num_active=w.num_active,
        width=w.router.in_features,
        inner=w.experts[0].down.in_features,
        added=norm is None,
        shared=w.shared is not None,
        factor=factor,
    )
    target = Buffer.STREAM if norm is None else Buffer.FOUND
    for kind in _EXPERT_OPERATIONS:
        operation = Operation(kind=kind, source=read, target=target)
        operation.call.experts = call
        yield operation
    yield from _add_normed(norm, factor)


def _fire(mlp: MlpWeights, source: Buffer) -> Operation:
    up = _linear(mlp.up, source, Buffer.HIDDEN)
    up.call.linear = _up(mlp)
    return up


def _add(linear: PackedLinear, norm: PackedNorm | None, source: Buffer, factor: float) -> Iterator[Operation]:
    """What a block found is added to the stream, after a norm of its own if it has one."""
    if norm is None:
        added = _linear(linear, source, Buffer.STREAM)
        added.call.linear.added, added.call.linear.factor = 1, factor
        yield added
        return
    yield _linear(linear, source, Buffer.FOUND)
    yield from _add_normed(norm, factor)


def _add_normed(norm: PackedNorm | None, factor: float) -> Iterator[Operation]:
    for operation in _norm(norm, Buffer.FOUND, Buffer.STREAM):
        operation.call.norm.added, operation.call.norm.factor = 1, factor
        yield operation


def _norm(norm: PackedNorm | None, source: Buffer, target: Buffer) -> Iterator[Operation]:
    if norm is not None:
        operation = Operation(kind=Kind.NORM, source=source, target=target)
        operation.call.norm = norm_call(norm.weights)
        yield operation


def _linear(linear: PackedLinear, source: Buffer, target: Buffer) -> Operation:
    operation = Operation(kind=Kind.LINEAR, source=source, target=target)
    operation.call.linear = _call(linear)
    return operation


def _call(linear: PackedLinear) -> LinearCall:
    assert isinstance(linear, CpuLinear)  # noqa: S101 - the cpu kernels pack nothing else
    return linear.call()


def _up(mlp: MlpWeights) -> LinearCall:
    """Into the hidden layer, with the activation, and the gate if there is one."""
    call = _call(mlp.up)
    call.activation, call.gated = activation_number(mlp.activation), mlp.gated
    call.y_stride = mlp.down.in_features
    return call
