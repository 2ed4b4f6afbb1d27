"""The layers of a model as programs of C operations: a step is one call and one parallel region.

Where tokens are routed to experts the choice is made between two calls. Of the last layer rows that nobody asks about
need keys and values alone, and all that comes after these is a call over the other rows. The operations are those that
the stages call one by one, with the same bits; `forward.py` says what they add up to, and `cpu_compile.py` makes them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pawl_workers.batch import Batch, IntArray
from pawl_workers.kernels.cpu_layout import CpuLayout
from pawl_workers.kernels.cpu_operations import Buffer, Cut, Kind, Router, Segment
from pawl_workers.kernels.cpu_seconds import KernelSeconds, LayerSeconds
from pawl_workers.kernels.native.library import Library
from pawl_workers.kernels.native.structures import Frame, Operation, Progress
from pawl_workers.kernels.routing import choose_experts
from pawl_workers.kernels.steady_activation import steady_sigmoid

__all__ = ["CpuProgram"]


_Compiled = tuple[ctypes.Array[Operation], Router | None]


@dataclass(frozen=True, slots=True)
class _Entered:
    """What the frame points to. A batch that was moved on in place is run over again as it is."""

    batch: Batch
    stream: Tensor
    chosen: IntArray


@dataclass(frozen=True, slots=True)
class _Ways:
    """Programs through all layers for all rows, and for those of which nobody asks anything."""

    to_end: list[_Compiled]
    to_cut: list[_Compiled]


class CpuProgram:
    """Runs all layers over a step's stream. Keeps addresses: weights and cache must outlive it.

    Args:
        segments: in order.
        cut: of these.
        widths: floats that a token takes in each buffer but the stream.
        kv_shape: heads of keys and values, and their padded dimensions.
        widest: inputs of the widest linear layer.
        library: the C functions.
        kept: what the operations point to.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        cut: Cut,
        widths: Mapping[Buffer, int],
        kv_shape: tuple[int, int],
        widest: int,
        library: Library,
        kept: Sequence[object] = (),
    ) -> None:
        last, self._cut = segments[cut.segment], cut
        self._all, self._to_cut = segments, [*segments[: cut.segment], Segment(last.operations[: cut.operation], None)]
        self._through_head: list[_Compiled] | None = None
        self._through_choice: list[_Compiled] | None = None
        self._choice: list[_Compiled] | None = None
        self._entered: _Entered | None = None
        self._screened = torch.empty(0, dtype=torch.uint8)
        self._vocab_size = 0
        self._widths = [widths.get(buffer, 0) for buffer in list(Buffer)[1:]]
        self._routers = [s.router for s in segments if s.router is not None]
        self._num_kv_heads, self._padded = kv_shape
        self._library, self._kept = library, kept
        self._progress = (Progress * 0)()
        self._rows, self._num_threads = 0, 1
        self._memory: list[Tensor] = []
        self._partials: Tensor | None = None
        self._routing = torch.empty(0, dtype=torch.int64)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_bytes = library.program_scratch_bytes(widest)
        self._seconds = np.zeros((2, len(Kind)))
        self._choosing_s = 0.0
        self._frame = Frame(seconds=self._seconds.ctypes.data, scratch_bytes=self._scratch_bytes)
        self._frame_address = ctypes.addressof(self._frame)
        self._layers = _Ways(self._compile(self._all), self._compile(self._to_cut))
        self._embedding_and_layers: _Ways | None = None
        after_cut = Segment(last.operations[cut.operation :], last.router)
        self._for_some = self._compile([after_cut, *segments[cut.segment + 1 :]])

    def add_head(self, embedding: Operation, operations: Sequence[Operation], vocab_size: int) -> None:
        """Have `run_through_head` begin with the one and end with the others, which write the logits."""
        self._through_head = self._compile(_between([embedding], self._all, operations))
        self._vocab_size = vocab_size

    def add_choice(self, embedding: Operation, operations: Sequence[Operation]) -> None:
        """Have `run_through_choice` end with these, which choose tokens; nothing where there are none."""
        if operations:
            self._through_choice = self._compile(_between([embedding], self._all, operations))
            both = (self._compile(_between([embedding], segments)) for segments in (self._all, self._to_cut))
            self._embedding_and_layers = _Ways(*both)
            self._choice = self._compile([Segment(operations, None)])

    def _compile(self, segments: Sequence[Segment]) -> list[_Compiled]:
        most = max(len(segment.operations) for segment in segments)
        if most > len(self._progress):
            self._progress = (Progress * most)()
            self._frame.progress = ctypes.addressof(self._progress)
        return [((Operation * len(s.operations))(*s.operations), s.router) for s in segments]

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """Run all layers over the stream, [T, D] float32, in place; see `LayerProgram`."""
        x = x.contiguous()
        self._enter(x, batch)
        return self._run_layers(self._layers, x, batch)

    def _run_layers(self, ways: _Ways, x: Tensor, batch: Batch) -> Tensor:
        asked = batch.asked()
        if len(asked) == x.shape[0]:
            self._run(ways.to_end)
            return x
        self._run(ways.to_cut)
        keys_and_values = self._memory[Buffer.HEADS - 1][: x.shape[0], self._cut.first_key :]
        finite = np.isfinite(keys_and_values.numpy()).all(axis=1)  # torch takes twice as long
        if not finite.all():
            x[torch.from_numpy(~finite)] = torch.nan
        if len(asked):
            self._go_on_with(torch.from_numpy(asked), x, batch)
        return x

    def run_through_head(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run everything from the embedding to the head; see `ScoringProgram`."""
        assert self._through_head is not None  # noqa: S101 - narrows the type
        x = self._new_stream(batch)
        scores = torch.empty(x.shape[0], self._vocab_size)
        self._enter(x, batch)
        self._frame.buffers[Buffer.LOGITS] = scores.data_ptr()
        self._run(self._through_head)
        return x, scores

    @property
    def chooses(self) -> bool:
        """See `ScoringProgram`."""
        return self._choice is not None

    def run_through_choice(self, batch: Batch) -> tuple[Tensor, IntArray]:
        """Run everything from the embedding to the best token of each sample; see `ScoringProgram`."""
        assert self._through_choice is not None  # noqa: S101 - narrows the type
        entered = self._entered
        if entered is not None and entered.batch is batch:
            self._run(self._through_choice)
            return entered.stream, entered.chosen
        assert self._embedding_and_layers is not None  # noqa: S101 - narrows the type
        assert self._choice is not None  # noqa: S101 - narrows the type
        x, num_samples, frame = self._new_stream(batch), batch.last.shape[0], self._frame
        chosen = np.empty(num_samples, dtype=np.int64)
        self._enter(x, batch)
        frame.chosen_tokens = chosen.ctypes.data
        if num_samples == x.shape[0]:
            self._make_room_for_choice(num_samples)
            self._run(self._through_choice)
            self._entered = _Entered(batch, x, chosen)
            return x, chosen
        x = self._run_layers(self._embedding_and_layers, x, batch)
        if num_samples:
            samples = batch.samples(x)
            frame.buffers[Buffer.STREAM], frame.rows = samples.data_ptr(), num_samples
            self._make_room_for_choice(num_samples)
            self._run(self._choice)
        return x, chosen

    def _make_room_for_choice(self, num_rows: int) -> None:
        num_bytes = self._library.screened_bytes(num_rows, self._widths[Buffer.NORMED - 1], self._vocab_size)
        if self._screened.numel() < num_bytes:
            self._screened = torch.empty(num_bytes, dtype=torch.uint8)
            self._frame.screened = self._screened.data_ptr()

    def _new_stream(self, batch: Batch) -> Tensor:
        return torch.empty(batch.token_ids.shape[0], self._widths[Buffer.NORMED - 1])

    def _enter(self, x: Tensor, batch: Batch) -> None:
        layout, frame = batch.attention, self._frame
        assert isinstance(layout, CpuLayout)  # noqa: S101 - narrows the type
        self._entered, self._num_threads = None, torch.get_num_threads()
        self._make_room(x.shape[0], self._num_threads)
        frame.buffers[Buffer.STREAM] = x.data_ptr()
        frame.token_ids, frame.positions = batch.token_ids.data_ptr(), batch.positions.data_ptr()
        frame.slots, frame.tables = layout.slots.data_ptr(), layout.tables.data_ptr()
        frame.tiles = layout.tiles.data_ptr()
        frame.rows, frame.num_tiles, frame.table_stride = x.shape[0], layout.tiles.shape[0], layout.table_stride
        if layout.pairs is None:
            frame.pairs = self._partials = None
        else:
            self._partials = torch.empty(layout.partial_floats(self._num_kv_heads, self._padded))
            frame.pairs, frame.num_pairs = layout.pairs.data_ptr(), len(layout.pairs)
            frame.partials = self._partials.data_ptr()
        for i, (cosines, sines) in enumerate(batch.rotary):
            frame.cosines[i], frame.sines[i] = cosines.data_ptr(), sines.data_ptr()
            frame.turned[i] = cosines.shape[-1]

    def _go_on_with(self, rows: Tensor, x: Tensor, batch: Batch) -> None:
        """Take some rows of the stream, [A] int64, from the cut on to the end."""
        layout, frame, some = batch.attention, self._frame, x[rows]
        assert isinstance(layout, CpuLayout)  # noqa: S101 - narrows the type
        for buffer in self._cut.read:
            memory = self._memory[buffer - 1]
            memory[: len(rows)] = memory[rows]
        tiles = layout.tiles_of(rows.numpy(), batch.positions.numpy())
        frame.buffers[Buffer.STREAM], frame.rows = some.data_ptr(), len(rows)
        frame.tiles, frame.num_tiles, frame.pairs = tiles.data_ptr(), len(tiles), None
        self._run(self._for_some)
        x[rows] = some

    def _run(self, segments: Sequence[_Compiled]) -> None:
        frame = self._frame
        for operations, router in segments:
            self._library.run(operations, len(operations), self._frame_address, self._num_threads)
            if router is not None:
                before, num_rows = time.perf_counter(), frame.rows
                scores = self._memory[Buffer.SCORES - 1][:num_rows]
                shares, chosen = choose_experts(scores, router.num_active, normalised=router.normalised)
                frame.shares, frame.chosen = shares.data_ptr(), chosen.data_ptr()
                if router.shared:
                    shared_shares = steady_sigmoid(self._memory[Buffer.SHARED_SCORES - 1][:num_rows])
                    frame.shared_shares = shared_shares.data_ptr()
                self._choosing_s += time.perf_counter() - before

    @property
    def floats_per_token(self) -> int:
        """What a token takes in all buffers, without the stream."""
        return sum(self._widths)

    def take_seconds(self) -> KernelSeconds:
        """Seconds since this was last called; of the head and of sampling, those of every model in this process."""
        work, waits = (_by_kind(seconds) for seconds in self._seconds[:, : Kind.SCORE].tolist())
        scoring = float(self._seconds[:, Kind.SCORE :].sum())
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


def _between(
    before: Sequence[Operation], segments: Sequence[Segment], after: Sequence[Operation] = ()
) -> list[Segment]:
    """Segments whose first begins with some operations, and whose last ends with others."""
    longer = [list(segment.operations) for segment in segments]
    longer[0][:0] = before
    longer[-1] += after
    return [Segment(operations, segment.router) for operations, segment in zip(longer, segments, strict=True)]


def _by_kind(seconds: Sequence[float]) -> LayerSeconds:
    norms, linears, placing, attending, merging, grouping, gathering, up, down, combining, embedding = seconds
    return LayerSeconds(
        norms + embedding, linears + up + down, placing, attending + merging, grouping + gathering + combining
    )
