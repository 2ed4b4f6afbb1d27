"""StableLM: Llama with layer norms and partly turned heads; in some, attention and MLP stand side by side."""

from __future__ import annotations

from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import NORMS, Family, decoder_names, decoder_spec
from pawl_workers.model.spec import ModelSpec, NormKind, TensorTarget

__all__ = ["FAMILIES"]


def _spec(config: ConfigReader) -> ModelSpec:
    config.refuse("qk_layernorm")
    config = config.without("head_dim").with_defaults({"partial_rotary_factor": 0.25, "num_key_value_heads": 32})
    return replace(
        decoder_spec(config, "StableLmForCausalLM"),
        norm=NormKind.LAYER,
        norm_epsilon=config.positive("layer_norm_eps", 1e-5),
        qkv_bias=config.flag("use_qkv_bias", False),
        attention_output_bias=False,
        mlp_bias=False,
        parallel_blocks=config.flag("use_parallel_residual", False),
    )


def _names(model: ModelSpec) -> dict[str, TensorTarget]:
    norms = {"input_layernorm": "attention_norm"} if model.parallel_blocks else NORMS
    return decoder_names(model, norms=norms, norm_bias=True)


FAMILIES = {"StableLmForCausalLM": Family(_spec, _names)}
