"""What threads fetch while matrices are multiplied: the keys and values that the attention after them reads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pawl_workers.batch import AttentionShape, IntArray
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.kernels.cpu_calls import attention_call
from pawl_workers.kernels.cpu_layout import CpuLayout
from pawl_workers.kernels.native.library import load_library
from pawl_workers.kernels.native.structures import AttentionCall
from pawl_workers.model.weights import AttentionRule
from tests.fakes.attention_cases import arrays_of

LINE, BLOCK, MOST_TOKENS = 64, 32, 4
FORMATS = {torch.float32: 0, torch.float16: 1, torch.int8: 3}
NONE = 1 << 40  # an address that stands for nothing


class Fetch(ctypes.Structure):
    """`Fetch` of fetch.h, which nobody looks into, and room to spare."""

    _fields_: ClassVar = [("room", ctypes.c_int64 * 128)]


class Lines(ctypes.Structure):
    """`Lines` of fetch.h."""

    _fields_: ClassVar = [("at", ctypes.c_void_p), ("step", ctypes.c_int64)]


class Fetching:
    """What one thread fetches, so many addresses at a time, until nothing is left."""

    def __init__(self, call: AttentionCall | None, thread: int, threads: int, addresses: int) -> None:
        library = load_library()._loaded
        begin, some = library.fetch_for, library.fetch_some
        begin.restype, some.restype = Fetch, Lines
        some.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        fetch = begin(None if call is None else ctypes.byref(call), thread, threads)
        self.lines: list[int] = []  # their numbers
        while (lines := some(ctypes.byref(fetch), addresses, NONE)).at != NONE:
            self.lines += {(lines.at + i * lines.step) // LINE for i in range(addresses)}
        assert lines.step == 0


class Case:
    """Keys, values and the attention of some sequences, given as (tokens before, tokens in this step)."""

    def __init__(
        self,
        shape: AttentionShape,
        dtype: torch.dtype,
        window: int | None,
        sequences: Sequence[tuple[int, int]],
        tables: IntArray,
    ) -> None:
        kernels = CpuKernels(dtype)
        self.keys, self.values = (
            torch.zeros(sizes, dtype=dtype) for sizes in kernels.cache_shapes(int(tables.max()) + 1, shape)
        )
        parts = [(i, before, before + new) for i, (before, new) in enumerate(sequences)]
        layout = kernels.lay_out(arrays_of(parts, tables), shape)
        assert isinstance(layout, CpuLayout)
        cache, rule = (self.keys, self.values), AttentionRule(scale=1.0, window=window, softcap=None)
        call = attention_call(rule, shape.num_heads, shape.num_kv_heads, shape.head_dim, cache, FORMATS[dtype])
        call.tables, call.table_stride = layout.tables.data_ptr(), layout.table_stride
        call.tiles, call.num_tiles = layout.tiles.data_ptr(), len(layout.tiles)
        self.call, self._layout = call, layout

    def tiles_of_decodes(self) -> list[tuple[int, int, int]]:
        """Sequence, first position and tokens of the tiles that pass for decodes: also of prompts, of many heads."""
        fields = self._layout.tiles[:, [0, 2, 3]].tolist()
        return [(sequence, first, tokens) for sequence, first, tokens in fields if tokens <= MOST_TOKENS]


def lines_of(cache: Tensor, blocks: set[int]) -> set[int]:
    """Numbers of the lines that blocks of all heads take."""
    size, start = cache[0].nbytes, cache.data_ptr()
    return {(start + block * size + at) // LINE for block in blocks for at in range(0, size, LINE)}


@given(
    kv_heads=st.integers(1, 3), group=st.sampled_from([1, 3, 30]), head_dim=st.sampled_from([5, 16, 64]),
    dtype=st.sampled_from(sorted(FORMATS, key=str)), window=st.sampled_from([None, 1, 40]),
    sequences=st.lists(
        st.tuples(st.sampled_from([0, 31, 32, 100]), st.sampled_from([1, 4, 5, 70])), max_size=9, min_size=1
    ),
    addresses=st.sampled_from([1, 7, 144, 3000]), threads=st.integers(1, 5),
)  # fmt: skip
@example(1, 30, 5, torch.float16, None, [(0, 5)], 1, 1)  # so many heads that a prompt's tiles are short
def test_threads_fetch_what_decodes_read_next(
    kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, window: int | None,
    sequences: list[tuple[int, int]], addresses: int, threads: int,
) -> None:  # fmt: skip
    """Every line of the keys and values that decodes see; beyond are those of short tiles and the end of a run."""
    most = -(-max(before + new for before, new in sequences) // BLOCK)
    tables = np.arange(1, len(sequences) * most + 1)[::-1].reshape(len(sequences), most)
    case = Case(AttentionShape(kv_heads * group, kv_heads, head_dim), dtype, window, sequences, tables)
    found = {line for i in range(threads) for line in Fetching(case.call, i, threads, addresses).lines}

    def lines_seen(parts: Iterable[tuple[int, int, int]]) -> set[int]:
        seen = {
            int(tables[i, key // BLOCK])
            for i, before, new in parts
            for key in range(max(0, before + 1 - (window or 1 << 30)), before + new)
        }
        return lines_of(case.keys, seen) | lines_of(case.values, seen)

    decodes = ((i, before, new) for i, (before, new) in enumerate(sequences) if new <= MOST_TOKENS)
    assert lines_seen(decodes) <= found
    allowed = lines_seen(case.tiles_of_decodes())
    assert all(any(line - i in allowed for i in range(1, addresses // LINE + 2)) for line in found - allowed)


def test_a_thread_fetches_no_more_than_caches_keep() -> None:
    tables = np.zeros((1, 200), dtype=np.int64)  # one block again and again, 64 KiB of keys and of values each time
    case = Case(AttentionShape(1, 1, 512), torch.float32, None, [(200 * BLOCK - 1, 1)], tables)
    assert len(Fetching(case.call, 0, 1, 1024).lines) * LINE == 4 << 20


def test_before_the_last_attention_there_is_nothing() -> None:
    assert Fetching(None, 0, 1, 10).lines == []
