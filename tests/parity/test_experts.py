"""Routed layers: ties, tokens that share experts, and the order in which a token's experts are added up."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.kernels.onednn import OneDnnKernels
from pawl_workers.kernels.reference import ReferenceLinear
from pawl_workers.model.packed import Packer
from pawl_workers.model.spec import Activation
from pawl_workers.model.weights import ExpertWeights, MlpWeights
from pawl_workers.stages.mlp import mlp
from tests.fakes.checkpoints import load_reference
from tests.fakes.families import MAX_POSITIONS, Draft, write_checkpoint
from tests.fakes.logit_runner import LogitRunner

NUM_EXPERTS = 6
WIDTH, INNER = 24, 32  # a width of whole registers: the cpu kernels compile the layers into a program


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_experts(packer: Packer, router: Tensor, num_active: int = 3, *, normalised: bool = True) -> ExpertWeights:
    activate = packer.pack_activation(Activation.SILU, gated=True)
    experts = tuple(
        MlpWeights(
            packer.pack_linear(drawn(10 + e, 2 * INNER, WIDTH), None),
            activate,
            packer.pack_linear(drawn(50 + e, WIDTH, INNER), None),
            Activation.SILU,
            gated=True,
        )
        for e in range(NUM_EXPERTS)
    )
    return ExpertWeights(ReferenceLinear(router, None), experts, num_active, normalised)


@pytest.mark.parametrize("backend", [CpuKernels, OneDnnKernels])
@pytest.mark.parametrize("normalised", [False, True])
def test_a_token_adds_up_its_experts_in_the_order_of_their_numbers(backend: type[Packer], normalised: bool) -> None:
    """Token by token and expert by expert gives the bits that all tokens give at once."""
    w = make_experts(backend(), drawn(1, NUM_EXPERTS, WIDTH), normalised=normalised)
    x = drawn(2, 37, WIDTH)
    found = mlp(x, w)
    for token in range(len(x)):
        row = x[token : token + 1]
        shares = w.router(x)[token].softmax(dim=-1)
        chosen = sorted(shares.topk(w.num_active).indices.tolist())
        total = shares.topk(w.num_active).values.sum() if normalised else torch.tensor(1.0)
        wanted = torch.zeros(1, WIDTH)
        for expert in chosen:
            wanted = wanted + mlp(row, w.experts[expert]) * (shares[expert] / total)
        assert torch.equal(found[token], wanted[0]), token


def test_tokens_of_one_expert_and_experts_without_tokens() -> None:
    """All tokens choose one expert, and the others are not computed."""
    router = torch.zeros(NUM_EXPERTS, WIDTH)
    router[4] = 9.0
    w = make_experts(CpuKernels(), router, num_active=1)
    x = drawn(3, 11, WIDTH).abs()
    assert torch.equal(mlp(x, w), mlp(x, w.experts[4]))


@pytest.mark.parametrize("kernels", ["reference", "onednn", "cpu"])
@pytest.mark.parametrize(
    ("architecture", "config_class", "router"),
    [
        ("MixtralForCausalLM", "MixtralConfig", "model.layers.0.block_sparse_moe.gate.weight"),
        ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_ties_of_the_router_go_as_in_transformers(
    tmp_path: Path, architecture: str, config_class: str, router: str, kernels: str
) -> None:
    """Experts in pairs with the same router weights, whose probabilities are equal to the bit."""
    values: dict[str, object] = {
        "vocab_size": 97,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "moe_intermediate_size": INNER,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "num_hidden_layers": 1,
        "num_local_experts" if "Mixtral" in architecture else "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 3,  # of three pairs at least one is torn apart
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    write_checkpoint(tmp_path, Draft(architecture, config_class, values, torch.float32, seed=1))
    pair_up(tmp_path, router)
    model = load_reference(tmp_path)
    token_ids = Random(4).choices(range(97), k=80)
    with torch.no_grad():
        wanted = model(torch.tensor([token_ids])).logits[0]
    found = LogitRunner(tmp_path, kernels, max_running=1).alone(token_ids, [50, 1, 29])
    assert (found - wanted).abs().max() < 1e-4


def pair_up(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name][1::2] = tensors[name][0::2]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
