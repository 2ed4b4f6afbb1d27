"""Phi-3 and Phi-4: Llama with merged projections, partly turned heads and two sets of stretched frequencies."""

from __future__ import annotations

from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec
from pawl_workers.model.spec import LayerSpec, ModelSpec, TensorTarget

__all__ = ["FAMILIES"]


def _spec(config: ConfigReader) -> ModelSpec:
    base = decoder_spec(
        config.with_defaults({"original_max_position_embeddings": 4096}), "Phi3ForCausalLM", epsilon=1e-5
    )
    return replace(base, layers=(LayerSpec(config.optional_integer("sliding_window")),) * base.num_layers)


def _names(model: ModelSpec) -> dict[str, TensorTarget]:
    return decoder_names(model, merged_qkv=True, mlp_parts=("gate_up_proj", "down_proj"))


FAMILIES = {"Phi3ForCausalLM": Family(_spec, _names)}
