"""OLMo 2: norms after each block instead of before, and over all queries and all keys of a token."""

from __future__ import annotations

from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec
from pawl_workers.model.spec import ModelSpec, QueryKeyNorm, TensorTarget

__all__ = ["FAMILIES"]

_NORMS = {"post_attention_layernorm": "attention_output_norm", "post_feedforward_layernorm": "mlp_output_norm"}


def _spec(config: ConfigReader) -> ModelSpec:
    return replace(decoder_spec(config, "Olmo2ForCausalLM", epsilon=1e-5), query_key_norm=QueryKeyNorm.WIDTH)


def _names(model: ModelSpec) -> dict[str, TensorTarget]:
    return decoder_names(model, norms=_NORMS)


FAMILIES = {"Olmo2ForCausalLM": Family(_spec, _names)}
