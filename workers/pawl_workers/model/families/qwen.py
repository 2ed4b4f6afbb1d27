"""Qwen2 and 2.5: Llama with biases on queries, keys and values; Qwen3: with query and key norms; both: experts."""

from __future__ import annotations

from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec, layer_windows
from pawl_workers.model.spec import ExpertSpec, LayerSpec, ModelSpec, QueryKeyNorm

__all__ = ["FAMILIES"]


def _windows(config: ConfigReader, num_layers: int) -> tuple[LayerSpec, ...]:
    window = config.optional_integer("sliding_window") if config.flag("use_sliding_window", False) else None
    first = config.count("max_window_layers", 28)
    return tuple(LayerSpec(w) for w in layer_windows(config, num_layers, window, lambda layer: layer >= first))


def _qwen2(config: ConfigReader) -> ModelSpec:
    base = decoder_spec(config, "Qwen2ForCausalLM")
    return replace(base, layers=_windows(config, base.num_layers), qkv_bias=True)


def _qwen3(config: ConfigReader) -> ModelSpec:
    base = decoder_spec(config, "Qwen3ForCausalLM", head_dim=128)
    return replace(base, layers=_windows(config, base.num_layers), query_key_norm=QueryKeyNorm.HEAD)


def _qwen2_moe(config: ConfigReader) -> ModelSpec:
    base = decoder_spec(config, "Qwen2MoeForCausalLM")
    window = config.optional_integer("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
    first = config.count("max_window_layers", 28)
    windows = layer_windows(config, base.num_layers, window, lambda layer: layer % 2 == 0 and layer < first)
    experts = ExpertSpec(
        num_experts=config.parts("num_experts", 60),
        num_active=config.integer("num_experts_per_tok", 4),
        intermediate_size=config.integer("moe_intermediate_size", 1408),
        normalised=config.flag("norm_topk_prob", False),
        shared_size=config.integer("shared_expert_intermediate_size", 5632),
    )
    layers = (LayerSpec(w, routed=is_routed) for w, is_routed in zip(windows, _routed(config, base), strict=True))
    return replace(base, layers=tuple(layers), qkv_bias=config.flag("qkv_bias", True), experts=experts)


def _routed(config: ConfigReader, base: ModelSpec) -> tuple[bool, ...]:
    step, dense = config.integer("decoder_sparse_step", 1), config.numbers("mlp_only_layers")
    return tuple((i + 1) % step == 0 and i not in dense for i in range(base.num_layers))


def _qwen3_moe(config: ConfigReader) -> ModelSpec:
    base = decoder_spec(config, "Qwen3MoeForCausalLM")
    window = config.optional_integer("sliding_window") if config.flag("use_sliding_window", False) else None
    return replace(
        base,
        layers=tuple(LayerSpec(window, routed=is_routed) for is_routed in _routed(config, base)),
        query_key_norm=QueryKeyNorm.HEAD,
        experts=ExpertSpec(
            num_experts=config.parts("num_local_experts", config.parts("num_experts", 128)),  # transformers 5, 4
            num_active=config.integer("num_experts_per_tok", 8),
            intermediate_size=config.integer("moe_intermediate_size", 768),
            normalised=config.flag("norm_topk_prob", False),
        ),
    )


FAMILIES = {
    "Qwen2ForCausalLM": Family(_qwen2, decoder_names),
    "Qwen2MoeForCausalLM": Family(_qwen2_moe, decoder_names),
    "Qwen3ForCausalLM": Family(_qwen3, decoder_names),
    "Qwen3MoeForCausalLM": Family(_qwen3_moe, decoder_names),
}
