"""CUDA graphs of decode steps: hundreds of launches become one.

A graph is captured the first time that a step of its size comes, for a padded number of rows, and replayed afterwards.
Its inputs are views of the staging buffer, which lie where they lay at the capture; its outputs stay where the capture
put them, and are read before the next step. All graphs share one pool of memory, for one runs at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pawl_workers.batch import Batch, IntArray
from pawl_workers.errors import WorkerError
from pawl_workers.forward import compute
from pawl_workers.kernels.triton.layout import Layout
from pawl_workers.kv_cache import KvCache
from pawl_workers.model.weights import Weights, asks_host
from pawl_workers.prepare import BatchSettings, batch_angles

__all__ = ["BUCKETS", "DecodeGraphs", "bucket_of"]

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of the graphs: a step is padded to the next of these."""


def bucket_of(num_rows: int) -> int | None:
    """Rows of the graph for a step of so many; None = too many for any."""
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), None)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[int, ...]  # where the capture's inputs lay
    stream: Tensor
    scores: Tensor


class DecodeGraphs:
    """Graphs of one model, by rows and splits.

    Args:
        weights: of a model that asks the host nothing, as `serve` finds.
        cache: of the worker.
        settings: of the worker, with a staging buffer that never grows.
    """

    def __init__(self, weights: Weights, cache: KvCache, settings: BatchSettings) -> None:
        self._weights, self._cache, self._settings = weights, cache, settings
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._first: torch.cuda.CUDAGraph | None = None  # whose pool the others share

    @staticmethod
    def serve(weights: Weights, settings: BatchSettings) -> bool:
        """Whether steps of this model on this device can be captured.

        Experts that are not computed together ask the host which of them are chosen: those of the reference kernels,
        which alone keep weights in bytes on this device.
        """
        return not asks_host(weights) and settings.device.type == "cuda" and settings.staging is not None

    def __len__(self) -> int:
        """Graphs captured so far."""
        return len(self._captured)

    @staticmethod
    def rows_of(num_tokens: IntArray, samples: int) -> int | None:
        """Rows to pad a step to; None where it is no decode step, of one token and one sample for each row."""
        if samples != len(num_tokens) or num_tokens.max() > 1:
            return None
        return bucket_of(len(num_tokens))

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute a padded batch: its stream, [rows, D], and logits, [rows, V], valid until the next run.

        Raises:
            WorkerError: the batch's tensors are not where they were at the capture.
        """
        layout = batch.attention
        assert isinstance(layout, Layout)  # noqa: S101 - narrows the type
        key = batch.token_ids.shape[0], layout.num_splits
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(batch)
        elif captured.inputs != _addresses(batch, layout):
            raise WorkerError("the staging buffer has moved under a captured graph; this is a bug, report it")
        captured.graph.replay()
        return captured.stream, captured.scores

    def _capture(self, batch: Batch) -> _Captured:
        layout = batch.attention
        assert isinstance(layout, Layout)  # noqa: S101 - narrows the type
        # Kernels are compiled and libraries make their handles outside of the capture. It writes what the replay
        # will write once more.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._compute(batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = None if self._first is None else self._first.pool()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            stream, scores = self._compute(batch)
        self._first = self._first or graph
        return _Captured(graph, _addresses(batch, layout), stream, scores)

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        angles = batch_angles(batch.positions, self._settings)
        return compute(replace(batch, rotary=angles), self._weights, self._cache)


def _addresses(batch: Batch, layout: Layout) -> tuple[int, ...]:
    tensors = (
        batch.token_ids,
        batch.positions,
        batch.last,
        layout.positions,
        layout.sequence_of_token,
        layout.tables,
        layout.contexts,
        layout.decode_rows,
        layout.decode_sequences,
    )
    return tuple(tensor.data_ptr() for tensor in tensors)
