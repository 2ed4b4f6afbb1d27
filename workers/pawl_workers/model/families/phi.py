"""Phi 1 and 2: attention and MLP side by side after one layer norm, partly turned heads, biases everywhere."""

from __future__ import annotations

from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec
from pawl_workers.model.spec import ModelSpec, NormKind, TensorTarget

__all__ = ["FAMILIES"]


def _spec(config: ConfigReader) -> ModelSpec:
    config.refuse("qk_layernorm")
    config = config.with_defaults({"partial_rotary_factor": 0.5})
    return replace(
        decoder_spec(config, "PhiForCausalLM", activation="gelu_new"),
        norm=NormKind.LAYER,
        norm_epsilon=config.positive("layer_norm_eps", 1e-5),
        gated_mlp=False,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        head_bias=True,
        parallel_blocks=True,
    )


def _names(model: ModelSpec) -> dict[str, TensorTarget]:
    return decoder_names(
        model,
        norms={"input_layernorm": "attention_norm"},
        norm_bias=True,
        final_norm="final_layernorm",
        attention_output="dense",
        mlp_parts=("fc1", "fc2"),
    )


FAMILIES = {"PhiForCausalLM": Family(_spec, _names)}
