"""Granite: Llama with multipliers of the embedding, the scores, what blocks add, and the logits."""

from __future__ import annotations

from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec
from pawl_workers.model.spec import ModelSpec

__all__ = ["FAMILIES"]


def _spec(config: ConfigReader) -> ModelSpec:
    return replace(
        decoder_spec(config, "GraniteForCausalLM"),
        embedding_scale=config.positive("embedding_multiplier", 1.0),
        attention_scale=config.positive("attention_multiplier", 1.0),
        residual_scale=config.positive("residual_multiplier", 1.0),
        logit_divisor=config.positive("logits_scaling", 1.0),
    )


FAMILIES = {"GraniteForCausalLM": Family(_spec, decoder_names)}
