"""The layers of a model as programs of C operations: a step is one call and one parallel region.

Where tokens are routed to experts the choice is made between two calls. The operations are those that the stages call
one by one, with the same bits; `forward.py` says what they add up to, and `cpu_compile.py` makes them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from pawl_workers.batch import Batch
from pawl_workers.kernels.cpu_layout import CpuLayout
from pawl_workers.kernels.native.library import Library
from pawl_workers.kernels.native.structures import Frame, Operation
from pawl_workers.kernels.routing import choose_experts
from pawl_workers.kernels.steady_activation import steady_sigmoid

__all__ = ["Buffer", "CpuProgram", "KernelSeconds", "Kind", "LayerSeconds", "Router", "Segment"]


class Kind(IntEnum):
    """What an operation does, as in program.c."""

    NORM = 0
    LINEAR = 1
    PLACE = 2
    ATTEND = 3
    MERGE = 4
    GROUP = 5
    GATHER = 6
    UP = 7
    DOWN = 8
    COMBINE = 9
    SCORE = 10  # a linear layer: the head


class Buffer(IntEnum):
    """What operations read and write; program.c knows four by their numbers."""

    STREAM = 0  # [T, D]
    NORMED = 1  # [T, D]
    NORMED_AGAIN = 2  # [T, D], for the MLP of a parallel block that has a norm of its own
    HEADS = 3  # [T, (H + 2K) * head_dim]
    QUERIES = 4  # [T, H * head_dim]
    ATTENDED = 5  # [T, H * head_dim]
    HIDDEN = 6  # [T, I]
    FOUND = 7  # [T, D], before a norm of its own
    SCORES = 8  # [T, E], of the router
    GATHERED = 9  # [T * num_active, D], a row for each token at each of its experts
    EXPERT_HIDDEN = 10  # [T * num_active, I]
    EXPERT_FOUND = 11  # [T * num_active, D]
    SHARED_FOUND = 12  # [T, D], of the expert that every token goes to
    SHARED_SCORES = 13  # [T, 1], of its gate
    LOGITS = 14  # [T, V], new in each step


@dataclass(frozen=True, slots=True)
class Router:
    """How scores become a choice; `shared`: one more expert, which every token goes to, has a gate."""

    num_experts: int
    num_active: int
    normalised: bool
    shared: bool


@dataclass(frozen=True, slots=True)
class Segment:
    """Operations that run without a stop, and, if a choice of experts follows, the router that makes it."""

    operations: Sequence[Operation]
    router: Router | None


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Seconds in layers by kind of operation.

    Attributes:
        placing: turning queries and keys, and writing keys and values.
        routing: choosing experts, sorting tokens by them, and adding up what they found.
    """

    norms: float
    linears: float
    placing: float
    attention: float
    routing: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.norms + self.linears + self.placing + self.attention + self.routing


@dataclass(frozen=True, slots=True)
class KernelSeconds:
    """Where the time of steps went, by the clocks of the kernels.

    Attributes:
        work: of the first thread, in the layers, and in the final norm where it is part of their program.
        waits: of the first thread for the others, after an operation, by the kind of that.
        entering: what the calls that run layers took beyond both.
        head: the head, and the final norm where it is not part of the program.
        sampling: choosing tokens and describing them.
    """

    work: LayerSeconds
    waits: LayerSeconds
    entering: float
    head: float
    sampling: float


_Compiled = tuple[ctypes.Array[Operation], Router | None]


class CpuProgram:
    """Runs all layers over a step's stream. Keeps addresses: weights and cache must outlive it.

    Args:
        segments: in order.
        widths: floats that a token takes in each buffer but the stream.
        kv_shape: heads of keys and values, and their padded dimensions.
        widest: inputs of the widest linear layer.
        library: the C functions.
        kept: what the operations point to.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        widths: Mapping[Buffer, int],
        kv_shape: tuple[int, int],
        widest: int,
        library: Library,
        kept: Sequence[object] = (),
    ) -> None:
        self._compiled = segments
        self._segments = [(_array(s.operations), s.router) for s in segments]
        self._through_head: list[_Compiled] | None = None
        self._vocab_size = 0
        self._widths = [widths.get(buffer, 0) for buffer in list(Buffer)[1:]]
        self._routers = [s.router for s in segments if s.router is not None]
        self._num_kv_heads, self._padded = kv_shape
        self._library, self._kept = library, kept
        self._counters = np.zeros(max(len(s.operations) for s in segments), dtype=np.int64)
        self._rows = 0
        self._memory: list[Tensor] = []
        self._routing = torch.empty(0, dtype=torch.int64)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_bytes = library.program_scratch_bytes(widest)
        self._seconds = np.zeros((2, len(Kind)))
        self._choosing_s = 0.0
        self._frame = Frame(
            counters=self._counters.ctypes.data, seconds=self._seconds.ctypes.data, scratch_bytes=self._scratch_bytes
        )
        self._frame_address = ctypes.addressof(self._frame)

    def add_head(self, operations: Sequence[Operation], vocab_size: int) -> None:
        """Have `run_through_head` end with these, which write the logits."""
        *before, last = self._compiled
        longer = [*last.operations, *operations]
        self._through_head = [*self._segments[: len(before)], (_array(longer), last.router)]
        self._vocab_size = vocab_size
        if len(longer) > len(self._counters):
            self._counters = np.zeros(len(longer), dtype=np.int64)
            self._frame.counters = self._counters.ctypes.data

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """Run all layers over the stream, [T, D] float32, in place; writes keys and values into the cache."""
        return self._run(x, batch, self._segments)

    def run_through_head(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run all layers and the head over the stream; see `ScoringProgram`."""
        assert self._through_head is not None  # noqa: S101 - narrows the type
        scores = torch.empty(x.shape[0], self._vocab_size)
        return self._run(x, batch, self._through_head, scores), scores

    def _run(self, x: Tensor, batch: Batch, segments: Sequence[_Compiled], logits: Tensor | None = None) -> Tensor:
        layout = batch.attention
        assert isinstance(layout, CpuLayout)  # noqa: S101 - narrows the type
        x = x.contiguous()
        num_rows, num_threads, frame = x.shape[0], torch.get_num_threads(), self._frame
        self._make_room(num_rows, num_threads)
        partials: Tensor | None = None  # lives as long as the call
        frame.buffers[Buffer.STREAM] = x.data_ptr()
        if logits is not None:
            frame.buffers[Buffer.LOGITS] = logits.data_ptr()
        frame.slots, frame.tables = layout.slots.data_ptr(), layout.tables.data_ptr()
        frame.tiles = layout.tiles.data_ptr()
        frame.rows, frame.num_tiles, frame.table_stride = num_rows, layout.tiles.shape[0], layout.table_stride
        if layout.pairs is None:
            frame.pairs = None
        else:
            partials = torch.empty(layout.partial_floats(self._num_kv_heads, self._padded))
            frame.pairs, frame.num_pairs = layout.pairs.data_ptr(), len(layout.pairs)
            frame.partials = partials.data_ptr()
        for i, (cosines, sines) in enumerate(batch.rotary):
            frame.cosines[i], frame.sines[i] = cosines.data_ptr(), sines.data_ptr()
            frame.turned[i] = cosines.shape[-1]
        for operations, router in segments:
            self._library.run(operations, len(operations), self._frame_address, num_threads)
            if router is not None:
                before = time.perf_counter()
                scores = self._memory[Buffer.SCORES - 1][:num_rows]
                shares, chosen = choose_experts(scores, router.num_active, normalised=router.normalised)
                frame.shares, frame.chosen = shares.data_ptr(), chosen.data_ptr()
                if router.shared:
                    shared_shares = steady_sigmoid(self._memory[Buffer.SHARED_SCORES - 1][:num_rows])
                    frame.shared_shares = shared_shares.data_ptr()
                self._choosing_s += time.perf_counter() - before
        return x

    @property
    def floats_per_token(self) -> int:
        """What a token takes in all buffers, without the stream."""
        return sum(self._widths)

    def take_seconds(self) -> KernelSeconds:
        """Seconds since this was last called; of the head and of sampling, those of every model in this process."""
        work, waits = (_by_kind(seconds) for seconds in self._seconds[:, : Kind.SCORE].tolist())
        scoring = float(self._seconds[:, Kind.SCORE].sum())
        calls = self._library.take_seconds()
        taken = KernelSeconds(
            work=replace(work, routing=work.routing + self._choosing_s),
            waits=waits,
            entering=calls["run"] - work.total - waits.total - scoring,
            head=calls["norm"] + calls["linear"] + scoring,
            sampling=calls["choose_tokens"] + calls["describe_tokens"],
        )
        self._seconds.fill(0.0)
        self._choosing_s = 0.0
        return taken

    def _make_room(self, num_rows: int, num_threads: int) -> None:
        frame = self._frame
        if num_rows > self._rows:
            self._memory = [torch.empty(num_rows, width) for width in self._widths]
            sizes = [self._library.routing_bytes(num_rows, r.num_experts, r.num_active) for r in self._routers]
            self._routing = torch.empty(-(-max(sizes, default=0) // 8), dtype=torch.int64)
            self._rows = num_rows
            for buffer, memory in enumerate(self._memory, start=1):
                frame.buffers[buffer] = memory.data_ptr()
            frame.routing = self._routing.data_ptr()
        if self._scratch.numel() < num_threads * self._scratch_bytes + 64:
            self._scratch = torch.empty(num_threads * self._scratch_bytes + 64, dtype=torch.uint8)
            frame.scratch = -(-self._scratch.data_ptr() // 64) * 64


def _array(operations: Sequence[Operation]) -> ctypes.Array[Operation]:
    return (Operation * len(operations))(*operations)


def _by_kind(seconds: Sequence[float]) -> LayerSeconds:
    norms, linears, placing, attending, merging, grouping, gathering, up, down, combining = seconds
    return LayerSeconds(norms, linears + up + down, placing, attending + merging, grouping + gathering + combining)
