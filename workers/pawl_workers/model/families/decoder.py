"""What most families share: the configuration keys and tensor names that Llama made common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families.rope import read_rotary
from pawl_workers.model.spec import Interleaved, LayerSpec, ModelSpec, TensorTarget

__all__ = [
    "NORMS",
    "Family",
    "add_linear",
    "decoder_names",
    "decoder_spec",
    "layer_windows",
]


@dataclass(frozen=True, slots=True)
class Family:
    """How the checkpoints of one architecture are read.

    `names` maps every tensor that must be there to its target; `ignored` are name endings that may be there
    and carry no weights; `prefix` is put before names that lack it; `other_parts` are name beginnings of parts that
    do not make text.
    """

    spec: Callable[[ConfigReader], ModelSpec]
    names: Callable[[ModelSpec], Mapping[str, TensorTarget]]
    prefix: str = ""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    other_parts: tuple[str, ...] = ()


NORMS: Mapping[str, str] = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
"""The norms of a block, by their names in a checkpoint."""


def decoder_spec(
    config: ConfigReader,
    architecture: str,
    *,
    theta: float = 10000.0,
    head_dim: int | None = None,
    tied: bool = False,
    epsilon: float = 1e-6,
    activation_key: str = "hidden_act",
    activation: str = "silu",
) -> ModelSpec:
    """Read what most configurations hold (transformers 4 and 5 spellings).

    Args:
        config: the configuration.
        architecture: its name.
        theta: the family's default base of the rotary frequencies.
        head_dim: the family's default, where it is not hidden size over heads.
        tied: whether the head is the embedding by default.
        epsilon: of the norms by default.
        activation_key: where the activation's name stands.
        activation: the family's default.
    """
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", head_dim or max(1, hidden_size // num_heads))
    max_context = config.integer("max_position_embeddings", 2048)
    attention_bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    rotary = read_rotary(config, head_dim, max_context, theta)
    if rotary.kind == "yarn":  # a configuration may keep the length before it was stretched
        max_context = max(max_context, int(rotary.original_max_position * rotary.factor))
    return ModelSpec(
        architecture=architecture,
        layers=(LayerSpec(),) * config.parts("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_context=max_context,
        norm_epsilon=config.positive("rms_norm_eps", epsilon),
        activation=config.activation(activation_key, activation),
        rotaries=(rotary,),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=mlp_bias,
        tied_head=config.flag("tie_word_embeddings", tied),
    )


def layer_windows(
    config: ConfigReader, num_layers: int, window: int | None, slides: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Give each layer its window: where `layer_types` says so, else where `slides(layer)` does."""
    kinds = config.texts("layer_types")
    if not kinds:
        return tuple(window if slides(layer) else None for layer in range(num_layers))
    if len(kinds) != num_layers:
        raise config.error("layer_types", f"has {len(kinds)} entries for {num_layers} layers")
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise config.error(
            "layer_types", f"of {', '.join(unknown)} are not supported; known: full_attention, sliding_attention"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def add_linear(
    found: dict[str, TensorTarget],
    source: str,
    slot: str,
    *,
    bias: bool,
    row: int = 0,
    num_rows: int = 0,
    interleaved: Interleaved | None = None,
) -> None:
    """Map a linear layer's weight and, if it has one, its bias."""
    for part in ("weight", "bias") if bias else ("weight",):
        found[f"{source}.{part}"] = TensorTarget(f"{slot}.{part}", row, num_rows, interleaved=interleaved)


def decoder_names(
    model: ModelSpec,
    *,
    norms: Mapping[str, str] = NORMS,
    norm_added: float = 0.0,
    norm_bias: bool = False,
    final_norm: str = "norm",
    merged_qkv: bool = False,
    interleaved: bool = False,
    attention_output: str = "o_proj",
    mlp_parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
    router: str = "mlp.gate",
    expert: str = "mlp.experts.{}.",
    expert_parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> dict[str, TensorTarget]:
    """Map tensor names to slots.

    Args:
        model: the spec.
        norms: the norms of a block, by their names in a checkpoint.
        norm_added: what is added to every norm's weight.
        norm_bias: whether the norms of blocks and the last have biases.
        final_norm: the norm after the last block.
        merged_qkv: whether queries, keys and values are stored merged.
        interleaved: whether the pairs of dimensions that turn lie side by side.
        attention_output: the projection after attention.
        mlp_parts: gate, up and down; or up, merged with the gate where there is one, and down.
        router: of a routed layer.
        expert: name of an expert, with a place for its number.
        expert_parts: as `mlp_parts`, of an expert.
    """
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    pairs = Interleaved(model.head_dim, model.rotaries[0].rotary_dim) if interleaved else None
    found = {"model.embed_tokens.weight": TensorTarget("embedding")}
    _add_norm(found, f"model.{final_norm}", "final_norm", norm_added, bias=norm_bias)
    if not model.tied_head:
        found["lm_head.weight"] = TensorTarget("head.weight")
    if model.head_bias:
        found["lm_head.bias"] = TensorTarget("head.bias")
    for i, layer in enumerate(model.layers):
        source, slot = f"model.layers.{i}.", f"layers.{i}."
        for name, norm in norms.items():
            _add_norm(found, source + name, slot + norm, norm_added, bias=norm_bias)
        if model.query_key_norm is not None:
            for part in ("q_norm", "k_norm"):
                _add_norm(found, f"{source}self_attn.{part}", slot + part, norm_added, bias=False)
        if merged_qkv:
            add_linear(found, f"{source}self_attn.qkv_proj", f"{slot}qkv", bias=model.qkv_bias)
        else:
            for part, row, rows in (("q", 0, queries), ("k", queries, keys), ("v", queries + keys, keys)):
                name, turned = f"{source}self_attn.{part}_proj", None if part == "v" else pairs
                add_linear(found, name, f"{slot}qkv", bias=model.qkv_bias, row=row, num_rows=rows, interleaved=turned)
        name, output_bias = f"{source}self_attn.{attention_output}", model.attention_output_bias
        add_linear(found, name, f"{slot}attention_output", bias=output_bias)
        if layer.routed and model.experts is not None:
            add_linear(found, source + router, f"{slot}router", bias=False)
            for e in range(model.experts.num_experts):
                parts = tuple(source + expert.format(e) + part for part in expert_parts)
                _add_mlp(found, parts, f"{slot}experts.{e}.", model.experts.intermediate_size, bias=False)
            if model.experts.shared_size:
                parts = tuple(f"{source}mlp.shared_expert.{part}" for part in expert_parts)
                _add_mlp(found, parts, f"{slot}shared.", model.experts.shared_size, bias=False)
                add_linear(found, f"{source}mlp.shared_expert_gate", f"{slot}shared_gate", bias=False)
        else:
            parts = tuple(f"{source}mlp.{part}" for part in mlp_parts)
            _add_mlp(found, parts, slot, model.intermediate_size, bias=model.mlp_bias)
    return found


def _add_norm(found: dict[str, TensorTarget], source: str, slot: str, added: float, *, bias: bool) -> None:
    found[f"{source}.weight"] = TensorTarget(f"{slot}.weight", added=added)
    if bias:
        found[f"{source}.bias"] = TensorTarget(f"{slot}.bias")


def _add_mlp(found: dict[str, TensorTarget], parts: tuple[str, ...], at: str, inner: int, *, bias: bool) -> None:
    *gates, up, down = parts
    for gate in gates:
        add_linear(found, gate, f"{at}up", bias=bias, num_rows=inner)
    if gates:
        add_linear(found, up, f"{at}up", bias=bias, row=inner, num_rows=inner)
    else:
        add_linear(found, up, f"{at}up", bias=bias)
    add_linear(found, down, f"{at}down", bias=bias)
