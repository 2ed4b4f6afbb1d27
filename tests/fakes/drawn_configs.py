"""One strategy per model family: the arguments of its transformers configuration, drawn over all that may differ."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from tests.fakes.drawn_values import (
    EPSILONS,
    FUSED,
    INNER,
    LEAST_WIDTH,
    MAX_POSITIONS,
    NORMED_INNER,
    THETAS,
    WINDOWS,
    Values,
    common,
    partly_turned,
    rotary,
)

__all__ = [
    "cohere",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_with_vision",
    "glm",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mistral3",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
]


@st.composite
def llama(draw: DrawFn, kind: str) -> Values:
    return draw(common()) | {
        "rms_norm_eps": draw(EPSILONS),
        "rope_parameters": draw(rotary((kind,))),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])),
    }


@st.composite
def mistral(draw: DrawFn) -> Values:
    return draw(common()) | {
        "sliding_window": draw(st.none() | WINDOWS),
        "rope_parameters": draw(rotary(("default", "linear", "llama3", "yarn"))),
    }


@st.composite
def mixtral(draw: DrawFn) -> Values:
    num_experts = draw(st.integers(2, 7))
    return draw(mistral()) | {
        "num_local_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, min(3, num_experts))),
    }


@st.composite
def qwen2(draw: DrawFn) -> Values:
    values = draw(common(free_head_dim=None)) | {"rope_parameters": draw(rotary(("default", "yarn")))}
    return values | draw(_upper_windows())


@st.composite
def _upper_windows(draw: DrawFn) -> Values:
    return {
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(WINDOWS),
        "max_window_layers": draw(st.integers(0, 2)),
    }


@st.composite
def qwen3(draw: DrawFn) -> Values:
    values = draw(common()) | {"attention_bias": draw(st.booleans())}
    return values | draw(_upper_windows()) | {"rope_parameters": draw(rotary(("default", "yarn")))}


@st.composite
def qwen3_moe(draw: DrawFn) -> Values:
    num_experts = draw(st.integers(2, 9))
    values = draw(qwen3())
    del values["max_window_layers"]
    return values | {
        "num_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, min(4, num_experts))),
        **draw(_expert_widths("intermediate_size", "moe_intermediate_size")),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.integers(1, 2)),
        "mlp_only_layers": draw(st.lists(st.integers(0, 2), max_size=1)),
    }


@st.composite
def _expert_widths(draw: DrawFn, *keys: str) -> Values:
    """Widths of MLPs; in half of the drafts the cpu kernels fuse the gates of all, and compile the layers."""
    width = FUSED if draw(st.booleans()) else st.integers(3, 70)
    return {key: draw(width) for key in keys}


@st.composite
def qwen2_moe(draw: DrawFn) -> Values:
    """An expert that all share beside those that are chosen."""
    num_experts = draw(st.integers(2, 7))
    return draw(qwen2()) | {
        "num_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, min(4, num_experts))),
        **draw(_expert_widths("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.integers(1, 2)),
        "mlp_only_layers": draw(st.lists(st.integers(0, 2), max_size=1)),
        "qkv_bias": draw(st.booleans()),
    }


@st.composite
def gemma(draw: DrawFn) -> Values:
    return draw(common()) | {
        "rms_norm_eps": draw(EPSILONS),
        "attention_bias": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["gelu_pytorch_tanh", "gelu", "silu"])),
        "rope_parameters": draw(rotary(("default",))),
    }


@st.composite
def gemma2(draw: DrawFn) -> Values:
    return draw(common()) | {
        "intermediate_size": draw(NORMED_INNER),
        "rms_norm_eps": draw(EPSILONS),
        "attention_bias": draw(st.booleans()),
        "hidden_activation": draw(st.sampled_from(["gelu_pytorch_tanh", "gelu", "silu"])),
        "query_pre_attn_scalar": draw(st.integers(4, 40)),
        "sliding_window": draw(WINDOWS),
        "attn_logit_softcapping": draw(st.sampled_from([None, 2.0, 50.0])),
        "final_logit_softcapping": draw(st.sampled_from([None, 5.0, 30.0])),
        "rope_parameters": draw(rotary(("default",))),
    }


@st.composite
def gemma3(draw: DrawFn) -> Values:
    values = draw(gemma2()) | {
        "num_hidden_layers": draw(st.integers(2, 4)),
        "rope_parameters": {
            "full_attention": draw(rotary(("default", "linear"))),
            "sliding_attention": draw(rotary(("default",))),
        },
    }
    return values | {"sliding_window_pattern": draw(st.integers(2, 3))}


@st.composite
def gemma3_with_vision(draw: DrawFn) -> Values:
    """A text part between the parts that see, which take no part."""
    vision: Values = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "text_config": draw(gemma3()) | {"tie_word_embeddings": True},
        "vision_config": vision | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    }


@st.composite
def phi3(draw: DrawFn, *, long: bool) -> Values:
    values = draw(common(free_head_dim=False)) | {"sliding_window": draw(st.none() | WINDOWS)}
    values |= {"original_max_position_embeddings": 48}
    share = draw(st.sampled_from([0.25, 0.5, 0.75, 1.0]))
    head_dim = 8 * draw(st.integers(2, 3))  # every share of it is even
    heads = values["num_attention_heads"]
    assert isinstance(heads, int)
    rope: Values = {"rope_type": "default", "rope_theta": draw(THETAS), "partial_rotary_factor": share}
    if long:
        pairs = int(head_dim * share) // 2
        factors = st.lists(st.floats(1.0, 6.0, width=16), min_size=pairs, max_size=pairs)
        rope |= {"rope_type": "longrope", "short_factor": draw(factors), "long_factor": draw(factors)}
    if not long and draw(st.booleans()):  # transformers checks long factors against hidden size over heads
        values |= {"head_dim": head_dim, "hidden_size": heads * draw(st.integers(16, 24))}
    else:
        values |= {"hidden_size": heads * head_dim}
    return values | {"rope_parameters": rope}


@st.composite
def gpt2(draw: DrawFn) -> Values:
    num_heads = draw(st.integers(1, 4))
    return {
        "vocab_size": draw(st.integers(60, 300)),
        "n_embd": num_heads * draw(st.integers(-(-LEAST_WIDTH // num_heads), 19)),  # odd head dimensions, too
        "n_head": num_heads,
        "n_layer": draw(st.integers(1, 3)),
        "n_inner": draw(st.none() | INNER),
        "n_positions": MAX_POSITIONS,
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu", "gelu_pytorch_tanh"])),
        "layer_norm_epsilon": draw(EPSILONS),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": None,
        "eos_token_id": None,
    }


@st.composite
def gpt_neox(draw: DrawFn, *, parallel: bool) -> Values:
    values = draw(common(free_head_dim=False, grouped=False))
    del values["num_key_value_heads"]
    heads = values["num_attention_heads"]
    assert isinstance(heads, int)
    head_dim, share = draw(st.sampled_from([(16, 0.25), (15, 0.4), (20, 0.5), (18, 1.0), (25, 0.8)]))
    return values | {
        "hidden_size": heads * head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share},
        "use_parallel_residual": parallel,
        "attention_bias": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
        "layer_norm_eps": draw(EPSILONS),
    }


@st.composite
def olmo2(draw: DrawFn) -> Values:
    values = draw(common(free_head_dim=None)) | {"intermediate_size": draw(NORMED_INNER)}
    return values | {"attention_bias": draw(st.booleans()), "rope_parameters": draw(rotary(("default", "yarn")))}


@st.composite
def olmo3(draw: DrawFn) -> Values:
    """Windows in all layers but every fourth, or where the configuration says so."""
    values = draw(common(free_head_dim=None)) | {"num_hidden_layers": draw(st.integers(2, 5))}
    if draw(st.booleans()):
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        num_layers = draw(st.integers(2, 4))
        layer_types = draw(st.lists(kinds, min_size=num_layers, max_size=num_layers))
        values |= {"num_hidden_layers": num_layers, "layer_types": layer_types}
    return values | {
        "intermediate_size": draw(NORMED_INNER),
        "attention_bias": draw(st.booleans()),
        "sliding_window": draw(WINDOWS),
        "rope_parameters": {
            "full_attention": draw(rotary(("default", "linear", "llama3", "yarn"), of_one_kind_of_layer=True)),
            "sliding_attention": draw(rotary(("default",))),
        },
    }


@st.composite
def granite(draw: DrawFn) -> Values:
    values = draw(common(free_head_dim=None))
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    assert isinstance(hidden, int)
    assert isinstance(heads, int)
    head_dim = values.get("head_dim", hidden // heads)
    assert isinstance(head_dim, int)
    return values | {
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "embedding_multiplier": draw(st.sampled_from([0.5, 1.0, 12.0])),
        "attention_multiplier": draw(st.sampled_from([0.25, 1.5, 3.0])) * head_dim**-0.5,
        "residual_multiplier": draw(st.sampled_from([0.22, 1.0])),
        "logits_scaling": draw(st.sampled_from([0.7, 2.0])),
        "rope_parameters": draw(rotary(("default", "llama3"))),
    }


@st.composite
def starcoder2(draw: DrawFn) -> Values:
    return draw(common(free_head_dim=None)) | {
        "sliding_window": draw(st.none() | WINDOWS),
        "use_bias": draw(st.booleans()),
        "norm_epsilon": draw(EPSILONS),
        "hidden_act": draw(st.sampled_from(["gelu_pytorch_tanh", "gelu", "relu"])),
        "rope_parameters": draw(rotary(("default", "yarn"))),
    }


@st.composite
def phi(draw: DrawFn) -> Values:
    return draw(partly_turned()) | {
        "layer_norm_eps": draw(EPSILONS),
        "hidden_act": draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
    }


@st.composite
def stablelm(draw: DrawFn, *, parallel: bool) -> Values:
    return draw(partly_turned()) | {
        "layer_norm_eps": draw(EPSILONS),
        "use_qkv_bias": draw(st.booleans()),
        "use_parallel_residual": parallel,
    }


@st.composite
def cohere(draw: DrawFn) -> Values:
    return draw(common(free_head_dim=None)) | draw(_cohere_flags())


@st.composite
def _cohere_flags(draw: DrawFn) -> Values:
    return {
        "attention_bias": draw(st.booleans()),
        "layer_norm_eps": draw(EPSILONS),
        "logit_scale": draw(st.sampled_from([0.25, 0.7, 1.5])),
        "rope_parameters": draw(rotary(("default", "linear", "llama3"))),
    }


@st.composite
def cohere2(draw: DrawFn) -> Values:
    """Only layers with a window turn."""
    values = draw(common(free_head_dim=False)) | draw(_cohere_flags()) | {"num_hidden_layers": draw(st.integers(2, 4))}
    return values | {"sliding_window": draw(WINDOWS), "sliding_window_pattern": draw(st.integers(2, 4))}


@st.composite
def glm(draw: DrawFn) -> Values:
    return draw(partly_turned(free_head_dim=True)) | {
        "intermediate_size": draw(NORMED_INNER),
        "attention_bias": draw(st.booleans()),
        "rms_norm_eps": draw(EPSILONS),
    }


@st.composite
def mistral3(draw: DrawFn) -> Values:
    """A text part between the parts that see, which take no part."""
    vision: Values = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "text_config": draw(mistral()) | {"model_type": "mistral"},
        "vision_config": vision | {"model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14},
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def smollm3(draw: DrawFn) -> Values:
    values = draw(common(free_head_dim=None)) | {
        "num_hidden_layers": draw(st.integers(2, 4)),
        "no_rope_layer_interval": draw(st.integers(2, 3)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "rope_parameters": draw(rotary(("default", "yarn"))),
        "use_sliding_window": draw(st.booleans()),
    }
    return values | {"sliding_window": draw(WINDOWS) if values["use_sliding_window"] else None}
