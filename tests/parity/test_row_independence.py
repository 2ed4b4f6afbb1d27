"""The facts that bit-identity rests on: no row of a norm, an activation or a linear layer depends on the other rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pawl_workers.kernels import Kernels
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.kernels.gathered_attention import padded_rows, padded_values
from pawl_workers.kernels.onednn import OneDnnKernels
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation, NormKind
from pawl_workers.model.weights import HeadWeights
from pawl_workers.stages.logits import logits
from pawl_workers.stages.residual import add

BACKENDS: dict[str, Callable[[], Kernels]] = {"cpu": CpuKernels, "onednn": OneDnnKernels}
WIDTHS = st.integers(1, 70) | st.sampled_from([100, 128, 257, 576, 1152, 1537])
ROWS = 150  # beyond what one thread computes alone at the larger widths

Compute = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return BACKENDS[request.param]()


def check_rows(compute: Compute, x: Tensor, num_rows: list[int]) -> None:
    """Any rows from any place, with any number of threads, give what they give among all."""
    torch.set_num_threads(1)
    whole = compute(x.clone())
    for count in num_rows:
        for begin in (0, 1, len(x) - count):
            for num_threads in (1, 2, 3):
                torch.set_num_threads(num_threads)
                found = compute(x[begin : begin + count].clone())
                assert torch.equal(found, whole[begin : begin + count]), (count, begin, num_threads)


def drawn(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


COUNTS = st.lists(st.integers(1, ROWS - 1), min_size=1, max_size=4)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", Activation)
@settings(max_examples=20)
@given(width=WIDTHS, counts=COUNTS, seed=st.integers(0, 99))
def test_activations(
    kernels: Kernels, activation: Activation, gated: bool, width: int, counts: list[int], seed: int
) -> None:
    activate = kernels.pack_activation(activation, gated=gated)
    check_rows(activate, drawn(seed, ROWS, width * (2 if gated else 1)), counts)


@pytest.mark.parametrize("kind", NormKind)
@settings(max_examples=20)
@given(width=WIDTHS, counts=COUNTS, seed=st.integers(0, 99))
def test_norms(kernels: Kernels, kind: NormKind, width: int, counts: list[int], seed: int) -> None:
    bias = drawn(seed + 1, width) if kind is NormKind.LAYER else None
    check_rows(
        kernels.pack_norm(NormWeights(kind, drawn(seed, width), bias, 1e-5)), drawn(seed + 2, ROWS, width), counts
    )


@settings(max_examples=40)
@given(inputs=WIDTHS, outputs=WIDTHS, counts=COUNTS, seed=st.integers(0, 99), biased=st.booleans())
def test_linear_layers(kernels: Kernels, inputs: int, outputs: int, counts: list[int], seed: int, biased: bool) -> None:
    linear = kernels.pack_linear(drawn(seed, outputs, inputs), drawn(seed + 1, outputs) if biased else None)
    check_rows(linear, drawn(seed + 2, ROWS, inputs), counts)


@settings(max_examples=15)
@given(width=st.integers(8, 40), vocabulary=WIDTHS, counts=COUNTS, seed=st.integers(0, 99))
def test_capped_logits(kernels: Kernels, width: int, vocabulary: int, counts: list[int], seed: int) -> None:
    head = HeadWeights(kernels.pack_linear(drawn(seed, vocabulary, width), None), divisor=8.0, softcap=30.0)
    check_rows(lambda x: logits(x, head), drawn(seed + 1, ROWS, width), counts)


@settings(max_examples=15)
@given(vocabulary=st.integers(2, 600), counts=COUNTS, seed=st.integers(0, 99))
def test_log_probabilities(kernels: Kernels, vocabulary: int, counts: list[int], seed: int) -> None:
    def describe(x: Tensor) -> Tensor:
        rows, ones = np.arange(len(x)), np.ones(len(x), dtype=np.int64)
        return torch.from_numpy(kernels.sampler.describe(x, rows, ones, ones).logprobs)

    check_rows(describe, drawn(seed, ROWS, vocabulary), counts)


@pytest.mark.parametrize("head_dim", [4, 5, 6, 9, 11, 18, 64, 80, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("num_keys", [64, 512])
def test_batched_products(head_dim: int, num_keys: int) -> None:
    """Of queries and keys, and of weights and values, for every number of rows that attention pads to."""
    q, w = drawn(0, 1, 200, head_dim), drawn(1, 1, 200, num_keys)
    k, v = drawn(2, 1, num_keys, head_dim), drawn(3, 1, num_keys, head_dim)
    for rows, other in ((q, k.transpose(1, 2)), (w, padded_values(v))):
        whole = torch.bmm(rows, other)
        for count in sorted({padded_rows(count, head_dim) for count in range(1, 200)}):
            assert torch.equal(torch.bmm(rows[:, :count].contiguous(), other), whole[:, :count]), count


@settings(max_examples=15)
@given(width=WIDTHS, counts=COUNTS, seed=st.integers(0, 99))
def test_scaled_residuals(width: int, counts: list[int], seed: int) -> None:
    """Granite scales what a block adds: one rounding or two, but the same in every row."""
    check_rows(lambda x: add(x[:, :width].contiguous(), x[:, width:], 0.22), drawn(seed, ROWS, 2 * width), counts)
