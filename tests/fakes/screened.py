"""A head's screen by itself: the tokens that it leads to, and the bounds that it gives on the way."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pawl_workers.kernels.cpu_compile import compile_choice
from pawl_workers.kernels.cpu_operations import Buffer
from pawl_workers.kernels.cpu_screen import CpuHead
from pawl_workers.kernels.native.library import load_library
from pawl_workers.kernels.native.structures import Frame, Operation, Progress

__all__ = ["Screened", "choose_tokens"]

_ROW = np.dtype(
    [("scale", "f4"), ("error", "f4"), ("length", "f4"), ("floor", "f4"), ("offset", "i4"), ("doubtful", "i4")]
)


@dataclass(frozen=True, slots=True)
class Screened:
    """What came of T rows.

    Attributes:
        token_ids: [T].
        floors: no more than a row's highest logit, [T]; ceilings: no less than those of every two panels, [T, pairs].
        doubtful: rows without bounds, [T].
    """

    token_ids: NDArray[np.int64]
    floors: NDArray[np.float32]
    ceilings: NDArray[np.float32]
    doubtful: NDArray[np.bool_]


def choose_tokens(head: CpuHead, x: Tensor, num_threads: int = 1) -> Screened:
    """Choose the best token of each row, [T, D], by a head that has a screen. The memory is as large as it must be."""
    library, num_rows = load_library(), x.shape[0]
    operations = compile_choice(None, head)
    program = (Operation * len(operations))(*operations)
    progress = (Progress * len(operations))()
    memory = torch.empty(library.screened_bytes(num_rows, head.in_features, head.out_features), dtype=torch.uint8)
    scratch_bytes = library.program_scratch_bytes(head.in_features)
    scratch = torch.empty(num_threads * scratch_bytes + 64, dtype=torch.uint8)
    token_ids = np.full(num_rows, -9, dtype=np.int64)
    frame = Frame(
        progress=ctypes.addressof(progress),
        scratch=-(-scratch.data_ptr() // 64) * 64,
        scratch_bytes=scratch_bytes,
        screened=memory.data_ptr(),
        chosen_tokens=token_ids.ctypes.data,
        rows=num_rows,
    )
    frame.buffers[Buffer.STREAM] = x.data_ptr()
    library.run(program, len(operations), ctypes.addressof(frame), num_threads)
    rows = memory.numpy()[: num_rows * _ROW.itemsize].view(_ROW)
    num_pairs = -(-head.out_features // (2 * library.panel_width))
    ceilings = memory.numpy()[-num_rows * num_pairs * 4 :].view(np.float32).reshape(num_rows, num_pairs)
    return Screened(token_ids, rows["floor"], ceilings, rows["doubtful"] != 0)
