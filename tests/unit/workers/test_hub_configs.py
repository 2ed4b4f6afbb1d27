"""Configurations of well-known models, as the hub has them, are read as transformers reads them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families import FAMILIES, find_family
from pawl_workers.model.rotary import rotary_table
from pawl_workers.model.slots import slot_shapes
from pawl_workers.model.spec import Activation, ExpertSpec, LayerSpec, NormKind, QueryKeyNorm
from tests.fakes.hub_configs import HUB_CONFIGS, read_hub_config

# Of the text part; as the hub's model cards give them.
NUM_PARAMETERS = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 3_880_263_168,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-mini-128k-instruct": 3_821_079_552,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": 23_572_403_200,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "microsoft/phi-2": 2_779_683_840,
    "stabilityai/stablelm-2-1_6b": 1_644_515_328,
    "CohereLabs/aya-expanse-8b": 8_028_033_024,
    "CohereLabs/c4ai-command-r7b-12-2024": 8_028_033_024,
    "zai-org/glm-4-9b-chat-hf": 9_399_951_360,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "openai-community/gpt2": 124_439_808,
    "EleutherAI/pythia-70m": 70_426_624,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/Olmo-3-7B-Instruct": 7_298_011_136,
    "ibm-granite/granite-3.1-2b-instruct": 2_533_531_648,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
}


def reference(hub_id: str, folder: Path) -> PreTrainedModel:
    """The model that transformers makes of a configuration, without memory for its weights."""
    (folder / "config.json").write_text(json.dumps(dict(HUB_CONFIGS[hub_id])))
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        made: PreTrainedModel = getattr(transformers, config.architectures[0])(config)
        return made


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    return getattr(model.base_model, "language_model", model.base_model)


def test_every_architecture_has_a_published_configuration() -> None:
    assert {find_family(values["architectures"])[0] for values in HUB_CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("hub_id", HUB_CONFIGS)
def test_sizes_are_those_of_the_published_model(hub_id: str, tmp_path: Path) -> None:
    """Parameters that our names ask for, those that transformers makes, and those that the model card gives."""
    spec, model = read_hub_config(hub_id), reference(hub_id, tmp_path)
    names, shapes = FAMILIES[spec.architecture].names(spec), slot_shapes(spec)
    num_parameters = sum(math.prod(shapes[slot]) for slot in {target.slot for target in names.values()})
    assert num_parameters == NUM_PARAMETERS[hub_id]
    left_out = 0
    if spec.architecture.endswith("ForConditionalGeneration"):
        left_out = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if "vision_tower" in name or "multi_modal_projector" in name
        )
    assert model.num_parameters() - left_out == num_parameters
    assert spec.num_layers == len(getattr(text_part(model), "layers", getattr(text_part(model), "h", [])))


@pytest.mark.parametrize("hub_id", [name for name in HUB_CONFIGS if name != "openai-community/gpt2"])
def test_frequencies_are_those_of_transformers(hub_id: str, tmp_path: Path) -> None:
    """For long rope those of contexts up to the original length: transformers changes them within a forward pass."""
    spec, rotary = read_hub_config(hub_id), text_part(reference(hub_id, tmp_path)).rotary_emb
    made = type(rotary)(rotary.config)
    short = min(spec.max_context, spec.rotaries[0].original_max_position or spec.max_context)
    tables = [rotary_table(one, short, torch.device("cpu")) for one in spec.rotaries]
    kinds = ["full_attention_", "sliding_attention_"] if len(tables) > 1 else [""]
    for table, kind in zip(tables, kinds, strict=True):
        torch.testing.assert_close(table.frequencies, getattr(made, f"{kind}inv_freq"), rtol=1e-6, atol=0)
        assert table.scale == pytest.approx(getattr(made, f"{kind}attention_scaling"))


def test_llama() -> None:
    spec = read_hub_config("meta-llama/Llama-3.2-1B")
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.tied_head) == (32, 8, 64, True)
    rotary = spec.rotaries[0]
    assert (rotary.kind, rotary.factor, rotary.theta, rotary.original_max_position) == ("llama3", 32.0, 500000.0, 8192)
    assert (spec.norm_epsilon, spec.qkv_bias, spec.max_context) == (1e-5, False, 131072)
    assert read_hub_config("HuggingFaceTB/SmolLM2-135M").head_dim == 64


def test_mistral() -> None:
    assert set(read_hub_config("mistralai/Mistral-7B-v0.1").layers) == {LayerSpec(window=4096)}
    assert set(read_hub_config("mistralai/Mistral-7B-v0.3").layers) == {LayerSpec()}


def test_mixtral() -> None:
    spec = read_hub_config("mistralai/Mixtral-8x7B-v0.1")
    assert set(spec.layers) == {LayerSpec(routed=True)}
    assert spec.experts is not None
    assert (spec.experts.num_experts, spec.experts.num_active, spec.experts.intermediate_size) == (8, 2, 14336)
    assert spec.experts.normalised
    assert spec.rotaries[0].theta == 1e6


def test_qwen() -> None:
    two, three = read_hub_config("Qwen/Qwen2.5-0.5B"), read_hub_config("Qwen/Qwen3-0.6B")
    assert (two.head_dim, two.qkv_bias, two.attention_output_bias, two.query_key_norm) == (64, True, False, None)
    assert (three.head_dim, three.qkv_bias, three.query_key_norm) == (128, False, QueryKeyNorm.HEAD)
    assert set(two.layers) == set(three.layers) == {LayerSpec()}  # the window of 32768 is switched off
    moe = read_hub_config("Qwen/Qwen3-30B-A3B")
    assert moe.experts is not None
    assert (moe.experts.num_experts, moe.experts.num_active, moe.experts.intermediate_size) == (128, 8, 768)
    assert moe.experts.normalised
    shared = read_hub_config("Qwen/Qwen1.5-MoE-A2.7B")
    assert shared.experts == ExpertSpec(60, 4, 1408, normalised=False, shared_size=5632)
    assert (set(shared.layers), shared.qkv_bias) == ({LayerSpec(routed=True)}, True)
    long = read_hub_config(
        "Qwen/Qwen2.5-0.5B",
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},  # as its card advises
    )
    assert (long.rotaries[0].kind, long.max_context) == ("yarn", 131072)
    assert long.rotaries[0].attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_gemma() -> None:
    first, two, three = (read_hub_config(f"google/{name}") for name in ("gemma-2b", "gemma-2-2b", "gemma-3-1b-it"))
    assert (first.head_dim, first.num_kv_heads, first.attention_scale, first.tied_head) == (256, 1, None, True)
    assert (first.embedding_scale, first.activation) == (2048**0.5, Activation.GELU_TANH)  # it says "gelu"
    assert (two.attention_softcap, two.logit_softcap, two.attention_scale) == (50.0, 30.0, 1 / 16)
    assert two.layers[:2] == (LayerSpec(window=4096), LayerSpec())
    assert (two.embedding_scale, two.tied_head, two.activation) == (48.0, True, Activation.GELU_TANH)
    assert (three.attention_softcap, three.logit_softcap) == (None, None)
    local, everywhere = LayerSpec(window=512, rotary=1), LayerSpec(rotary=0)
    assert three.layers[:7] == (local, local, local, local, local, everywhere, local)
    assert [rotary.theta for rotary in three.rotaries] == [1e6, 1e4]


def test_gemma_with_vision_is_read_for_its_text() -> None:
    """Its section holds only what is not as in the family's defaults."""
    spec = read_hub_config("google/gemma-3-4b-it")
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert [(rotary.kind, rotary.factor) for rotary in spec.rotaries] == [("linear", 8.0), ("default", 1.0)]
    assert (spec.layers[5], spec.layers[6], spec.max_context) == (LayerSpec(), LayerSpec(1024, rotary=1), 131072)
    names = FAMILIES[spec.architecture].names(spec)
    assert all(name.startswith("language_model.model.") for name in names)


def test_phi() -> None:
    short, long, four = (
        read_hub_config(f"microsoft/{name}")
        for name in ("Phi-3-mini-4k-instruct", "Phi-3-mini-128k-instruct", "Phi-4-mini-instruct")
    )
    assert set(short.layers) == {LayerSpec(window=2047)}
    assert (short.head_dim, short.rotaries[0].kind, short.rotaries[0].rotary_dim) == (96, "default", 96)
    assert (four.head_dim, four.rotaries[0].rotary_dim, four.num_kv_heads, four.tied_head) == (128, 96, 8, True)
    for spec in (long, four):
        rotary = spec.rotaries[0]
        assert (rotary.kind, rotary.original_max_position, spec.max_context) == ("longrope", 4096, 131072)
        assert rotary.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_gpt() -> None:
    two, neox = read_hub_config("openai-community/gpt2"), read_hub_config("EleutherAI/pythia-70m")
    assert (two.norm, two.rotaries, two.tied_head, two.intermediate_size) == (NormKind.LAYER, (), True, 3072)
    assert (neox.norm, neox.parallel_blocks, neox.rotaries[0].rotary_dim) == (NormKind.LAYER, True, 16)
    assert (neox.activation, neox.qkv_bias, neox.tied_head) == (Activation.GELU, True, False)


def test_mistral_with_vision_is_read_for_its_text() -> None:
    spec = read_hub_config("mistralai/Mistral-Small-3.1-24B-Instruct-2503")
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (32, 8, 128, 131072)
    assert (spec.rotaries[0].theta, spec.max_context, spec.tied_head, set(spec.layers)) == (
        1e9,
        131072,
        False,
        {LayerSpec()},
    )
    names = FAMILIES[spec.architecture].names(spec)
    assert all(name.startswith(("language_model.model.", "language_model.lm_head.")) for name in names)


def test_starcoder() -> None:
    spec = read_hub_config("bigcode/starcoder2-3b")
    assert (spec.norm, spec.gated_mlp, spec.mlp_bias, spec.tied_head) == (NormKind.LAYER, False, True, True)
    assert set(spec.layers) == {LayerSpec(window=4096)}


def test_phi_with_parallel_blocks() -> None:
    spec = read_hub_config("microsoft/phi-2")
    assert (spec.norm, spec.parallel_blocks, spec.head_bias, spec.rotaries[0].rotary_dim) == (
        NormKind.LAYER,
        True,
        True,
        32,
    )


def test_stablelm() -> None:
    spec = read_hub_config("stabilityai/stablelm-2-1_6b")
    assert (spec.norm, spec.qkv_bias, spec.attention_output_bias) == (NormKind.LAYER, True, False)
    assert (spec.parallel_blocks, spec.rotaries[0].rotary_dim) == (False, 16)


def test_cohere() -> None:
    aya, command = read_hub_config("CohereLabs/aya-expanse-8b"), read_hub_config("CohereLabs/c4ai-command-r7b-12-2024")
    assert (aya.parallel_blocks, aya.logit_divisor, aya.tied_head, aya.norm) == (True, 8.0, True, NormKind.LAYER)
    local = LayerSpec(window=4096)
    assert command.layers[:5] == (local, local, local, LayerSpec(rotary=None), local)
    assert (command.logit_divisor, command.rotaries[0].theta) == (4.0, 50000.0)


def test_glm() -> None:
    older, four = read_hub_config("zai-org/glm-4-9b-chat-hf"), read_hub_config("zai-org/GLM-4-9B-0414")
    for spec in (older, four):
        assert (spec.head_dim, spec.rotaries[0].rotary_dim, spec.num_kv_heads) == (128, 64, 2)
        assert (spec.qkv_bias, spec.attention_output_bias, spec.tied_head) == (True, False, False)
    assert len(FAMILIES["Glm4ForCausalLM"].names(four)) == len(FAMILIES["GlmForCausalLM"].names(older)) + 2 * 40


def test_olmo() -> None:
    spec = read_hub_config("allenai/OLMo-2-0425-1B")
    assert (spec.query_key_norm, spec.rotaries[0].theta, spec.head_dim) == (QueryKeyNorm.WIDTH, 500000.0, 128)
    three = read_hub_config("allenai/Olmo-3-7B-Instruct")
    local = LayerSpec(window=4096, rotary=1)
    assert three.layers[:5] == (local, local, local, LayerSpec(rotary=0), local)
    assert [(rotary.kind, rotary.factor) for rotary in three.rotaries] == [("yarn", 8.0), ("default", 1.0)]
    assert (three.query_key_norm, three.max_context) == (QueryKeyNorm.WIDTH, 65536)


def test_granite() -> None:
    spec = read_hub_config("ibm-granite/granite-3.1-2b-instruct")
    assert (spec.embedding_scale, spec.attention_scale) == (12.0, 1 / 64)
    assert (spec.residual_scale, spec.logit_divisor) == (0.22, 8.0)


def test_smollm3() -> None:
    spec = read_hub_config("HuggingFaceTB/SmolLM3-3B")
    assert spec.layers[:5] == (LayerSpec(), LayerSpec(), LayerSpec(), LayerSpec(rotary=None), LayerSpec())
    assert (spec.tied_head, spec.rotaries[0].theta) == (True, 5e6)


@pytest.mark.parametrize(
    ("hub_id", "left_out"),
    [
        ("mistralai/Mistral-7B-v0.1", ["sliding_window"]),
        ("google/gemma-2b", ["head_dim", "rope_theta", "hidden_act"]),
        ("allenai/Olmo-3-7B-Instruct", ["sliding_window", "layer_types", "rope_theta"]),
        ("google/gemma-2-2b", ["sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "head_dim"]),
        ("google/gemma-3-1b-it", ["sliding_window_pattern", "rope_local_base_freq", "rope_theta"]),
        ("microsoft/Phi-3-mini-128k-instruct", ["original_max_position_embeddings"]),
        ("microsoft/Phi-4-mini-instruct", ["rms_norm_eps", "rope_theta"]),
        ("EleutherAI/pythia-70m", ["rotary_pct", "rotary_emb_base", "use_parallel_residual"]),
        ("HuggingFaceTB/SmolLM3-3B", ["no_rope_layers", "layer_types"]),
        (
            "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
            ["image_token_index", "vision_config"],
        ),
        (
            "Qwen/Qwen1.5-MoE-A2.7B",
            ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"],
        ),
        ("bigcode/starcoder2-3b", ["hidden_act", "norm_epsilon", "num_key_value_heads", "use_bias"]),
        ("microsoft/phi-2", ["hidden_act", "layer_norm_eps", "num_key_value_heads", "rope_theta"]),
        (
            "stabilityai/stablelm-2-1_6b",
            ["layer_norm_eps", "num_key_value_heads", "partial_rotary_factor", "rope_theta"],
        ),
        ("CohereLabs/aya-expanse-8b", ["layer_norm_eps", "use_qk_norm"]),
        ("CohereLabs/c4ai-command-r7b-12-2024", ["head_dim", "sliding_window", "sliding_window_pattern"]),
        (
            "zai-org/glm-4-9b-chat-hf",
            ["attention_bias", "head_dim", "num_key_value_heads", "partial_rotary_factor", "rms_norm_eps"],
        ),
        ("mistralai/Mixtral-8x7B-v0.1", ["rope_theta", "num_local_experts", "num_experts_per_tok"]),
    ],
)
def test_what_is_left_out_is_the_familys_default(hub_id: str, left_out: list[str]) -> None:
    """These models have their family's defaults, so that leaving the keys out changes nothing."""
    values = {key: value for key, value in HUB_CONFIGS[hub_id].items() if key not in left_out}
    spec = find_family(values["architectures"])[1].spec(ConfigReader(values))
    assert spec == read_hub_config(hub_id)


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_long_rope_had_other_names(kind: str) -> None:
    """The first Phi-3 checkpoints called it so."""
    scaling = HUB_CONFIGS["microsoft/Phi-3-mini-128k-instruct"]["rope_scaling"]
    assert isinstance(scaling, dict)
    spec = read_hub_config("microsoft/Phi-3-mini-128k-instruct", rope_scaling={**scaling, "type": kind})
    assert spec == read_hub_config("microsoft/Phi-3-mini-128k-instruct")


def test_yarn_without_a_factor_stretches_to_the_context() -> None:
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 10240}
    spec = read_hub_config("Qwen/Qwen3-0.6B", rope_scaling=scaling)
    assert spec.rotaries[0].factor == 4.0
    assert spec == replace(read_hub_config("Qwen/Qwen3-0.6B", rope_scaling={**scaling, "factor": 4.0}))
