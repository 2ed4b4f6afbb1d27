"""Gemma: scaled embeddings, gated GELU; 2 and 3: norms around each block, local layers between global ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec, layer_windows
from pawl_workers.model.families.rope import read_rotaries
from pawl_workers.model.spec import Activation, LayerSpec, ModelSpec, QueryKeyNorm, TensorTarget

__all__ = ["FAMILIES"]

_GEMMA3_DEFAULTS: Mapping[str, object] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "vocab_size": 262208,
}

_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_output_norm",
}


def _gemma(config: ConfigReader) -> ModelSpec:
    config.refuse("use_bidirectional_attention")
    base = decoder_spec(config, "GemmaForCausalLM", head_dim=256, tied=True, activation="gelu_pytorch_tanh")
    # The first checkpoints say "gelu" and mean the approximate one.
    approximate = Activation.GELU_TANH if base.activation is Activation.GELU else base.activation
    return replace(base, activation=approximate, embedding_scale=base.hidden_size**0.5)


def _base(config: ConfigReader, architecture: str) -> ModelSpec:
    config.refuse("use_bidirectional_attention")
    base = decoder_spec(
        config,
        architecture,
        head_dim=256,
        tied=True,
        activation_key="hidden_activation",
        activation=config.text("hidden_act", "gelu_pytorch_tanh"),
    )
    return replace(
        base,
        embedding_scale=base.hidden_size**0.5,
        attention_scale=config.positive("query_pre_attn_scalar", 256.0) ** -0.5,
    )


def _gemma2(config: ConfigReader) -> ModelSpec:
    base = _base(config, "Gemma2ForCausalLM")
    window = config.optional_integer("sliding_window", 4096)
    windows = layer_windows(config, base.num_layers, window, lambda layer: layer % 2 == 0)
    return replace(
        base,
        layers=tuple(LayerSpec(w) for w in windows),
        attention_softcap=config.optional_positive("attn_logit_softcapping", 50.0),
        logit_softcap=config.optional_positive("final_logit_softcapping", 30.0),
    )


def _gemma3(config: ConfigReader) -> ModelSpec:
    base = _base(config.without("rope_parameters"), "Gemma3ForCausalLM")
    every, window = config.integer("sliding_window_pattern", 6), config.optional_integer("sliding_window", 4096)
    windows = layer_windows(config, base.num_layers, window, lambda layer: (layer + 1) % every != 0)
    return replace(
        base,
        layers=tuple(LayerSpec(w, rotary=0 if w is None else 1) for w in windows),
        rotaries=read_rotaries(config, base, 1e6, config.positive("rope_local_base_freq", 10000.0)),
        query_key_norm=QueryKeyNorm.HEAD,
        logit_softcap=config.optional_positive("final_logit_softcapping"),
    )


def _gemma3_with_vision(config: ConfigReader) -> ModelSpec:
    """Read the part that makes text; its section leaves out what is as in the family's 4 B model."""
    base = _gemma3(config.needed_section("text_config").with_defaults(_GEMMA3_DEFAULTS))
    return replace(
        base, architecture="Gemma3ForConditionalGeneration", logit_softcap=None
    )  # capped in text models only


def _gemma_names(model: ModelSpec) -> dict[str, TensorTarget]:
    return decoder_names(model, norm_added=1.0)


def _names(model: ModelSpec) -> dict[str, TensorTarget]:
    return decoder_names(model, norms=_NORMS, norm_added=1.0)  # norms store their distance from 1


def _text_names(model: ModelSpec) -> dict[str, TensorTarget]:
    return {f"language_model.{name}": target for name, target in _names(model).items()}


FAMILIES = {
    "GemmaForCausalLM": Family(_gemma, _gemma_names),
    "Gemma2ForCausalLM": Family(_gemma2, _names),
    "Gemma3ForCausalLM": Family(_gemma3, _names),
    "Gemma3ForConditionalGeneration": Family(  # text in, text out: images are not served
        _gemma3_with_vision, _text_names, other_parts=("vision_tower.", "multi_modal_projector.")
    ),
}
