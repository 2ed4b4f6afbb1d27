"""bfloat16 weights in 12 bits: the same weights, and products with the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from pawl_workers.kernels import cpu
from pawl_workers.kernels.byte_weights import ByteScales
from pawl_workers.kernels.coded_weights import ExponentCode
from pawl_workers.kernels.cpu_linear import CODED_FORMAT, CpuLinear, Workspace
from pawl_workers.kernels.native.library import BuildError, Library, load_library
from pawl_workers.kernels.weight_memory import WeightMemory
from tests.fakes.checkpoints import VOCAB_SIZE, make_llama
from tests.fakes.logit_runner import LogitRunner

ODD_ONES = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -3e38, 2.0**-60, 1.0, -255.0)


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        loaded = load_library()
    except BuildError as error:
        pytest.skip(str(error))
    if not loaded.multiplies_coded:
        pytest.skip("this processor multiplies no coded weights")
    return loaded


def _pack(weight: Tensor, library: Library, bias: Tensor | None = None) -> CpuLinear:
    return CpuLinear(weight, bias, library, Workspace(), WeightMemory())


def _weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(out_features, in_features, generator=generator) * 0.02).to(torch.bfloat16)


def _with_odd_ones(weight: Tensor, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor(ODD_ONES).to(torch.bfloat16)
    places = torch.randperm(weight.numel(), generator=generator)[:count]
    weight.view(-1)[places] = odd[torch.arange(len(places)) % len(odd)]
    return weight


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


@given(
    out_features=st.integers(1, 90),
    tiles=st.integers(1, 5),
    share=st.floats(0.0, 1 / 1100),
    seed=st.integers(0, 1000),
)
def test_weights_come_back_bit_for_bit(
    library: Library, out_features: int, tiles: int, share: float, seed: int
) -> None:
    weight = _weight(out_features, tiles * 32, seed)
    weight = _with_odd_ones(weight, int(weight.numel() * share), seed)
    code = ExponentCode.of(weight, library)
    assert torch.equal(_bits(_pack(weight, library).unpack()), _bits(weight.float()))
    if code is None:  # then too few weights for so many kinds of exponents
        return
    num_bytes = code.packed_bytes(out_features, tiles * 32, library.panel_width)
    memory = torch.zeros(num_bytes + 64, dtype=torch.uint8)
    code.pack(weight, memory, library)
    assert not memory[-64:].any()  # nothing is written behind
    exponents = weight.view(torch.int16).int() >> 7 & 0xFF
    assert code.exceptions == sum(exponent not in code.exponents for exponent in exponents.flatten().tolist())


@pytest.mark.parametrize("shape", [(128, 64), (200, 576), (96, 1536), (33, 96)], ids=str)
@pytest.mark.parametrize("exceptions", [0, 25])
def test_products_have_the_bits_of_weights_that_are_not_coded(
    library: Library, shape: tuple[int, int], exceptions: int
) -> None:
    weight = _weight(*shape)
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1))
    weight.view(-1)[places[: min(exceptions, weight.numel() // 1100)]] = 2.0**-50
    bias = torch.randn(shape[0])
    coded, plain = _pack(weight, library, bias), _pack(weight, replace(library, multiplies_coded=False), bias)
    assert coded.call().format == CODED_FORMAT != plain.call().format
    x = torch.randn(530, shape[1])
    for num_rows in (1, 2, 4, 15, 16, 17, 33, 64, 97, 128, 129, 191, 192, 250, 530):
        assert torch.equal(coded(x[:num_rows]), plain(x[:num_rows])), num_rows


def _make_mixtral(folder: Path) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=1024,
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_a_model_has_the_bits_of_one_whose_weights_are_not_coded(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: bool
) -> None:
    """With gates, residuals, and experts: prompts, then steps of a token."""
    folder = _make_mixtral(tmp_path) if experts else make_llama(tmp_path, dtype=torch.bfloat16, hidden_size=64)
    coded = LogitRunner(folder, "cpu")
    monkeypatch.setattr(cpu, "load_library", lambda: replace(library, multiplies_coded=False))
    plain = LogitRunner(folder, "cpu")
    assert coded.weights.num_bytes < plain.weights.num_bytes
    for runner in (coded, plain):
        runner.add(0, list(range(1, 80)))
        runner.add(1, list(range(50, 90)))
    for chunk in ({0: 70, 1: 20}, {0: 1, 1: 1}, {0: 8, 1: 19}):
        found, wanted = coded.step(chunk), plain.step(chunk)
        assert all(torch.equal(_bits(found[row]), _bits(wanted[row])) for row in chunk)


def test_coded_weights_take_three_quarters_of_the_memory(library: Library) -> None:
    weight = _weight(1024, 576)
    assert _pack(weight, library).num_bytes < 0.76 * weight.nbytes
    assert _pack(weight.float(), library).num_bytes < 0.76 * weight.nbytes  # whose values bfloat16 holds


@pytest.mark.parametrize("weight", [_weight(64, 40), (10.0 ** torch.linspace(-30, 30, 4096)).bfloat16().view(64, 64)])
def test_weights_that_would_gain_nothing_stay_as_they_are(library: Library, weight: Tensor) -> None:
    """Inputs that fill no whole tiles, and exponents that are all as frequent."""
    packed = _pack(weight, library)
    assert ExponentCode.of(weight, library) is None
    assert packed.call().format != CODED_FORMAT
    assert torch.equal(packed.unpack(), weight.float())


def test_bytes_are_not_coded(library: Library) -> None:
    linear = CpuLinear(_weight(64, 64), None, library, Workspace(), WeightMemory(), ByteScales())
    assert linear.call().format != CODED_FORMAT
