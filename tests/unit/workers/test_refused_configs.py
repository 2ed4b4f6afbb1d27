"""What of a configuration cannot be served is refused by its key, its value, and what would do instead."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pawl_workers.errors import CheckpointError
from pawl_workers.model.checkpoint_config import read_config
from pawl_workers.model.families import FAMILIES
from tests.fakes.hub_configs import HUB_CONFIGS, read_hub_config


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(CheckpointError, match="MambaForCausalLM") as refused:
        read_config(tmp_path)
    assert all(name in str(refused.value) for name in FAMILIES)


@pytest.mark.parametrize(
    ("hub_id", "changes", "named"),
    [
        ("meta-llama/Llama-3.1-8B", {"hidden_act": "relu6"}, "hidden_act 'relu6' is not supported; known: silu,"),
        (
            "meta-llama/Llama-3.1-8B",
            {"num_attention_heads": 0},
            "num_attention_heads must be a positive integer, not 0",
        ),
        (
            "meta-llama/Llama-3.1-8B",
            {"num_hidden_layers": 10**9},
            "num_hidden_layers must be at most 10000, not 1000000000",
        ),
        ("mistralai/Mixtral-8x7B-v0.1", {"num_local_experts": 10**9}, "num_local_experts must be at most 10000"),
        ("meta-llama/Llama-3.1-8B", {"hidden_size": None}, "hidden_size is missing; must be a positive integer"),
        ("meta-llama/Llama-3.1-8B", {"rope_theta": 0}, "rope_theta must be a number above 0, not 0"),
        ("meta-llama/Llama-3.1-8B", {"rope_theta": 1.0}, "rope_theta must be a number above 1, not 1.0"),
        ("meta-llama/Llama-3.1-8B", {"rope_theta": math.nan}, "rope_theta must be a number, not nan"),
        ("meta-llama/Llama-3.1-8B", {"rope_theta": 10**400}, "rope_theta must be a number, not 1000"),
        ("meta-llama/Llama-3.1-8B", {"rms_norm_eps": -1e-5}, "rms_norm_eps must be a number above 0, not -1e-05"),
        ("meta-llama/Llama-3.1-8B", {"partial_rotary_factor": 1.5}, "1.5 turns 192 of 128 dimensions of a head"),
        ("meta-llama/Llama-3.1-8B", {"partial_rotary_factor": 0.4}, "0.4 turns 51 of 128 dimensions of a head"),
        (
            "google/gemma-2-2b",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention = true is not supported",
        ),
        ("google/gemma-2-2b", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a number above 0, not 0"),
        (
            "google/gemma-2-2b",
            {"attn_logit_softcapping": 0.0},
            "attn_logit_softcapping must be a number above 0, not 0.0",
        ),
        ("google/gemma-3-4b-it", {"text_config": None}, "text_config is missing; must be an object"),
        (
            "google/gemma-3-4b-it",
            {"text_config": {"hidden_size": "2560"}},
            "text_config.hidden_size must be a positive",
        ),
        (
            "ibm-granite/granite-3.1-2b-instruct",
            {"logits_scaling": 0},
            "logits_scaling must be a number above 0, not 0",
        ),
        ("HuggingFaceTB/SmolLM3-3B", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 36 layers"),
        ("HuggingFaceTB/SmolLM3-3B", {"layer_types": ["chunked_attention"] * 36}, "chunked_attention"),
        ("Qwen/Qwen2.5-0.5B", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 24 layers"),
        (
            "microsoft/Phi-4-mini-instruct",
            {"partial_rotary_factor": 0.5},
            "scaling.short_factor has 48 entries; 32 pairs turn",
        ),
        ("openai-community/gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", {"text_config": None}, "text_config"),
        (
            "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
            {"text_config": {"model_type": "ministral3"}},
            "text_config.model_type 'ministral3' is not supported; known: mistral",
        ),
        ("microsoft/phi-2", {"qk_layernorm": True}, "qk_layernorm"),
        ("stabilityai/stablelm-2-1_6b", {"qk_layernorm": True}, "qk_layernorm"),
        ("CohereLabs/aya-expanse-8b", {"use_qk_norm": True}, "use_qk_norm"),
        ("CohereLabs/aya-expanse-8b", {"logit_scale": 0.0}, "logit_scale must be a number above 0, not 0.0"),
    ],
)
def test_what_is_not_supported_is_named(hub_id: str, changes: dict[str, object], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read_hub_config(hub_id, **changes)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"rope_type": "mrope"}, "rope_type 'mrope' is not supported; known: default, linear, dynamic, llama3, yarn"),
        ({"type": "ntk"}, "type 'ntk' is not supported; known: default,"),
        ({"rope_type": 3}, "rope_type must be a string, not 3"),
        ({"rope_type": "linear"}, "factor is missing; must be a number above 0"),
        ({"rope_type": "yarn", "factor": -4.0}, "factor must be a number above 0, not -4.0"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing; must be a number above 0"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "high_freq_factor must be above low_freq_factor, 4, not 4",
        ),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings is missing; must be a positive integer",
        ),
        ({"rope_type": "longrope", "short_factor": [1.0] * 64}, "long_factor has 0 entries; 64 pairs turn"),
        (
            {"rope_type": "longrope", "short_factor": [0.0] * 64, "long_factor": [1.0] * 64},
            "short_factor must hold numbers above 0, not 0",
        ),
        ({"full_attention": {"rope_theta": 100.0}}, "full_attention is not supported: all layers"),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_unknown_stretch_is_named_by_its_section(key: str, section: dict[str, object], named: str) -> None:
    changes = {"rope_scaling": None, key: section}
    with pytest.raises(CheckpointError, match=rf"config\.json: {key}\.{named}"):
        read_hub_config("meta-llama/Llama-3.1-8B", **changes)


@pytest.mark.parametrize(
    ("hub_id", "changes", "named"),
    [
        ("meta-llama/Llama-3.1-8B", {"num_key_value_heads": 5}, "32 attention heads are no multiple of 5 KV heads"),
        ("mistralai/Mixtral-8x7B-v0.1", {"num_experts_per_tok": 9}, "must be at most 8, the number of experts, not 9"),
        (
            "meta-llama/Llama-3.1-8B",
            {"eos_token_id": "</s>"},
            "eos_token_id must be an integer or a list of them, not '</s>'",
        ),
        ("meta-llama/Llama-3.1-8B", {"eos_token_id": [2, None]}, "eos_token_id must be an integer or a list of them"),
        (
            "meta-llama/Llama-3.1-8B",
            {"architectures": None},
            "architectures must be a list of names, not None; known: ",
        ),
        (
            "mistralai/Mixtral-8x7B-v0.1",
            {"num_hidden_layers": 10_000, "num_local_experts": 10_000},
            "10000 layers of 10000 experts are more than 300000 experts in all",
        ),
        (
            "meta-llama/Llama-3.1-8B",
            {"max_position_embeddings": 1 << 31},
            "a context of 2147483648 tokens is more than positions of 32 bits can name, 2147483646",
        ),
        ("meta-llama/Llama-3.1-8B", {"architectures": []}, "architectures names none; known: LlamaForCausalLM"),
    ],
)
def test_what_does_not_fit_together_is_named(
    tmp_path: Path, hub_id: str, changes: dict[str, object], named: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**HUB_CONFIGS[hub_id], **changes}))
    with pytest.raises(CheckpointError, match=named):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"architectures": [', "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON .*recursion"),
        (b"[]", "not a JSON object"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: {named}"):
        read_config(tmp_path)


def test_what_ends_a_text_is_of_the_vocabulary(tmp_path: Path) -> None:
    """The generation's configuration says it first; ids beyond the vocabulary, which mean none, are left out."""
    (tmp_path / "config.json").write_text(json.dumps({**HUB_CONFIGS["openai-community/gpt2"], "eos_token_id": 5}))
    assert read_config(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, -1, 50257, 50256]}))
    assert read_config(tmp_path).eos_token_ids == (7, 50256)
