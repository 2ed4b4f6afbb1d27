"""Linear layers of the triton backend, in the interpreter, against products in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pawl_workers.kernels.reference import ReferenceActivation, ReferenceNorm
from pawl_workers.kernels.triton.linear import GpuLinear, StrictLinear, WideLinear
from pawl_workers.kernels.triton.one_row import add_row, fire_row, multiply_row
from pawl_workers.kernels.triton.rows import TritonActivation, TritonRmsNorm
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation, NormKind


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strict_rows_are_the_products_whatever_the_number_of_rows(dtype: torch.dtype, biased: bool) -> None:
    weight, x = _drawn(150, 70).to(dtype) * 0.1, _drawn(200, 70).to(dtype)
    bias = _drawn(150).to(dtype) if biased else None
    linear = StrictLinear(weight, bias)
    wanted = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    whole = linear(x)
    assert whole.dtype is dtype
    assert (whole.double() - wanted).abs().max() < (1e-5 if dtype is torch.float32 else 5e-3)
    for rows in (0, 1, 5, 64, 65, 130):
        assert torch.equal(linear(x[:rows]), whole[:rows])


def test_scores_are_not_rounded_to_the_type_of_the_model() -> None:
    weight, x = _drawn(40, 64).half() * 0.1, _drawn(5, 64).half()
    wanted = x.double() @ weight.double().T
    for linear in (StrictLinear(weight, None), GpuLinear(weight, None)):
        wide = WideLinear(linear)
        assert wide(x[:1]).dtype is torch.float32
        assert (wide(x[:1]).double() - wanted[:1]).abs().max() < 1e-5
        assert torch.equal(wide.unpack(), weight)
        assert (wide.in_features, wide.out_features, wide.num_bytes) == (64, 40, weight.nbytes)
    assert (WideLinear(StrictLinear(weight, None))(x).double() - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("width", [5, 64, 1500])
def test_one_row_is_normalised_multiplied_and_added(width: int) -> None:
    x, weight, bias = _drawn(1, width).half(), _drawn(30, width).half() * 0.1, _drawn(30).half()
    norm = TritonRmsNorm(NormWeights(NormKind.RMS, 1 + 0.1 * _drawn(width).half(), None, 1e-5), fuses=True)
    normed = ReferenceNorm(NormWeights(NormKind.RMS, norm.weights.weight.double(), None, 1e-5))(x.double())
    found = multiply_row(x, weight, bias, torch.float32, norm)
    wanted = normed @ weight.double().T + bias.double()
    assert (found.double() - wanted).abs().max() < 1e-4
    stream = _drawn(1, 30, seed=7).half()
    added = stream.double() + 0.5 * (x.double() @ weight.double().T + bias.double())
    assert add_row(stream, x, weight, bias, 0.5) is stream
    assert (stream.double() - added).abs().max() < 1e-2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", Activation)
def test_one_row_fires(activation: Activation, gated: bool) -> None:
    x, weight, bias = _drawn(1, 48).half(), _drawn(60, 48).half() * 0.3, _drawn(60).half()
    wanted = ReferenceActivation(activation, gated)(x.double() @ weight.double().T + bias.double())
    found = fire_row(x, weight, bias, TritonActivation(activation, gated, fuses=True))
    assert (found.double() - wanted).abs().max() < 1e-2 * wanted.abs().max()
