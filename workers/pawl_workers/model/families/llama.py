"""Llama 2 and 3: RMS norm, rotary positions, grouped-query attention, gated SiLU."""

from __future__ import annotations

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec
from pawl_workers.model.spec import ModelSpec

__all__ = ["FAMILIES"]


def _spec(config: ConfigReader) -> ModelSpec:
    return decoder_spec(config, "LlamaForCausalLM")


FAMILIES = {"LlamaForCausalLM": Family(_spec, decoder_names)}
