"""SmolLM3: Llama whose every fourth layer does not turn its queries and keys."""

from __future__ import annotations

from dataclasses import replace

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, decoder_names, decoder_spec, layer_windows
from pawl_workers.model.spec import LayerSpec, ModelSpec

__all__ = ["FAMILIES"]


def _spec(config: ConfigReader) -> ModelSpec:
    base = decoder_spec(config, "SmolLM3ForCausalLM", theta=2e6, tied=True)
    every = config.integer("no_rope_layer_interval", 4)
    turns = config.numbers("no_rope_layers") or tuple((i + 1) % every != 0 for i in range(base.num_layers))
    if len(turns) != base.num_layers:
        raise config.error("no_rope_layers", f"has {len(turns)} entries for {base.num_layers} layers")
    window = config.optional_integer("sliding_window") if config.flag("use_sliding_window", False) else None
    windows = layer_windows(config, base.num_layers, window, lambda layer: not turns[layer])
    layers = (LayerSpec(w, rotary=0 if turn else None) for w, turn in zip(windows, turns, strict=True))
    return replace(base, layers=tuple(layers))


FAMILIES = {"SmolLM3ForCausalLM": Family(_spec, decoder_names)}
