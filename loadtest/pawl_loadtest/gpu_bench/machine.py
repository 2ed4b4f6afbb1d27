"""What the GPU can do: measured beside the benchmark, in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from pawl_loadtest.gpu_bench.bounds import GpuLimits

__all__ = ["describe_gpu", "measure_gpu"]

_ROUNDS = 7
_READ_BYTES = 4 << 30  # far more than any cache holds
_PRODUCT = 8192


def measure_gpu() -> GpuLimits:
    """Read bandwidth as the sum of a large tensor, and the peak of bf16 products of random numbers, medians."""
    data = torch.randn(_READ_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    read_s = _seconds(data.sum)  # `max` reads at five sixths of this on an H200
    del data
    left, right = (torch.randn(_PRODUCT, _PRODUCT, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_s = _seconds(lambda: left @ right)
    return GpuLimits(_READ_BYTES / read_s, 2 * _PRODUCT**3 / product_s)


def _seconds(run: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(_ROUNDS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def describe_gpu() -> dict[str, str]:
    """Which GPU, and by which versions it is driven."""
    import triton  # noqa: PLC0415 - only where there is a GPU

    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": str(triton.__version__),
    }
