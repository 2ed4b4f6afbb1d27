"""Weights in bytes, a scale per output feature or per group of its inputs: what they become, and what is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pawl_workers.errors import WorkerError
from pawl_workers.kernels import Kernels, Precision
from pawl_workers.kernels.byte_weights import ByteScales
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.kernels.onednn import OneDnnKernels
from pawl_workers.kernels.reference import ReferenceKernels
from pawl_workers.options import WorkerOptions, choose_precision
from pawl_workers.start_plan import plan_start
from pawl_workers.worker import Worker
from tests.fakes.checkpoints import make_llama
from tests.fakes.threads import compute_threads

BACKENDS: dict[str, Callable[[ByteScales], Kernels]] = {
    "cpu": lambda scales: CpuKernels(torch.float32, scales),
    "onednn": OneDnnKernels,
    "reference": lambda scales: ReferenceKernels(torch.device("cpu"), scales),
}
GROUPS = st.sampled_from([None, 32, 64, 128])
STORED = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.integers(1, 70) | st.sampled_from([96, 127, 128, 129, 257, 576])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_weight(seed: int, shape: tuple[int, int], stored: torch.dtype) -> Tensor:
    """With a feature of zeros, and one that lies in its largest value alone."""
    weight = drawn(seed, *shape)
    weight[0] = 0.0
    weight[-1, 0] = 100.0
    return weight.to(stored)


def naive(weight: Tensor, group: int | None) -> Tensor:
    """Value by value: the nearest of 255 steps up to the largest of those that share a scale."""
    found = np.zeros(weight.shape, dtype=np.float32)
    for row, values in enumerate(weight.float().numpy()):
        step = group or len(values)
        for begin in range(0, len(values), step):
            part = values[begin : begin + step]
            scale = np.float32(np.abs(part).max()) / np.float32(127)
            for i, value in enumerate(part):
                found[row, begin + i] = np.rint(value / scale) * scale if scale else 0.0
    return torch.from_numpy(found)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(rows=SIZES, inputs=SIZES, group=GROUPS, stored=STORED, biased=st.booleans(), seed=st.integers(0, 99))
def test_what_is_packed_reads_back_and_computes(
    backend: str, rows: int, inputs: int, group: int | None, stored: torch.dtype, biased: bool, seed: int
) -> None:
    """The bytes are the nearest, and products are theirs."""
    weight, x = draw_weight(seed, (rows, inputs), stored), drawn(seed + 1, 30, inputs)
    bias = drawn(seed + 2, rows) if biased else None
    kernels = BACKENDS[backend](ByteScales(group))
    taken = weight.to(kernels.linear_dtype(stored, torch.float32))
    packed = kernels.pack_linear(taken, bias)
    assert torch.equal(packed.unpack(), naive(weight, group))
    assert packed.num_bytes == kernels.packed_bytes((rows, inputs), stored, torch.float32)
    wanted = x.double() @ packed.unpack().double().T + (0.0 if bias is None else bias.double())
    assert (packed(x) - wanted).abs().max() <= 1e-6 * inputs * 100 + 1e-5


@settings(max_examples=40)
@given(
    rows=SIZES, inputs=SIZES, group=st.sampled_from([32, 64, 128]), count=st.integers(1, 60), seed=st.integers(0, 99)
)
def test_groups_have_the_bits_of_the_floats_they_stand_for(
    rows: int, inputs: int, group: int, count: int, seed: int
) -> None:
    """A byte times its scale is a float like any other: few rows and many, narrow tiles and widened ones."""
    kernels, x = CpuKernels(torch.float32, ByteScales(group)), drawn(seed, count, inputs)
    packed = kernels.pack_linear(drawn(seed + 1, rows, inputs), None)
    assert torch.equal(packed(x), CpuKernels().pack_linear(packed.unpack(), None)(x))


@pytest.mark.parametrize("backend", ["cpu", "onednn"])
@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_any_company(backend: str, group: int | None, num_threads: int) -> None:
    linear = BACKENDS[backend](ByteScales(group)).pack_linear(drawn(1, 200, 250), None)
    x = drawn(2, 230, 250)
    whole = linear(x)
    with compute_threads(num_threads):
        for count in (1, 2, 3, 7, 16, 17, 24, 25, 26, 33, 97, 191, 193, 230):
            assert torch.equal(linear(x[-count:]), whole[-count:]), count


def test_large_layers_are_widened_in_parts() -> None:
    """More features than are widened at a time; each with its own bias."""
    weight, bias, x = drawn(1, 1100, 2048), drawn(2, 1100), drawn(3, 3, 2048)
    linear = OneDnnKernels(ByteScales(64)).pack_linear(weight, bias)
    assert torch.allclose(linear(x), x @ linear.unpack().T + bias, atol=1e-3)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("weight_dtype", ["int8", "int8_g32", "int8_g64", "int8_g128"])
def test_a_worker_takes_the_memory_that_was_planned(tmp_path: Path, kernels: str, weight_dtype: str) -> None:
    folder = str(make_llama(tmp_path, hidden_size=80, intermediate_size=200))
    options = WorkerOptions(folder, kernels=kernels, weight_dtype=weight_dtype, max_running=2)
    exact = plan_start(WorkerOptions(folder, kernels=kernels, max_running=2)).weight_bytes
    planned = plan_start(options).weight_bytes
    worker = Worker.load(options)
    assert worker.facts.weight_bytes == planned < 0.55 * exact
    assert worker.facts.kv_type == f"float32, weights {weight_dtype}"
    assert worker.self_test().num_tokens == 8


def test_kernels_that_keep_no_bytes_say_so(tmp_path: Path) -> None:
    folder = str(make_llama(tmp_path))
    with pytest.raises(
        WorkerError, match=r"only the cpu, onednn and reference .* weights in bytes; .* 'triton' on cpu"
    ):
        Worker.load(WorkerOptions(folder, kernels="triton", weight_dtype="int8_g32"))
    with pytest.raises(
        WorkerError, match="weight_dtype 'int4' is not supported; known: auto, int8, int8_g32, int8_g64"
    ):
        Worker.load(WorkerOptions(folder, weight_dtype="int4"))
    assert choose_precision(WorkerOptions("", weight_dtype="int8_g64")) == Precision(None, torch.int8, 64)
