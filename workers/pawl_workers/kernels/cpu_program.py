"""The layers of a model as one program of C operations: a step is one call and one parallel region.

The operations are those that the stages call one by one, with the same bits; `forward.py` says what they add up to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from pawl_workers.batch import Batch
from pawl_workers.kernels.cpu_calls import activation_number, attention_call, norm_call, padded_dim, place_call
from pawl_workers.kernels.cpu_layout import CpuLayout
from pawl_workers.kernels.cpu_linear import CpuLinear
from pawl_workers.kernels.native.library import Library
from pawl_workers.kernels.native.structures import MOST_ROTARIES, Frame, LinearCall, Operation
from pawl_workers.model.weights import AttentionWeights, LayerWeights, MlpWeights, PackedLinear, PackedNorm

__all__ = ["CpuProgram", "StepSeconds", "compile_program"]


class _Kind(IntEnum):  # as in program.c
    NORM = 0
    LINEAR = 1
    PLACE = 2
    ATTEND = 3
    MERGE = 4


class _Buffer(IntEnum):
    STREAM = 0  # [T, D]
    NORMED = 1  # [T, D]
    NORMED_AGAIN = 2  # [T, D], for the MLP of a parallel block
    HEADS = 3  # [T, (H + 2K) * head_dim]
    QUERIES = 4  # [T, H * head_dim]
    ATTENDED = 5  # [T, H * head_dim]
    HIDDEN = 6  # [T, I]
    FOUND = 7  # [T, D], before a norm of its own


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Where the time of steps went, by kind of operation, barriers included."""

    norms: float
    linears: float
    placing: float
    attention: float


class CpuProgram:
    """Runs all layers over a step's stream. Keeps addresses: weights and cache must outlive it."""

    def __init__(
        self, operations: Sequence[Operation], widths: Sequence[int], attention: AttentionWeights, library: Library
    ) -> None:
        self._operations = (Operation * len(operations))(*operations)
        self._widths = widths  # floats of a row of each buffer
        self._num_kv_heads, self._padded = attention.num_kv_heads, padded_dim(attention.head_dim)
        self._library = library
        self._counters = np.zeros(len(operations), dtype=np.int64)
        self._rows = 0
        self._memory: list[Tensor] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_bytes = library.program_scratch_bytes(max(o.call.linear.k for o in operations if o.kind == 1))
        self._seconds = np.zeros(len(_Kind))

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """Run all layers over the stream, [T, D] float32, in place; writes keys and values into the cache."""
        layout = batch.attention
        assert isinstance(layout, CpuLayout)  # noqa: S101 - narrows the type
        x = x.contiguous()
        num_rows, num_threads = x.shape[0], torch.get_num_threads()
        self._make_room(num_rows, num_threads)
        partials = torch.empty(layout.partial_floats(self._num_kv_heads, self._padded))
        frame = Frame(
            slots=layout.slots.data_ptr(),
            tables=layout.tables.data_ptr(),
            tiles=layout.tiles.data_ptr(),
            pairs=None if layout.pairs is None else layout.pairs.data_ptr(),
            partials=partials.data_ptr(),
            counters=self._counters.ctypes.data,
            scratch=-(-self._scratch.data_ptr() // 64) * 64,
            seconds=self._seconds.ctypes.data,
            rows=num_rows,
            num_tiles=len(layout.tiles),
            num_pairs=0 if layout.pairs is None else len(layout.pairs),
            table_stride=layout.table_stride,
            scratch_bytes=self._scratch_bytes,
        )
        frame.buffers[_Buffer.STREAM] = x.data_ptr()
        for buffer, memory in enumerate(self._memory, start=1):
            frame.buffers[buffer] = memory.data_ptr()
        for i, (cosines, sines) in enumerate(batch.rotary):
            frame.cosines[i], frame.sines[i] = cosines.data_ptr(), sines.data_ptr()
            frame.turned[i] = cosines.shape[-1]
        self._library.run(self._operations, len(self._operations), ctypes.byref(frame), num_threads)
        return x

    def take_seconds(self) -> StepSeconds:
        """Seconds since this was last called."""
        norms, linears, placing, attending, merging = self._seconds.tolist()
        self._seconds.fill(0.0)
        return StepSeconds(norms, linears, placing, attending + merging)

    def _make_room(self, num_rows: int, num_threads: int) -> None:
        if num_rows > self._rows:
            self._memory = [torch.empty(num_rows, width) for width in self._widths]
            self._rows = num_rows
        if self._scratch.numel() < num_threads * self._scratch_bytes + 64:
            self._scratch = torch.empty(num_threads * self._scratch_bytes + 64, dtype=torch.uint8)


def compile_program(
    layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]], cache_format: int, library: Library
) -> CpuProgram | None:
    """Compile layers; None where a layer routes to experts, or where its gate cannot be fused."""
    operations: list[Operation] = []
    for w, cache in zip(layers, caches, strict=True):
        if not isinstance(w.mlp, MlpWeights) or not _can_fuse(w.mlp, library):
            return None
        if w.attention.rotary is not None and w.attention.rotary >= MOST_ROTARIES:
            return None
        operations += _layer(w, w.mlp, cache, cache_format)
    attention, mlp = layers[0].attention, layers[0].mlp
    assert isinstance(mlp, MlpWeights)  # noqa: S101 - as checked above
    hidden = attention.qkv.in_features
    queries = attention.num_heads * attention.head_dim
    widths = [hidden, hidden, attention.qkv.out_features, queries, queries, mlp.down.in_features, hidden]
    return CpuProgram(operations, widths, attention, library)


def _can_fuse(w: MlpWeights, library: Library) -> bool:
    return not w.gated or w.down.in_features % library.panel_width == 0


def _layer(w: LayerWeights, mlp: MlpWeights, cache: tuple[Tensor, Tensor], cache_format: int) -> Iterator[Operation]:
    attention, factor = w.attention, w.residual_scale
    if w.parallel:
        yield from _norm(w.mlp_norm, _Buffer.STREAM, _Buffer.NORMED_AGAIN)
    yield from _norm(w.attention_norm, _Buffer.STREAM, _Buffer.NORMED)
    read = _Buffer.STREAM if w.attention_norm is None else _Buffer.NORMED
    yield _linear(attention.qkv, read, _Buffer.HEADS)
    num_heads, num_kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    place = Operation(kind=_Kind.PLACE, source=_Buffer.HEADS, target=_Buffer.QUERIES)
    place.rotary = -1 if attention.rotary is None else attention.rotary
    place.call.place = place_call(attention.norms, num_heads, num_kv_heads, head_dim, cache, cache_format)
    yield place
    for kind in (_Kind.ATTEND, _Kind.MERGE):
        attend = Operation(kind=kind, source=_Buffer.QUERIES, target=_Buffer.ATTENDED)
        attend.call.attention = attention_call(attention.rule, num_heads, num_kv_heads, head_dim, cache, cache_format)
        yield attend
    yield from _add(attention.output, w.attention_output_norm, _Buffer.ATTENDED, factor)
    if w.parallel:
        read = _Buffer.STREAM if w.mlp_norm is None else _Buffer.NORMED_AGAIN
    else:
        yield from _norm(w.mlp_norm, _Buffer.STREAM, _Buffer.NORMED)
        read = _Buffer.STREAM if w.mlp_norm is None else _Buffer.NORMED
    up = _linear(mlp.up, read, _Buffer.HIDDEN)
    call: LinearCall = up.call.linear
    call.activation, call.gated = activation_number(mlp.activation), mlp.gated
    call.y_stride = mlp.down.in_features
    yield up
    yield from _add(mlp.down, w.mlp_output_norm, _Buffer.HIDDEN, factor)


def _add(linear: PackedLinear, norm: PackedNorm | None, source: _Buffer, factor: float) -> Iterator[Operation]:
    """What a block found is added to the stream, after a norm of its own if it has one."""
    if norm is None:
        added = _linear(linear, source, _Buffer.STREAM)
        added.call.linear.added, added.call.linear.factor = 1, factor
        yield added
        return
    yield _linear(linear, source, _Buffer.FOUND)
    for operation in _norm(norm, _Buffer.FOUND, _Buffer.STREAM):
        operation.call.norm.added, operation.call.norm.factor = 1, factor
        yield operation


def _norm(norm: PackedNorm | None, source: _Buffer, target: _Buffer) -> Iterator[Operation]:
    if norm is not None:
        operation = Operation(kind=_Kind.NORM, source=source, target=target)
        operation.call.norm = norm_call(norm.weights)
        yield operation


def _linear(linear: PackedLinear, source: _Buffer, target: _Buffer) -> Operation:
    assert isinstance(linear, CpuLinear)  # noqa: S101 - the cpu kernels pack nothing else
    operation = Operation(kind=_Kind.LINEAR, source=source, target=target)
    operation.call.linear = linear.call()
    return operation
