"""GPT-2: layer norm, learned positions, biases everywhere, [in, out] weights, tied head."""

from __future__ import annotations

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.decoder import Family
from pawl_workers.model.spec import LayerSpec, ModelSpec, NormKind, TensorTarget

__all__ = ["FAMILIES"]


def _spec(config: ConfigReader) -> ModelSpec:
    hidden_size, num_heads = config.integer("n_embd"), config.integer("n_head")
    config.refuse("scale_attn_by_inverse_layer_idx")
    if not config.flag("scale_attn_weights", True):
        raise config.error(
            "scale_attn_weights", "= false is not supported, and as true gives wrong logits; choose another checkpoint"
        )
    return ModelSpec(
        architecture="GPT2LMHeadModel",
        layers=(LayerSpec(rotary=None),) * config.parts("n_layer"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=config.integer("n_inner", 4 * hidden_size),
        vocab_size=config.integer("vocab_size"),
        max_context=config.integer("n_positions", 1024),
        norm=NormKind.LAYER,
        norm_epsilon=config.positive("layer_norm_epsilon", 1e-5),
        activation=config.activation("activation_function", "gelu_new"),
        gated_mlp=False,
        rotaries=(),
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def _names(model: ModelSpec) -> dict[str, TensorTarget]:
    found = {
        "transformer.wte.weight": TensorTarget("embedding"),
        "transformer.wpe.weight": TensorTarget("positions"),
        "transformer.ln_f.weight": TensorTarget("final_norm.weight"),
        "transformer.ln_f.bias": TensorTarget("final_norm.bias"),
    }
    if not model.tied_head:
        found["lm_head.weight"] = TensorTarget("head.weight")
    for i in range(model.num_layers):
        source, layer = f"transformer.h.{i}.", f"layers.{i}."
        for name, slot in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            found[f"{source}{name}.weight"] = TensorTarget(f"{layer}{slot}.weight")
            found[f"{source}{name}.bias"] = TensorTarget(f"{layer}{slot}.bias")
        for name, slot in (
            ("attn.c_attn", "qkv"),
            ("attn.c_proj", "attention_output"),
            ("mlp.c_fc", "up"),
            ("mlp.c_proj", "down"),
        ):
            found[f"{source}{name}.weight"] = TensorTarget(f"{layer}{slot}.weight", transposed=True)
            found[f"{source}{name}.bias"] = TensorTarget(f"{layer}{slot}.bias")
    return found


FAMILIES = {
    "GPT2LMHeadModel": Family(
        _spec,
        _names,
        prefix="transformer.",  # the first checkpoints on the hub were saved without it
        ignored=(".attn.bias", ".attn.masked_bias"),  # causal masks
    )
}
