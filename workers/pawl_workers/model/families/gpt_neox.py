"""GPT-NeoX and Pythia: layer norm, biases, partly turned heads, attention and MLP side by side."""

from __future__ import annotations

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family, add_linear
from pawl_workers.model.families.rope import read_rotary
from pawl_workers.model.spec import LayerSpec, ModelSpec, NormKind, TensorTarget

__all__ = ["FAMILIES"]


def _spec(config: ConfigReader) -> ModelSpec:
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim, max_context = hidden_size // num_heads, config.integer("max_position_embeddings", 2048)
    bias = config.flag("attention_bias", True)
    # Its own spelling of two keys, from before there was a common one.
    share = config.number("rotary_pct", 0.25)
    defaults = config.with_defaults({"partial_rotary_factor": share})
    return ModelSpec(
        architecture="GPTNeoXForCausalLM",
        layers=(LayerSpec(),) * config.parts("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_context=max_context,
        norm=NormKind.LAYER,
        norm_epsilon=config.positive("layer_norm_eps", 1e-5),
        activation=config.activation("hidden_act", "gelu"),
        gated_mlp=False,
        rotaries=(read_rotary(defaults, head_dim, max_context, config.positive("rotary_emb_base", 10000.0)),),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=True,
        parallel_blocks=config.flag("use_parallel_residual", True),
        tied_head=config.flag("tie_word_embeddings", False),
    )


def _names(model: ModelSpec) -> dict[str, TensorTarget]:
    found = {"gpt_neox.embed_in.weight": TensorTarget("embedding")}
    add_linear(found, "gpt_neox.final_layer_norm", "final_norm", bias=True)
    if not model.tied_head:
        found["embed_out.weight"] = TensorTarget("head.weight")
    for i in range(model.num_layers):
        source, slot = f"gpt_neox.layers.{i}.", f"layers.{i}."
        add_linear(found, f"{source}input_layernorm", f"{slot}attention_norm", bias=True)
        add_linear(found, f"{source}post_attention_layernorm", f"{slot}mlp_norm", bias=True)
        for part in ("weight", "bias") if model.qkv_bias else ("weight",):
            target = TensorTarget(f"{slot}qkv.{part}", heads=model.num_heads)
            found[f"{source}attention.query_key_value.{part}"] = target
        output_bias = model.attention_output_bias
        add_linear(found, f"{source}attention.dense", f"{slot}attention_output", bias=output_bias)
        add_linear(found, f"{source}mlp.dense_h_to_4h", f"{slot}up", bias=True)
        add_linear(found, f"{source}mlp.dense_4h_to_h", f"{slot}down", bias=True)
    return found


# Causal masks and frequencies that old checkpoints store.
_IGNORED = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")

FAMILIES = {"GPTNeoXForCausalLM": Family(_spec, _names, ignored=_IGNORED)}
