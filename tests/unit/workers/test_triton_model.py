"""Norms, activations and whole tiny models through the triton kernels, in the interpreter, against the reference."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pawl_workers.kernels.reference import ReferenceActivation, ReferenceNorm
from pawl_workers.kernels.triton.program import TritonProgram
from pawl_workers.kernels.triton.rows import TritonActivation, TritonRmsNorm
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation, NormKind
from tests.fakes.checkpoints import NAMED, make_qwen3_moe
from tests.fakes.families import Draft, write_checkpoint
from tests.fakes.logit_runner import LogitRunner

COMMON: dict[str, object] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 192,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _draft(architecture: str, **values: object) -> Draft:
    return Draft(f"{architecture}ForCausalLM", f"{architecture}Config", COMMON | values, torch.float32, seed=3)


DRAFTS = {
    "phi": _draft("Phi"),
    "cohere2": _draft("Cohere2", sliding_window=9, sliding_window_pattern=2),
    "glm4": _draft("Glm4", head_dim=16),
    "qwen2-moe": _draft(
        "Qwen2Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
    ),
}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("width", [3, 16, 100, 576])
def test_norms_equal_the_reference(width: int) -> None:
    x, update, weight = _normal(5, width) * 5, _normal(6, width)[1:], _normal(1, width)[0]
    w = NormWeights(NormKind.RMS, weight, None, 1e-5)
    norm, reference = TritonRmsNorm(w, fuses=True), ReferenceNorm(w)
    assert (norm(x) - reference(x)).abs().max() < 1e-5
    assert norm(x[:0]).shape == (0, width)
    stream = x.clone()
    normed = norm.add(stream, update, 0.5)
    assert torch.allclose(stream, x + update * 0.5, rtol=1e-6, atol=1e-6)
    assert (normed - reference(stream)).abs().max() < 1e-5


def test_a_norm_of_a_sum_reads_the_rounded_sum() -> None:
    """In half precision the norm is of what the stream holds, as it would be in two kernels."""
    x, update = _normal(4, 64).half(), _normal(5, 64)[1:].half()
    w = NormWeights(NormKind.RMS, _normal(1, 64)[0].half(), None, 1e-5)
    norm, stream = TritonRmsNorm(w, fuses=True), x.clone()
    normed = norm.add(stream, update)
    assert torch.equal(stream, x + update)
    assert torch.equal(normed, norm(stream))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", Activation)
def test_activations_equal_the_reference(activation: Activation, gated: bool) -> None:
    hidden = torch.cat([_normal(3, 70) * 20, _normal(3, 70)], dim=1)  # far into both tails
    wanted = ReferenceActivation(activation, gated)(hidden.clone())
    found = TritonActivation(activation, gated, fuses=True)(hidden)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["llama-mha", "llama-rope-llama3", "gpt2"])
def test_models_equal_the_reference(name: str, tmp_path: Path) -> None:
    """All logits of two sequences, in chunks and token by token, in steps that mix both."""
    make: Callable[[Path], Path] = NAMED[name]
    check_model(make(tmp_path))


@pytest.mark.parametrize("family", ["phi", "cohere2", "glm4", "qwen2-moe"])
def test_other_families_equal_the_reference(family: str, tmp_path: Path) -> None:
    """Blocks side by side after one norm, a head's bias, layers that do not turn, four norms, and a shared expert."""
    write_checkpoint(tmp_path, DRAFTS[family])
    check_model(tmp_path)


def check_model(folder: Path) -> None:
    chooser = random.Random(3)
    sequences = {row: chooser.choices(range(256), k=length) for row, length in ((0, 70), (1, 9))}
    steps = [{0: 66}, {0: 1, 1: 5}, {0: 3, 1: 1}, {1: 3}]
    found = []
    for kernels in ("triton", "reference"):
        runner = LogitRunner(folder, kernels, max_running=2)
        for row, token_ids in sequences.items():
            runner.add(row, token_ids)
        logits = [runner.step(step) for step in steps]
        found.append(torch.cat([rows for step in logits for _, rows in sorted(step.items())]))
    assert (found[0] - found[1]).abs().max() < 1e-4
    assert found[1].abs().max() > 0.5


@pytest.mark.parametrize("make", [NAMED["llama-mha"], make_qwen3_moe])
def test_a_single_row_is_computed_as_rows_are(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """In half precision, where a step of one token has kernels of its own."""
    folder = make(tmp_path)
    found = []
    for kernels in ("triton", "reference"):
        runner = LogitRunner(folder, kernels, max_running=1, dtype=torch.float16)
        program = runner.cache.program
        assert kernels == "reference" or (isinstance(program, TritonProgram) and program.fits_one_row)
        runner.add(0, [(7 * i) % 251 for i in range(6)])
        found.append(torch.cat([runner.step({0: 5})[0], runner.step({0: 1})[0]]))
    assert (found[0] - found[1]).abs().max() < 0.01 * found[1].abs().max()
