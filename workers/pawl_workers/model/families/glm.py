"""GLM 4: Llama with merged gates, partly turned heads, their pairs side by side; since 0414 four norms a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import NORMS, Family, decoder_names, decoder_spec
from pawl_workers.model.spec import ModelSpec, TensorTarget

__all__ = ["FAMILIES"]

_DEFAULTS: Mapping[str, object] = {
    "partial_rotary_factor": 0.5,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "attention_bias": True,
}

_NORMS = {
    "input_layernorm": "attention_norm",
    "post_self_attn_layernorm": "attention_output_norm",
    "post_attention_layernorm": "mlp_norm",
    "post_mlp_layernorm": "mlp_output_norm",
}


def _spec(config: ConfigReader, architecture: str) -> ModelSpec:
    base = decoder_spec(config.with_defaults(_DEFAULTS), architecture, head_dim=128, epsilon=1.5625e-7)
    return replace(base, attention_output_bias=False, mlp_bias=False)


def _glm(config: ConfigReader) -> ModelSpec:
    return _spec(config, "GlmForCausalLM")


def _glm4(config: ConfigReader) -> ModelSpec:
    return _spec(config, "Glm4ForCausalLM")


def _names(model: ModelSpec, norms: Mapping[str, str] = NORMS) -> dict[str, TensorTarget]:
    return decoder_names(model, norms=norms, interleaved=True, mlp_parts=("gate_up_proj", "down_proj"))


def _glm4_names(model: ModelSpec) -> dict[str, TensorTarget]:
    return _names(model, _NORMS)


FAMILIES = {"GlmForCausalLM": Family(_glm, _names), "Glm4ForCausalLM": Family(_glm4, _glm4_names)}
