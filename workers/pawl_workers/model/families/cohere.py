"""Command R, R7B and Aya: attention and MLP side by side after one layer norm, pairs that turn side by side."""

from __future__ import annotations

from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec, layer_windows
from pawl_workers.model.spec import LayerSpec, ModelSpec, NormKind, TensorTarget

__all__ = ["FAMILIES"]


def _base(config: ConfigReader, architecture: str, theta: float) -> ModelSpec:
    return replace(
        decoder_spec(config, architecture, theta=theta, tied=True),
        norm=NormKind.LAYER,
        norm_epsilon=config.positive("layer_norm_eps", 1e-5),
        mlp_bias=False,
        parallel_blocks=True,
        logit_divisor=1.0 / config.positive("logit_scale", 0.0625),
    )


def _command_r(config: ConfigReader) -> ModelSpec:
    config.refuse("use_qk_norm")
    return _base(config, "CohereForCausalLM", 500000.0)


def _command_r7b(config: ConfigReader) -> ModelSpec:
    base = _base(config.without("head_dim"), "Cohere2ForCausalLM", 10000.0)
    every, window = config.integer("sliding_window_pattern", 4), config.optional_integer("sliding_window", 4096)
    windows = layer_windows(config, base.num_layers, window, lambda layer: (layer + 1) % every != 0)
    return replace(base, layers=tuple(LayerSpec(w, rotary=None if w is None else 0) for w in windows))


def _names(model: ModelSpec) -> dict[str, TensorTarget]:
    return decoder_names(model, norms={"input_layernorm": "attention_norm"}, interleaved=True)


FAMILIES = {"CohereForCausalLM": Family(_command_r, _names), "Cohere2ForCausalLM": Family(_command_r7b, _names)}
