"""Mistral: Llama with a sliding window; Mixtral: with routed experts instead of one MLP."""

from __future__ import annotations

from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec, layer_windows
from pawl_workers.model.spec import ExpertSpec, LayerSpec, ModelSpec, TensorTarget

__all__ = ["FAMILIES"]


def _spec(config: ConfigReader) -> ModelSpec:
    base = decoder_spec(config, "MistralForCausalLM")
    windows = layer_windows(config, base.num_layers, config.optional_integer("sliding_window", 4096), lambda _: True)
    return replace(base, layers=tuple(LayerSpec(window) for window in windows))


def _mixtral_spec(config: ConfigReader) -> ModelSpec:
    base = decoder_spec(config, "MixtralForCausalLM", theta=1e6, epsilon=1e-5)
    return replace(
        base,
        layers=(LayerSpec(config.optional_integer("sliding_window"), routed=True),) * base.num_layers,
        experts=ExpertSpec(
            num_experts=config.integer("num_local_experts", 8),
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
    "MixtralForCausalLM": Family(_mixtral_spec, _mixtral_names),
}
