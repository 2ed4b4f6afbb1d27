"""Llama: RMS norm, rotary positions, grouped-query attention, gated SiLU. A name map and flags."""

from __future__ import annotations

from pawl_workers.errors import CheckpointError
from pawl_workers.model.spec import ConfigReader, ModelSpec, NormKind, RotarySpec, TensorTarget

__all__ = ["ARCHITECTURE", "IGNORED", "PREFIX", "names", "spec"]

ARCHITECTURE = "LlamaForCausalLM"
PREFIX = ""
IGNORED = ("rotary_emb.inv_freq",)


def spec(config: ConfigReader) -> ModelSpec:
    """Read the sizes and flags of a Llama configuration (transformers 4 and 5 spellings)."""
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    attention_bias = config.flag("attention_bias", False)
    max_context = config.integer("max_position_embeddings", 2048)
    return ModelSpec(
        architecture=ARCHITECTURE,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=config.integer("head_dim", hidden_size // num_heads),
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_context=max_context,
        norm=NormKind.RMS,
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        activation=config.activation("hidden_act", "silu"),
        gated_mlp=True,
        rotary=_rotary(config, max_context),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
        tied_head=config.flag("tie_word_embeddings", False),
    )


def _rotary(config: ConfigReader, max_context: int) -> RotarySpec:
    scaling = config.section("rope_parameters") or config.section("rope_scaling")
    theta = config.number("rope_theta", 10000.0)
    if scaling is None:
        return RotarySpec(theta)
    theta = scaling.number("rope_theta", theta)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    match kind:
        # Dynamic NTK only changes the base beyond max_position_embeddings, where no context goes here.
        case "default" | "dynamic":
            return RotarySpec(theta)
        case "linear":
            return RotarySpec(theta, "linear", factor=scaling.number("factor", 1.0))
        case "llama3":
            return RotarySpec(
                theta,
                "llama3",
                factor=scaling.number("factor", 1.0),
                low_frequency_factor=scaling.number("low_freq_factor", 1.0),
                high_frequency_factor=scaling.number("high_freq_factor", 4.0),
                original_max_position=scaling.integer("original_max_position_embeddings", max_context),
            )
        case _:
            raise CheckpointError(
                f"config.json: rope scaling {kind!r} is not supported; known: default, linear, dynamic, llama3"
            )


def names(model: ModelSpec) -> dict[str, TensorTarget]:
    """Map the checkpoint's tensor names to slots."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    inner = model.intermediate_size
    found = {
        "model.embed_tokens.weight": TensorTarget("embedding"),
        "model.norm.weight": TensorTarget("final_norm.weight"),
    }
    if not model.tied_head:
        found["lm_head.weight"] = TensorTarget("head.weight")
    for i in range(model.num_layers):
        source, layer = f"model.layers.{i}.", f"layers.{i}."
        found[source + "input_layernorm.weight"] = TensorTarget(layer + "attention_norm.weight")
        found[source + "post_attention_layernorm.weight"] = TensorTarget(layer + "mlp_norm.weight")
        projections = [
            ("self_attn.q_proj", "qkv", 0, queries, model.qkv_bias),
            ("self_attn.k_proj", "qkv", queries, keys, model.qkv_bias),
            ("self_attn.v_proj", "qkv", queries + keys, keys, model.qkv_bias),
            ("self_attn.o_proj", "attention_output", 0, 0, model.attention_output_bias),
            ("mlp.gate_proj", "up", 0, inner, model.mlp_bias),
            ("mlp.up_proj", "up", inner, inner, model.mlp_bias),
            ("mlp.down_proj", "down", 0, 0, model.mlp_bias),
        ]
        for name, slot, row, num_rows, has_bias in projections:
            for part in ("weight", "bias") if has_bias else ("weight",):
                found[f"{source}{name}.{part}"] = TensorTarget(f"{layer}{slot}.{part}", row, num_rows)
    return found
