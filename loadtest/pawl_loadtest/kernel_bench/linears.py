"""Each linear layer of a shape by itself, at several numbers of rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pawl_loadtest.peers.bounds import MachineLimits
from pawl_loadtest.peers.shapes import Shape as ModelShape
from pawl_workers.kernels import Kernels

__all__ = ["LinearTime", "bytes_per_weight", "measure_linears"]

_DEVIATION = 0.02  # of random weights
_SET_BYTES = 64 << 20  # weights that a linear is measured over, so that they come from memory as in a step


@dataclass(frozen=True, slots=True)
class LinearTime:
    """Seconds of one layer, [rows, inner] times [inner, outer].

    Attributes:
        best: of all runs; `median` likewise.
        weight_bytes: as they are packed.
    """

    name: str
    inner: int
    outer: int
    rows: int
    best: float
    median: float
    weight_bytes: int

    def limit_share(self, can: MachineLimits) -> float:
        """Least seconds, by bytes or by operations, over the best."""
        return max(self.weight_bytes / can.read_bytes, 2 * self.rows * self.inner * self.outer / can.flops) / self.best

    def line(self, can: MachineLimits) -> str:
        """For a reader."""
        operations = 2 * self.rows * self.inner * self.outer
        return (
            f"  {self.rows:4} rows: {self.median * 1e6:9.0f} us, best {self.best * 1e6:9.0f}: "
            f"{operations / self.best / 1e9:6.0f} GFLOP/s, {self.weight_bytes / self.best / 1e9:5.1f} GB/s, "
            f"{self.limit_share(can):4.0%} of the limit"
        )


def _linears(model: ModelShape) -> Mapping[str, tuple[int, int]]:
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "queries, keys, values": (model.hidden_size, queries + 2 * keys),
        "attention output": (queries, model.hidden_size),
        "gate and up": (model.hidden_size, 2 * model.intermediate_size),
        "down": (model.intermediate_size, model.hidden_size),
        "head": (model.hidden_size, model.vocab_size),
    }


def measure_linears(kernels: Kernels, model: ModelShape, rows: Sequence[int], dtype: torch.dtype) -> list[LinearTime]:
    """Measure layer after layer, each at every number of rows."""
    found = []
    for name, (inner, outer) in _linears(model).items():
        copies = max(1, _SET_BYTES // (inner * outer * dtype.itemsize))
        weights = [(torch.randn(outer, inner) * _DEVIATION).to(dtype) for _ in range(copies)]
        packed = [kernels.pack_linear(weight, None) for weight in weights]
        num_bytes = packed[0].num_bytes
        del weights
        for count in rows:
            x = torch.randn(count, inner)

            def run(x: torch.Tensor = x, packed: Sequence[Callable[[torch.Tensor], torch.Tensor]] = packed) -> None:
                for linear in packed:
                    linear(x)

            best, middle = (seconds / len(packed) for seconds in _times(run))
            found.append(LinearTime(name, inner, outer, count, best, middle, num_bytes))
    return found


def bytes_per_weight(kernels: Kernels, dtype: torch.dtype) -> float:
    """Bytes that one weight takes in a packed layer."""
    weight = (torch.randn(512, 512) * _DEVIATION).to(dtype)
    return kernels.pack_linear(weight, None).num_bytes / weight.numel()


def _times(run: Callable[[], object], *, least_s: float = 0.3, least_runs: int = 5) -> tuple[float, float]:
    """Best and median seconds."""
    run()
    times: list[float] = []
    while sum(times) < least_s or len(times) < least_runs:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times), statistics.median(times)
