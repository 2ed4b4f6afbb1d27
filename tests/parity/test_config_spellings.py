"""Configurations as the hub has them, old and new spellings, keys left out or null: read as transformers reads them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pawl_workers.errors import CheckpointError
from pawl_workers.model.checkpoint_config import read_config
from tests.fakes.checkpoints import load_reference, make_llama
from tests.fakes.families import MAX_POSITIONS, Draft, write_checkpoint
from tests.fakes.logit_runner import LogitRunner

TOLERANCE = 1e-4
TOKEN_IDS = random.Random(1).choices(range(101), k=90)
COMMON: dict[str, object] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ABSENT = object()

Changes = dict[str, object]

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 48}
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.4 * i for i in range(8)]}
LLAMA: dict[str, Changes] = {
    "nothing of rope": {"rope_parameters": ABSENT},
    "theta alone": {"rope_parameters": ABSENT, "rope_theta": 500.0},
    "nulls": {"rope_parameters": None, "rope_scaling": None, "head_dim": None},
    "linear, 4.30": {"rope_parameters": ABSENT, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "linear, 4.45": {"rope_parameters": ABSENT, "rope_scaling": {"rope_type": "linear", "type": "x", "factor": 4}},
    "linear, with theta": {
        "rope_parameters": ABSENT,
        "rope_scaling": {"type": "linear", "factor": 2},
        "rope_theta": 99,
    },
    "dynamic": {"rope_parameters": ABSENT, "rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 500.0},
    "llama3": {"rope_parameters": ABSENT, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500.0},
    "llama3, 5": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
    "yarn": {
        "rope_parameters": ABSENT,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48},
    },
    "yarn, all keys": {
        "rope_parameters": ABSENT,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 48,
            "attention_factor": 1.1,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        },
    },
    "yarn, nulls": {
        "rope_parameters": ABSENT,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 48,
            "attention_factor": None,
            "beta_fast": None,
            "beta_slow": None,
            "mscale": None,
        },
    },
    "yarn, original length left out": {"rope_parameters": ABSENT, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "yarn, original length outside": {
        "rope_parameters": ABSENT,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 48,
    },
    "longrope": {
        "rope_parameters": ABSENT,
        "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 48, **FACTORS},
    },
    "longrope, factor and theta": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 777.0,
            "factor": 16.0,
            "original_max_position_embeddings": 48,
            **FACTORS,
        },
    },
    "stretched as a card advises, beside what transformers 5 saved": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48},
    },
    "an empty stretch": {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "head dimension left out": {"head_dim": ABSENT},
    "flags left out": {"attention_bias": ABSENT, "mlp_bias": ABSENT, "tie_word_embeddings": ABSENT},
    "type in the old spelling": {"dtype": ABSENT, "torch_dtype": "float32"},
    "no type": {"dtype": ABSENT},
    "activation and epsilon left out": {"hidden_act": ABSENT, "rms_norm_eps": ABSENT},
}

OTHERS: dict[str, tuple[str, str, Changes, Changes]] = {
    "mistral, no window": ("Mistral", "Mistral", {}, {"sliding_window": None}),
    "mistral, a window": ("Mistral", "Mistral", {}, {"sliding_window": 9}),
    "mistral, as wide as it was by default": ("Mistral", "Mistral", {}, {"sliding_window": ABSENT}),
    "mistral, head dimension null": ("Mistral", "Mistral", {}, {"head_dim": None}),
    "qwen 2, window off": (
        "Qwen2",
        "Qwen2",
        {},
        {"use_sliding_window": False, "sliding_window": 5, "layer_types": ABSENT},
    ),
    "qwen 2, window on": (
        "Qwen2",
        "Qwen2",
        {},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "layer_types": ABSENT},
    ),
    "qwen 2, window on and null": ("Qwen2", "Qwen2", {}, {"use_sliding_window": True, "sliding_window": None}),
    "gemma, tied unless it says otherwise": (
        "Gemma",
        "Gemma",
        {"head_dim": 16, "tie_word_embeddings": True},
        {"tie_word_embeddings": ABSENT},
    ),
    "gemma 2, caps null": (
        "Gemma2",
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": ABSENT},
    ),
    "gemma 3, 4.50": (
        "Gemma3",
        "Gemma3Text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9},
        {
            "rope_parameters": ABSENT,
            "layer_types": ABSENT,
            "rope_theta": 5000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 2,
        },
    ),
    "gemma 3, stretched beside what transformers 5 saved": (
        "Gemma3",
        "Gemma3Text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9, "sliding_window_pattern": 2},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "phi 3, a share of each head": (
        "Phi3",
        "Phi3",
        {"original_max_position_embeddings": MAX_POSITIONS},
        {"rope_parameters": ABSENT, "partial_rotary_factor": 0.5, "rope_theta": 100.0},
    ),
    "stablelm, a share of each head": (
        "StableLm",
        "StableLm",
        {},
        {"rope_parameters": ABSENT, "partial_rotary_factor": 0.5, "rope_theta": 100.0},
    ),
    "gpt-neox, its own keys": (
        "GPTNeoX",
        "GPTNeoX",
        {},
        {"rope_parameters": ABSENT, "rotary_pct": 0.5, "rotary_emb_base": 100.0},
    ),
    "glm, its share by default": ("Glm", "Glm", {"head_dim": 16}, {"rope_parameters": ABSENT, "rope_theta": 100.0}),
    "olmo 3, 4.57": (
        "Olmo3",
        "Olmo3",
        {"sliding_window": 9, "num_hidden_layers": 4},
        {
            "rope_parameters": ABSENT,
            "layer_types": ABSENT,
            "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48},
        },
    ),
}


def rewrite_config(folder: Path, changes: Changes) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ABSENT}))


def check(folder: Path) -> Tensor:
    """That every logit is that of transformers, of the same folder; returns them."""
    with torch.no_grad():
        wanted: Tensor = load_reference(folder)(torch.tensor([TOKEN_IDS]), use_cache=False).logits[0]
    for kernels in ("reference", "cpu"):
        found = LogitRunner(folder, kernels, max_running=1).alone(TOKEN_IDS)
        assert (found - wanted).abs().max() < TOLERANCE, kernels
    return wanted


@pytest.mark.parametrize("spelling", LLAMA)
def test_llama(tmp_path: Path, spelling: str) -> None:
    """Whatever way it is written; and what is written matters, where it should."""
    write_checkpoint(tmp_path, Draft("LlamaForCausalLM", "LlamaConfig", COMMON, torch.float32, seed=3))
    before = check(tmp_path)
    rewrite_config(tmp_path, LLAMA[spelling])
    after = check(tmp_path)
    changes_nothing = {"nothing of rope", "nulls", "head dimension left out", "flags left out"}
    changes_nothing |= {"type in the old spelling", "no type", "activation and epsilon left out"}
    assert torch.equal(before, after) == (spelling in changes_nothing)


@pytest.mark.parametrize("spelling", OTHERS)
def test_other_families(tmp_path: Path, spelling: str) -> None:
    model, config, values, changes = OTHERS[spelling]
    write_checkpoint(tmp_path, Draft(f"{model}ForCausalLM", f"{config}Config", COMMON | values, torch.float32, seed=3))
    rewrite_config(tmp_path, changes)
    check(tmp_path)


def test_tensors_that_are_no_weights_are_passed_over(tmp_path: Path) -> None:
    """Frequencies, which early checkpoints hold, and the head of one that is tied."""
    folder = make_llama(tmp_path, vocab_size=101, tie_word_embeddings=True, max_position_embeddings=MAX_POSITIONS)
    before = check(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    assert torch.equal(check(folder), before)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", [False, True])
def test_quantised_checkpoints_are_refused_with_what_to_do(tmp_path: Path, key: str, nested: bool) -> None:
    """By how they were quantised, before a tensor is asked for."""
    folder = make_llama(tmp_path)
    quantised: Changes = {key: {"quant_method": "gptq", "bits": 4}}
    rewrite_config(folder, {"text_config": quantised} if nested else quantised)
    with pytest.raises(CheckpointError, match=rf"{key} \(gptq\).*not supported; use the one it was made from.*int8"):
        read_config(folder)
    rewrite_config(folder, {"text_config": ABSENT, key: None})
    assert read_config(folder).spec.num_layers == 2
