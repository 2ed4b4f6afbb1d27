"""Weights are kept in the fewest bits that hold every value of the checkpoint, and a worker says in which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.model.checkpoint_config import read_config
from pawl_workers.model.loading import load_weights
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama

LINEAR = "model.layers.0.self_attn.o_proj.weight"
CPU = torch.device("cpu")


def as_bfloat16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def as_float16(tensor: Tensor) -> Tensor:
    return tensor.half().float()


def beyond_float16(tensor: Tensor) -> Tensor:
    """Values of bfloat16 that float16 turns to infinity, to zero, and to others near them."""
    tensor = tensor.bfloat16()
    tensor.view(-1)[:3] = torch.tensor([1e6, 1e-30, -3.0e38], dtype=torch.bfloat16)
    return tensor


def rewrite(folder: Path, change: Callable[[Tensor], Tensor], names: Callable[[str], bool] = lambda _: True) -> None:
    path = folder / "model.safetensors"
    tensors = {name: change(tensor) if names(name) else tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def start(folder: Path, kernels: str = "cpu", weight_dtype: str = "auto") -> str:
    options = WorkerOptions(str(folder), kernels=kernels, weight_dtype=weight_dtype, max_running=2, max_context=64)
    worker = Worker.load(options)
    assert worker.self_test().max_difference <= 1e-3
    return worker.facts.weight_type


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (as_bfloat16, "bfloat16"),
        (as_float16, "float16"),
        (lambda tensor: tensor, "float32"),
        (lambda tensor: tensor.bfloat16(), "bfloat16"),
        (lambda tensor: tensor.half(), "float16"),
    ],
    ids=["bf16 in fp32", "fp16 in fp32", "fp32", "bf16", "fp16"],
)
def test_the_narrowest_type_that_loses_nothing(change: Callable[[Tensor], Tensor], kept: str, tmp_path: Path) -> None:
    rewrite(make_llama(tmp_path), change)
    assert start(tmp_path) == kept
    assert start(tmp_path, "onednn") == "float32"  # which it packs for
    assert start(tmp_path, weight_dtype="int8") == "int8"


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_values_of_bfloat16_that_float16_lacks_stay_what_they_are(stored: torch.dtype, tmp_path: Path) -> None:
    """Whether they are stored in 16 bits or in 32; in float16 they would be infinite, or zero."""
    rewrite(make_llama(tmp_path), lambda tensor: beyond_float16(tensor).to(stored), lambda name: name == LINEAR)
    rewrite(tmp_path, lambda tensor: tensor.bfloat16().to(stored))
    weights = load_weights(read_config(tmp_path), CpuKernels(), CPU, torch.float32, 1 << 40)
    assert weights.linear_types == (torch.bfloat16,)
    held = weights.layers[0].attention.output.unpack().float()
    assert torch.equal(held, load_file(tmp_path / "model.safetensors")[LINEAR].float())
    assert not torch.equal(held, held.half().float())


def test_one_value_that_needs_float32_costs_its_layer_alone(tmp_path: Path) -> None:
    """The others stay in 16 bits, and the worker names both types."""
    rewrite(make_llama(tmp_path), as_bfloat16)

    def spoil(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = 1.0 + 2.0**-20
        return tensor

    rewrite(tmp_path, spoil, lambda name: name == LINEAR)
    assert start(tmp_path) == "bfloat16 and float32"
    weights = load_weights(read_config(tmp_path), CpuKernels(), CPU, torch.float32, 1 << 40)
    assert weights.layers[0].attention.output.data_type is torch.float32
    assert weights.layers[0].attention.output.unpack().view(-1)[0] == 1.0 + 2.0**-20


def test_what_a_configuration_says_of_types_decides_nothing(tmp_path: Path) -> None:
    """Only what is stored does: many configurations say bfloat16 of weights in float32, in two spellings."""
    make_llama(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        (tmp_path / "config.json").write_text(json.dumps({**values, "dtype": None, key: "bfloat16"}))
        assert start(tmp_path) == "float32"
