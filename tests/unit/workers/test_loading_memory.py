"""What loading takes at its worst: the packed weights and the one tensor that is arriving."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pawl_workers.batch import AttentionShape
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.kernels.native.library import load_library
from pawl_workers.kernels.onednn import OneDnnKernels
from pawl_workers.kernels.triton.backend import TritonKernels
from pawl_workers.kernels.triton.experts import TritonExperts
from pawl_workers.kernels.weight_memory import WeightMemory
from pawl_workers.model.checkpoint_config import read_config
from pawl_workers.model.headers import folder_headers
from pawl_workers.model.loading import load_weights, plan_reading
from pawl_workers.model.packed import Packer
from pawl_workers.model.weights import ExpertWeights, Weights
from pawl_workers.staging import Staging
from tests.fakes.checkpoints import make_gpt2, make_llama
from tests.fakes.families import Draft, write_checkpoint

CPU = torch.device("cpu")
SLACK_BYTES = 64 << 10  # norms being widened, and what torch keeps of small tensors
PROCESS_SLACK_BYTES = 8 << 20  # pages of 2 MiB that are not full, code that runs for the first time


def peak_of(work: Callable[[], Weights], folder: Path) -> tuple[Weights, int]:
    """Run it; return the most bytes that torch had given out at once, but for the mapped files of the folder."""
    mapped = {path.stat().st_size for path in folder.rglob("*.safetensors")}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        made = work()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and abs(event["args"]["Bytes"]) not in mapped
    )
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return made, peak


def assert_held(weights: Weights, planned: int, packer: Packer, stored: torch.dtype) -> None:
    """To the byte, but for bf16 where that is kept in 12 bits: how many weights are is not known before."""
    if stored is torch.bfloat16 and isinstance(packer, CpuKernels) and load_library().multiplies_coded:
        assert 0.7 * planned < weights.num_bytes <= planned
    else:
        assert weights.num_bytes == planned


@pytest.fixture
def packed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler sees what torch gives out: let packed weights come from there too."""
    monkeypatch.setattr(WeightMemory, "take", lambda _, num_bytes: torch.empty(num_bytes, dtype=torch.uint8))


@pytest.mark.usefixtures("packed_by_torch")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shard_size", ["5GB", "1MB"])
def test_no_more_than_packed_weights_and_one_tensor(
    stored: torch.dtype, tied: bool, shard_size: str, tmp_path: Path
) -> None:
    """Six layers, merged projections included; no wider copy is ever made of what is stored in 16 bits.

    Where a file ends amid the parts of a merged projection, those wait beside the tensor that arrives.
    """
    folder = make_llama(
        tmp_path / "model", dtype=stored, max_shard_size=shard_size, num_hidden_layers=6, hidden_size=256,
        intermediate_size=768, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=2048,
        tie_word_embeddings=tied,
    )  # fmt: skip
    config, kernels = read_config(folder), CpuKernels()
    reading = plan_reading(config, folder_headers(folder))
    sizes = {name: math.prod(slot.shape) * slot.stored.itemsize for name, slot in reading.slots.items()}
    waiting = 0 if shard_size == "5GB" else sizes["layers.0.qkv.weight"] + sizes["layers.0.up.weight"]
    weights, peak = peak_of(
        lambda: load_weights(config, kernels, CPU, torch.float32, 1 << 40, reading=reading), tmp_path
    )
    assert weights.num_bytes <= peak <= weights.num_bytes + max(sizes.values()) + waiting + SLACK_BYTES
    assert_held(weights, reading.held_bytes(kernels, torch.float32), kernels, stored)


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_experts_that_are_computed_together_are_not_copied(shard_size: str, tmp_path: Path) -> None:
    """They come one by one, and lie one after the other; for the GPU's kernels, here in the interpreter."""
    values: dict[str, object] = {
        "vocab_size": 97, "hidden_size": 128, "moe_intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 16, "num_experts_per_tok": 2,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    draft = Draft("Qwen3MoeForCausalLM", "Qwen3MoeConfig", values, torch.bfloat16, seed=1)
    model = write_checkpoint(tmp_path, draft)
    model.bfloat16().save_pretrained(tmp_path, max_shard_size=shard_size)
    config, kernels = read_config(tmp_path), TritonKernels(torch.bfloat16, AttentionShape(4, 2, 32), Staging(CPU))
    reading = plan_reading(config, folder_headers(tmp_path))
    weights, peak = peak_of(
        lambda: load_weights(config, kernels, CPU, torch.bfloat16, 1 << 40, reading=reading), tmp_path
    )
    assert reading.held_bytes(kernels, torch.bfloat16) == weights.num_bytes
    assert (
        weights.num_bytes <= peak <= weights.num_bytes + SLACK_BYTES + max(e.stored.num_bytes for e in reading.entries)
    )
    for layer in weights.layers:
        mlp = layer.mlp
        assert isinstance(mlp, ExpertWeights)
        together = mlp.together
        assert isinstance(together, TritonExperts)
        assert together.up.shape == (16, 192, 128)
        for number, expert in enumerate(mlp.experts):
            for packed, stacked in ((expert.up, together.up), (expert.down, together.down)):
                assert packed.unpack().data_ptr() == stacked[number].data_ptr()
                assert packed.unpack().abs().sum() > 0


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("packer", [CpuKernels, OneDnnKernels])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_what_will_be_held_is_known_before_it_is_read(
    make: Callable[..., Path], packer: Callable[[], Packer], stored: torch.dtype, tmp_path: Path
) -> None:
    """From headers alone."""
    config, kernels = read_config(make(tmp_path, dtype=stored)), packer()
    reading = plan_reading(config, folder_headers(tmp_path))
    weights = load_weights(config, kernels, CPU, torch.float32, 1 << 40)
    assert_held(weights, reading.held_bytes(kernels, torch.float32), kernels, stored)
    assert reading.num_parameters == weights.num_parameters


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells what a process has written to")
@pytest.mark.parametrize("weight_dtype", ["auto", "int8"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_process_grows_by_no_more(stored: torch.dtype, weight_dtype: str, tmp_path: Path) -> None:
    """malloc does not keep what layers are merged, narrowed and rounded in: gaps would add up, layer by layer."""
    folder = make_llama(
        tmp_path, dtype=torch.bfloat16, num_hidden_layers=24, hidden_size=256, intermediate_size=768,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=2048,
    )  # fmt: skip
    path = folder / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(path).items()}, path)
    command = [sys.executable, "-m", "tests.fakes.load_memory", str(folder), "cpu", weight_dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    found = json.loads(done.stdout)
    largest = 2 * 768 * 256 * stored.itemsize
    assert found["grown_bytes"] <= found["weight_bytes"] + largest + PROCESS_SLACK_BYTES
