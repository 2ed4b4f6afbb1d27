"""What this machine can do: multiply-adds in registers, matrix tiles, reading. Measured, never looked up.

A C program (`machine.c`) measures them; where it cannot be built, torch stands in, which is further from the true limit
and said so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from pawl_loadtest.peers.bounds import MachineLimits
from pawl_workers.kernels.native.build import instruction_flags

__all__ = ["TILES", "Machine", "MachineMeter", "instructions", "measure_machine"]

TILES = "AMX"
"""The peak that is measured in products of bfloat16."""
_FLAGS = {TILES: "-mamx-bf16", "AVX-512": "-mavx512f", "AVX2": "-mavx2"}

_SOURCE = Path(__file__).with_name("machine.c")
_TIMEOUT_S = 300.0
_LARGE_BYTES = 2 << 30  # beyond any cache
_QUICK_BYTES = 128 << 20
_TORCH = """
import json, sys, time, torch
threads, sizes = int(sys.argv[1]), [int(size) for size in sys.argv[2:]]
torch.set_num_threads(threads)
def best(run):
    run()
    times = []
    for _ in range(7):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
read = {}
for size in sizes:
    values = torch.ones(size // 4)
    read[str(size)] = size / best(values.sum)
print(json.dumps({"gemm": 2 * 2048**3 / best(lambda: a @ b), "read": read}))
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """Operations and bytes per second.

    Attributes:
        threads: how many measured together.
        peaks: operations per second by what computed them: `AVX2` and `AVX-512` in registers, of fp32; `AMX` in matrix
            tiles, of bfloat16; or `gemm` where none could be measured.
        gemm: of torch's product of two 2048 x 2048 fp32 matrices.
        read: bytes per second by bytes read over and over.
        note: how it was measured.
    """

    threads: int
    peaks: Mapping[str, float]
    gemm: float
    read: Mapping[str, float]
    note: str

    def limits(self, peak: str, tile_products: int = 3) -> MachineLimits:
        """The limits that bounds are worked out with: one of the peaks, and the fastest reading seen.

        Attention multiplies fp32 with fp32, of which tiles take six products and more: no more than registers do, so
        that their peak is the limit there whatever linear layers compute in.

        Args:
            peak: that linear layers compute at; torch's matrix product stands in for one that was not measured.
            tile_products: see `Precision`.
        """
        registers = max((rate for name, rate in self.peaks.items() if name != TILES), default=self.gemm)
        if peak == TILES:
            return MachineLimits(self.peaks[TILES] / tile_products, max(self.read.values()), registers)
        rate = self.peaks.get(peak, self.gemm)
        return MachineLimits(rate, max(self.read.values()), rate)

    def highest(self, weights: str, count: int = 1) -> list[str]:
        """The highest peaks at which such weights can be multiplied with nothing lost, the highest first."""
        exact = {name: self.limits(name).flops for name in self.peaks if name != TILES or weights == "bfloat16"}
        return sorted(exact, key=exact.__getitem__, reverse=True)[:count]

    def better(self, other: Machine) -> Machine:
        """What the machine could do at the better of two times, limit by limit: noise only ever takes away."""
        peaks = {name: max(rate, other.peaks.get(name, 0.0)) for name, rate in self.peaks.items()}
        read = {size: max(rate, other.read.get(size, 0.0)) for size, rate in self.read.items()}
        return Machine(self.threads, peaks, max(self.gemm, other.gemm), read, self.note)

    def lines(self) -> list[str]:
        """For a reader."""
        peaks = ", ".join(
            f"{name} {self.limits(name).flops / 1e9:.0f}"
            + (f" (a third of {rate / 1e9:.0f} of bf16)" if name == TILES else "")
            for name, rate in self.peaks.items()
        )
        read = ", ".join(f"{rate / 1e9:.1f} GB/s of {int(size) / 1e6:.0f} MB" for size, rate in self.read.items())
        return [
            f"peak, GFLOP/s fp32: {peaks} ({self.note}); torch sgemm 2048: {self.gemm / 1e9:.0f}",
            f"read: {read}",
        ]


class _FromTorch(msgspec.Struct):
    gemm: float
    read: dict[str, float]


class _FromC(msgspec.Struct):
    fma_avx2: float
    read: dict[str, float]
    fma_avx512: float | None = None
    tiles_bf16: float | None = None


_Measured = TypeVar("_Measured", _FromTorch, _FromC)


class MachineMeter:
    """Measures the machine, as often as asked; a context manager that builds the C program once.

    Args:
        threads: that measure together.
        working_set_bytes: of the weights.
        quick: read 128 MiB alone.
        peaks: those to measure; None = all there are.
    """

    def __init__(
        self, threads: int, working_set_bytes: int, *, quick: bool = False, peaks: Container[str] | None = None
    ) -> None:
        weights = max(_QUICK_BYTES, working_set_bytes // 4096 * 4096)
        self._peaks = peaks
        self._threads, self._weights = threads, _QUICK_BYTES if quick else weights
        self._sizes = [_QUICK_BYTES] if quick else sorted({_LARGE_BYTES, weights})
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._folder = tempfile.TemporaryDirectory(prefix="pawl-machine-")
        self._program: Path | None = None
        self._note = "in registers and tiles alone"

    def __enter__(self) -> Self:
        program = Path(self._folder.name) / "machine"
        compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or "cc"
        flags = ["-std=gnu11", "-O2", "-fopenmp", "-o", str(program)]
        try:
            subprocess.run([compiler, *flags, str(_SOURCE)], check=True, capture_output=True, timeout=_TIMEOUT_S)
            self._program = program
        except (OSError, subprocess.SubprocessError) as error:
            self._note = f"from torch alone, below the true limit: {error}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def measure(self) -> Machine:
        """Everything: reading more than caches hold and, in case one does, as much as a model's weights."""
        command = [sys.executable, "-c", _TORCH, str(self._threads), *map(str, self._sizes)]
        torch = _run(command, self._environment, _FromTorch)
        found = self._from_c(self._sizes, torch.gemm)
        return found or Machine(self._threads, {"gemm": torch.gemm}, torch.gemm, torch.read, self._note)

    def glance(self) -> Machine | None:
        """The peaks and reading the weights, in a second or two, without torch's `gemm`; None without the C program."""
        return self._from_c([self._weights], 0.0)

    def _from_c(self, sizes: Sequence[int], gemm: float) -> Machine | None:
        if self._program is None:
            return None
        try:
            native = _run([str(self._program), *map(str, sizes)], self._environment, _FromC)
        except (OSError, subprocess.SubprocessError) as error:  # a processor without AVX2
            self._program, self._note = None, f"from torch alone, below the true limit: {error}"
            return None
        peaks = {"AVX2": native.fma_avx2}
        if native.fma_avx512 is not None:
            peaks["AVX-512"] = native.fma_avx512
        if native.tiles_bf16 is not None:
            peaks[TILES] = native.tiles_bf16
        if self._peaks is not None:
            peaks = {name: rate for name, rate in peaks.items() if name in self._peaks}
        return Machine(self._threads, peaks, gemm, native.read, self._note)


def measure_machine(threads: int, working_set_bytes: int, *, quick: bool = False) -> Machine:
    """Measure once, see `MachineMeter`."""
    with MachineMeter(threads, working_set_bytes, quick=quick) as meter:
        return meter.measure()


def instructions(weights: str) -> str:
    """What pawl's own linear layers compute such weights in, as PAWL_CPU_INSTRUCTIONS allows; a name of a peak."""
    flags = instruction_flags()
    known = (name for name, flag in _FLAGS.items() if flag in flags and (name != TILES or weights == "bfloat16"))
    return next(known, "gemm")


def _run(command: list[str], environment: Mapping[str, str], result: type[_Measured]) -> _Measured:
    done = subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S, env=environment)
    return msgspec.json.decode(done.stdout, type=result)
