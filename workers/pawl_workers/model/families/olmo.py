"""OLMo 2 and 3: norms after each block instead of before, and over all queries and keys of a token; 3 has windows."""

from __future__ import annotations

from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec, layer_windows
from pawl_workers.model.families.rope import read_rotaries
from pawl_workers.model.spec import LayerSpec, ModelSpec, QueryKeyNorm, TensorTarget

__all__ = ["FAMILIES"]

_NORMS = {"post_attention_layernorm": "attention_output_norm", "post_feedforward_layernorm": "mlp_output_norm"}
_THETA = 500000.0


def _olmo2(config: ConfigReader) -> ModelSpec:
    return replace(decoder_spec(config, "Olmo2ForCausalLM", epsilon=1e-5), query_key_norm=QueryKeyNorm.WIDTH)


def _olmo3(config: ConfigReader) -> ModelSpec:
    base = decoder_spec(config.without("rope_parameters"), "Olmo3ForCausalLM", epsilon=1e-5, theta=_THETA)
    window = config.optional_integer("sliding_window", 4096)
    windows = layer_windows(config, base.num_layers, window, lambda layer: (layer + 1) % 4 != 0)
    return replace(
        base,
        layers=tuple(LayerSpec(w, rotary=0 if w is None else 1) for w in windows),
        rotaries=read_rotaries(config, base, _THETA, config.positive("rope_theta", _THETA)),
        query_key_norm=QueryKeyNorm.WIDTH,
    )


def _names(model: ModelSpec) -> dict[str, TensorTarget]:
    return decoder_names(model, norms=_NORMS)


FAMILIES = {"Olmo2ForCausalLM": Family(_olmo2, _names), "Olmo3ForCausalLM": Family(_olmo3, _names)}
