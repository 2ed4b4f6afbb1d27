"""When an operation that threads share is done: once all its parts are computed, whoever comes by."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pawl_workers.kernels.native.build import find_or_build
from pawl_workers.kernels.native.structures import Progress
from tests.fakes.checkpoints import make_llama
from tests.fakes.sanitizers import OPENMP_FLAGS, build_watched, run_watched

TIMEOUT_S = 30


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return ctypes.CDLL(str(find_or_build()))


def test_who_finds_nothing_left_waits_for_those_inside(kernels: ctypes.CDLL) -> None:
    progress = Progress()
    at = ctypes.byref(progress)
    kernels.enter_operation(at)
    kernels.enter_operation(at)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(kernels.wait_until_done, at)
        deadline = time.monotonic() + TIMEOUT_S
        while not progress.sleeping and not waits.done() and time.monotonic() < deadline:
            os.sched_yield()
        kernels.leave_operation(at)
        with_one_inside = (progress.inside, progress.sleeping, waits.done())
        kernels.leave_operation(at)
        waits.result(TIMEOUT_S)
    assert with_one_inside == (1, 1, False)
    assert progress.inside == 0


def test_nobody_waits_for_those_who_have_not_come(kernels: ctypes.CDLL) -> None:
    progress = Progress()
    at = ctypes.byref(progress)
    for _ in range(2):  # the second one comes late
        kernels.enter_operation(at)
        kernels.leave_operation(at)
        kernels.wait_until_done(at)
        assert (progress.inside, progress.sleeping) == (0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP's functions are GCC's")
def test_a_step_needs_no_thread_that_comes_late(tmp_path: Path) -> None:
    """Threads that begin once the first has ended: at a barrier it would wait for them for ever."""
    library = build_watched(tmp_path, "avx512", "-O2", OPENMP_FLAGS)
    checkpoint = make_llama(tmp_path / "model", dtype=torch.bfloat16)
    arguments = ("-m", "tests.fakes.watched_worker", str(library), str(checkpoint), "float32")
    together, late = (run_watched("", late, *arguments) for late in ({}, {"PAWL_TEST_LATE_THREADS": "1"}))
    assert (together.returncode, late.returncode) == (0, 0), together.stderr + late.stderr
    assert late.stdout == together.stdout
    assert late.stdout.count("[") == 6  # five sequences
