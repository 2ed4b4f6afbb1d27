"""Sampling on a CPU, compiled: one pass over a row for its best token, one more for its weights, none to sort it."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pawl_workers.kernels.native.library import Library
from pawl_workers.sampling.adjustments import Adjustments, gather_adjustments
from pawl_workers.sampling.batch import IntArray, SamplingBatch
from pawl_workers.sampling.logprobs import TokenScores
from pawl_workers.sampling.table import SamplingTable

__all__ = ["CpuSampler"]


class _Columns(ctypes.Structure):  # as in sampling.c
    _fields_ = [(name, ctypes.c_void_p) for name in ("temperature", "top_p", "min_p", "top_k", "seed", "repetition")]


class _Adjustments(ctypes.Structure):  # as in sampling.c
    _fields_ = [
        *((f"{kind}_{name}", ctypes.c_void_p) for kind in ("seen", "bias") for name in ("starts", "ids", "values")),
        ("masks", ctypes.c_void_p),
        ("mask_of", ctypes.c_void_p),
        ("words", ctypes.c_int64),
    ]


def _address(array: NDArray[np.generic]) -> int:
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} does not lie in one piece; pass np.ascontiguousarray of it")
    return array.ctypes.data


def _columns(table: SamplingTable) -> _Columns:
    return _Columns(
        _address(table.temperature),
        _address(table.top_p),
        _address(table.min_p),
        _address(table.top_k),
        _address(table.seed),
        _address(table.repetition),
    )


def _changes(adjustments: Adjustments | None) -> _Adjustments | None:
    if adjustments is None:
        return None
    seen, bias, masks = adjustments.seen, adjustments.bias, adjustments.masks
    return _Adjustments(
        _address(seen.starts),
        _address(seen.ids),
        _address(seen.values),
        _address(bias.starts),
        _address(bias.ids),
        _address(bias.values),
        None if masks is None else _address(masks.words),
        None if masks is None else _address(masks.of_sample),
        0 if masks is None else masks.words.shape[1],
    )


class CpuSampler:
    """Reads each row where it lies; only a row with penalties, bias or a mask is copied, into a thread's own memory."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._sized = (0, 0)  # vocabulary and threads
        self._batch: SamplingBatch | None = None
        self._columns = _Columns()
        self._addresses = (0, 0, 0)

    def _addresses_of(self, batch: SamplingBatch) -> tuple[int, int, int]:
        """Where the rows and positions of a batch lie, and the addresses of its table's columns."""
        if batch is not self._batch:  # a decode step may be of the arrays of the last one, changed in place
            self._columns = _columns(batch.table)
            columns = ctypes.addressof(self._columns)
            self._batch, self._addresses = batch, (_address(batch.rows), _address(batch.positions), columns)
        return self._addresses

    def _scratch(self, vocab_size: int, num_threads: int) -> int:
        if self._sized != (vocab_size, num_threads):
            num_bytes = num_threads * self._library.sampling_scratch_bytes(vocab_size)
            self._memory, self._sized = torch.empty(num_bytes, dtype=torch.uint8), (vocab_size, num_threads)
        return self._memory.data_ptr()

    def choose(self, scores: Tensor, batch: SamplingBatch) -> IntArray:
        """Choose a token from each row of logits; see `Sampler`."""
        scores, num_threads = scores.contiguous(), torch.get_num_threads()
        num_samples, vocab_size = scores.shape
        adjustments = gather_adjustments(batch)  # holds the lists while C reads them
        changes = _changes(adjustments)
        rows, positions, columns = self._addresses_of(batch)
        chosen = np.empty(num_samples, dtype=np.int64)
        self._library.choose_tokens(
            scores.data_ptr(),
            num_samples,
            vocab_size,
            rows,
            positions,
            columns,
            None if changes is None else ctypes.addressof(changes),
            chosen.ctypes.data,
            self._scratch(vocab_size, num_threads),
            num_threads,
        )
        return chosen

    def describe(self, scores: Tensor, rows: IntArray, token_ids: IntArray, num_alternatives: IntArray) -> TokenScores:
        """Describe tokens under the softmax of untouched logits; see `Sampler`."""
        scores, num_threads = scores.contiguous(), torch.get_num_threads()
        count, vocab_size = len(rows), scores.shape[1]
        most = min(int(num_alternatives.max(initial=0)), vocab_size)
        described = TokenScores(
            np.empty(count, dtype=np.float32),
            np.zeros(count, dtype=np.int64),
            np.zeros((count, most), dtype=np.int64),
            np.zeros((count, most), dtype=np.float32),
        )
        self._library.describe_tokens(
            scores.data_ptr(),
            count,
            vocab_size,
            _address(rows),
            _address(token_ids),
            _address(num_alternatives),
            most,
            _address(described.logprobs),
            _address(described.ranks),
            _address(described.alternative_ids),
            _address(described.alternative_logprobs),
            self._scratch(vocab_size, num_threads),
            num_threads,
        )
        return described
