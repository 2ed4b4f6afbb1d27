"""StarCoder 2: Llama with layer norms, biases everywhere, an MLP without a gate, and a sliding window."""

from __future__ import annotations

from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec
from pawl_workers.model.spec import LayerSpec, ModelSpec, NormKind, TensorTarget

__all__ = ["FAMILIES"]


def _spec(config: ConfigReader) -> ModelSpec:
    config = config.with_defaults({"num_key_value_heads": 2})
    base = decoder_spec(config, "Starcoder2ForCausalLM", tied=True, activation="gelu_pytorch_tanh")
    bias = config.flag("use_bias", True)
    return replace(
        base,
        layers=(LayerSpec(config.optional_integer("sliding_window")),) * base.num_layers,
        norm=NormKind.LAYER,
        norm_epsilon=config.positive("norm_epsilon", 1e-5),
        gated_mlp=False,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
    )


def _names(model: ModelSpec) -> dict[str, TensorTarget]:
    return decoder_names(model, norm_bias=True, mlp_parts=("c_fc", "c_proj"))


FAMILIES = {"Starcoder2ForCausalLM": Family(_spec, _names)}
