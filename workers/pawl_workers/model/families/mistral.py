"""Mistral: Llama with a sliding window; 3 also with vision; Mixtral: with routed experts instead of one MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec, layer_windows
from pawl_workers.model.spec import ExpertSpec, LayerSpec, ModelSpec, TensorTarget

__all__ = ["FAMILIES"]

_MISTRAL3_DEFAULTS: Mapping[str, object] = {
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "sliding_window": None,
    "vocab_size": 131072,
}


def _spec(config: ConfigReader) -> ModelSpec:
    base = decoder_spec(config, "MistralForCausalLM")
    windows = layer_windows(config, base.num_layers, config.optional_integer("sliding_window", 4096), lambda _: True)
    return replace(base, layers=tuple(LayerSpec(window) for window in windows))


def _mistral3_spec(config: ConfigReader) -> ModelSpec:
    """Read the part that makes text; its section leaves out what is as in Mistral Small 3.1."""
    text = config.needed_section("text_config")
    kind = text.text("model_type", "mistral")
    if kind != "mistral":  # Ministral 3 scales its queries by their positions
        raise text.error("model_type", f"{kind!r} is not supported; known: mistral")
    return replace(
        _spec(text.with_defaults(_MISTRAL3_DEFAULTS)),
        architecture="Mistral3ForConditionalGeneration",
        tied_head=config.flag("tie_word_embeddings", True),
    )


def _mistral3_names(model: ModelSpec) -> dict[str, TensorTarget]:
    return {f"language_model.{name}": target for name, target in decoder_names(model).items()}


def _mixtral_spec(config: ConfigReader) -> ModelSpec:
    base = decoder_spec(config, "MixtralForCausalLM", theta=1e6, epsilon=1e-5)
    return replace(
        base,
        layers=(LayerSpec(config.optional_integer("sliding_window"), routed=True),) * base.num_layers,
        experts=ExpertSpec(
            num_experts=config.parts("num_local_experts", 8),
            num_active=config.integer("num_experts_per_tok", 2),
            intermediate_size=base.intermediate_size,
            normalised=True,
        ),
    )


def _mixtral_names(model: ModelSpec) -> dict[str, TensorTarget]:
    return decoder_names(
        model,
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}.",
        expert_parts=("w1", "w3", "w2"),
    )


FAMILIES = {
    "MistralForCausalLM": Family(_spec, decoder_names),
    "Mistral3ForConditionalGeneration": Family(  # text in, text out: images are not served
        _mistral3_spec, _mistral3_names, other_parts=("vision_tower.", "multi_modal_projector.")
    ),
    "MixtralForCausalLM": Family(_mixtral_spec, _mixtral_names),
}
