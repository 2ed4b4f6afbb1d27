"""Tiny random checkpoints of every model family, drawn by hypothesis and written by transformers.

`FAMILIES` names, for each variant, the transformers configuration and model and what is drawn of it: heads, groups,
widths, windows, rope variants, biases, tied or not, and the type that the weights are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from transformers import PreTrainedModel

from tests.fakes.checkpoints import load_reference

__all__ = ["FAMILIES", "MAX_POSITIONS", "Draft", "write_checkpoint"]

MAX_POSITIONS = 192
_MOST_WIDE_HEADS = 4
_LEAST_WIDTH = 16  # of the stream: a norm over fewer values magnifies rounding beyond what is measured here
_FUSED = st.sampled_from([16, 32, 48, 64])  # widths of an MLP whose gates the cpu kernels fuse
_INNER = st.integers(5, 70) | _FUSED
# Where a norm follows the MLP: what few values give may be small all over, and the norm magnifies its rounding.
# With 5 of them transformers lies up to 1.2e-4 from what it computes in float64, and with 16 up to 2e-5.
_NORMED_INNER = st.integers(16, 70) | _FUSED
Values = dict[str, object]


@dataclass(frozen=True, slots=True)
class Draft:
    """One drawn checkpoint.

    Attributes:
        architecture: name of the model class.
        config_class: name of its configuration class.
        values: arguments of the configuration.
        dtype: what the weights are stored as.
        seed: of the weights.
    """

    architecture: str
    config_class: str
    values: Values
    dtype: torch.dtype
    seed: int

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        text = self.values.get("text_config", self.values)
        assert isinstance(text, dict)
        return int(text["vocab_size"])


def write_checkpoint(folder: Path, draft: Draft) -> PreTrainedModel:
    """Write a checkpoint with transformers, and return the model that transformers reads back, in float32.

    Weights are scaled so that scores of keys differ by a few units and logits by several: what is flat hides mistakes.
    Layers keep the size of what goes through them: where each magnifies it by half, it magnifies rounding as well, and
    transformers lies up to 1.6e-4 from what it computes in float64.
    """
    config = getattr(transformers, draft.config_class)(**draft.values)
    model = getattr(transformers, draft.architecture)(config)
    generator = torch.Generator().manual_seed(draft.seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            spread = _spread(name, parameter, is_transposed=_is_transposed(name, draft.architecture))
            parameter.copy_(noise * spread + _mean(name, draft.architecture))
    model.to(draft.dtype).save_pretrained(folder)
    return load_reference(folder)


def _is_norm(name: str) -> bool:
    return any(part in name for part in ("norm", "ln_"))


def _mean(name: str, architecture: str) -> float:
    """Norms lie around 1; Gemma stores their distance from it."""
    return 1.0 if _is_norm(name) and name.endswith("weight") and not architecture.startswith("Gemma") else 0.0


def _is_transposed(name: str, architecture: str) -> bool:
    return architecture.startswith("GPT2") and any(part in name for part in ("c_attn", "c_proj", "c_fc"))


def _spread(name: str, parameter: torch.Tensor, *, is_transposed: bool) -> float:
    if _is_norm(name) or name.endswith("bias"):
        return 0.3
    if "wpe" in name:
        return 0.5
    if any(part in name for part in ("embed_tokens", "embed_in", "wte", "lm_head", "embed_out")):
        return 2.0 / math.sqrt(parameter.shape[1])
    inputs = parameter.shape[0] if is_transposed else parameter.shape[-1]
    return 1.0 / math.sqrt(inputs)


def _even(draw: DrawFn, low: int, high: int) -> int:
    return 2 * draw(st.integers(-(-low // 2), high // 2))


@st.composite
def _common(draw: DrawFn, *, free_head_dim: bool | None = True, grouped: bool = True) -> Values:
    """What all decoders share. Head dimensions are even, since all of it turns.

    `free_head_dim`: the configuration names it, and it need not fit the hidden size; None = it may or may not.
    """
    num_kv_heads = draw(st.integers(1, 3)) if grouped else 1
    num_heads = num_kv_heads * draw(st.integers(1, 4) | st.just(8))
    free_head_dim = draw(st.booleans()) if free_head_dim is None else free_head_dim
    head_dim = _even(draw, -(-_LEAST_WIDTH // num_heads) if not free_head_dim else 4, 26)
    if num_heads <= _MOST_WIDE_HEADS and draw(st.booleans()):
        head_dim = draw(st.sampled_from([32, 40, 64, 80, 128] if free_head_dim else [32, 40]))
    values: Values = {
        "vocab_size": draw(st.integers(60, 300)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads if grouped else num_heads,
        "intermediate_size": draw(_INNER),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if free_head_dim:
        least = -(-_LEAST_WIDTH // num_heads)
        values |= {"hidden_size": num_heads * draw(st.integers(least, least + 10)), "head_dim": head_dim}
    else:
        values |= {"hidden_size": num_heads * head_dim}
    return values


_WINDOWS = st.sampled_from([1, 2, 7, 16, 31, 33, 64])
_EPSILONS = st.sampled_from([1e-6, 1e-5, 1e-3])
_THETAS = st.sampled_from([100.0, 10000.0, 500000.0])


@st.composite
def _rope(draw: DrawFn, kinds: tuple[str, ...], *, of_one_kind_of_layer: bool = False) -> Values:
    """`of_one_kind_of_layer`: a section of its own; transformers 5.23 looks for `truncate` beside the sections."""
    kind = draw(st.sampled_from(kinds))
    rope: Values = {"rope_type": kind, "rope_theta": draw(_THETAS)}
    match kind:
        case "linear" | "dynamic":
            rope["factor"] = draw(st.sampled_from([2.0, 4.0]))
        case "llama3":
            rope |= {
                "factor": draw(st.sampled_from([2.0, 8.0, 32.0])),
                "low_freq_factor": 1.0,
                "high_freq_factor": draw(st.sampled_from([2.0, 4.0])),
                "original_max_position_embeddings": draw(st.sampled_from([24, 64])),
            }
        case "yarn":
            rope |= {"factor": 4.0, "original_max_position_embeddings": MAX_POSITIONS // 4}
            for key, found in (
                ("beta_fast", st.sampled_from([4.0, 32.0])),
                ("beta_slow", st.sampled_from([0.5, 1.0])),
                ("attention_factor", st.sampled_from([0.7, 1.2])),
                ("truncate", st.booleans()),
            ):
                if draw(st.booleans()) and not (of_one_kind_of_layer and key == "truncate"):
                    rope[key] = draw(found)
            if draw(st.booleans()):
                rope |= {"mscale": 0.8, "mscale_all_dim": 1.3}
        case _:
            pass
    return rope


@st.composite
def _llama(draw: DrawFn, kind: str) -> Values:
    return draw(_common()) | {
        "rms_norm_eps": draw(_EPSILONS),
        "rope_parameters": draw(_rope((kind,))),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])),
    }


@st.composite
def _mistral(draw: DrawFn) -> Values:
    return draw(_common()) | {
        "sliding_window": draw(st.none() | _WINDOWS),
        "rope_parameters": draw(_rope(("default", "linear", "llama3", "yarn"))),
    }


@st.composite
def _mixtral(draw: DrawFn) -> Values:
    num_experts = draw(st.integers(2, 7))
    return draw(_mistral()) | {
        "num_local_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, min(3, num_experts))),
    }


@st.composite
def _qwen2(draw: DrawFn) -> Values:
    values = draw(_common(free_head_dim=None)) | {"rope_parameters": draw(_rope(("default", "yarn")))}
    return values | draw(_upper_windows())


@st.composite
def _upper_windows(draw: DrawFn) -> Values:
    return {
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(_WINDOWS),
        "max_window_layers": draw(st.integers(0, 2)),
    }


@st.composite
def _qwen3(draw: DrawFn) -> Values:
    values = draw(_common()) | {"attention_bias": draw(st.booleans())}
    return values | draw(_upper_windows()) | {"rope_parameters": draw(_rope(("default", "yarn")))}


@st.composite
def _qwen3_moe(draw: DrawFn) -> Values:
    num_experts = draw(st.integers(2, 9))
    values = draw(_qwen3())
    del values["max_window_layers"]
    return values | {
        "num_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, min(4, num_experts))),
        "moe_intermediate_size": draw(st.integers(3, 40) | st.sampled_from([16, 32])),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.integers(1, 2)),
        "mlp_only_layers": draw(st.lists(st.integers(0, 2), max_size=1)),
    }


@st.composite
def _qwen2_moe(draw: DrawFn) -> Values:
    """An expert that all share beside those that are chosen."""
    num_experts = draw(st.integers(2, 7))
    return draw(_qwen2()) | {
        "num_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, min(4, num_experts))),
        "moe_intermediate_size": draw(st.integers(3, 40) | st.sampled_from([16, 32])),
        "shared_expert_intermediate_size": draw(_INNER),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.integers(1, 2)),
        "mlp_only_layers": draw(st.lists(st.integers(0, 2), max_size=1)),
        "qkv_bias": draw(st.booleans()),
    }


@st.composite
def _gemma(draw: DrawFn) -> Values:
    return draw(_common()) | {
        "rms_norm_eps": draw(_EPSILONS),
        "attention_bias": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["gelu_pytorch_tanh", "gelu", "silu"])),
        "rope_parameters": draw(_rope(("default",))),
    }


@st.composite
def _gemma2(draw: DrawFn) -> Values:
    return draw(_common()) | {
        "intermediate_size": draw(_NORMED_INNER),
        "rms_norm_eps": draw(_EPSILONS),
        "attention_bias": draw(st.booleans()),
        "hidden_activation": draw(st.sampled_from(["gelu_pytorch_tanh", "gelu", "silu"])),
        "query_pre_attn_scalar": draw(st.integers(4, 40)),
        "sliding_window": draw(_WINDOWS),
        "attn_logit_softcapping": draw(st.sampled_from([None, 2.0, 50.0])),
        "final_logit_softcapping": draw(st.sampled_from([None, 5.0, 30.0])),
        "rope_parameters": draw(_rope(("default",))),
    }


@st.composite
def _gemma3(draw: DrawFn) -> Values:
    values = draw(_gemma2()) | {
        "num_hidden_layers": draw(st.integers(2, 4)),
        "rope_parameters": {
            "full_attention": draw(_rope(("default", "linear"))),
            "sliding_attention": draw(_rope(("default",))),
        },
    }
    return values | {"sliding_window_pattern": draw(st.integers(2, 3))}


@st.composite
def _gemma3_with_vision(draw: DrawFn) -> Values:
    """A text part between the parts that see, which take no part."""
    vision: Values = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "text_config": draw(_gemma3()) | {"tie_word_embeddings": True},
        "vision_config": vision | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    }


@st.composite
def _phi3(draw: DrawFn, *, long: bool) -> Values:
    values = draw(_common(free_head_dim=False)) | {"sliding_window": draw(st.none() | _WINDOWS)}
    values |= {"original_max_position_embeddings": 48}
    share = draw(st.sampled_from([0.25, 0.5, 0.75, 1.0]))
    head_dim = 8 * draw(st.integers(2, 3))  # every share of it is even
    heads = values["num_attention_heads"]
    assert isinstance(heads, int)
    rope: Values = {"rope_type": "default", "rope_theta": draw(_THETAS), "partial_rotary_factor": share}
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
def _gpt2(draw: DrawFn) -> Values:
    num_heads = draw(st.integers(1, 4))
    return {
        "vocab_size": draw(st.integers(60, 300)),
        "n_embd": num_heads * draw(st.integers(-(-_LEAST_WIDTH // num_heads), 19)),  # odd head dimensions, too
        "n_head": num_heads,
        "n_layer": draw(st.integers(1, 3)),
        "n_inner": draw(st.none() | _INNER),
        "n_positions": MAX_POSITIONS,
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu", "gelu_pytorch_tanh"])),
        "layer_norm_epsilon": draw(_EPSILONS),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": None,
        "eos_token_id": None,
    }


@st.composite
def _gpt_neox(draw: DrawFn, *, parallel: bool) -> Values:
    values = draw(_common(free_head_dim=False, grouped=False))
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
        "layer_norm_eps": draw(_EPSILONS),
    }


@st.composite
def _olmo2(draw: DrawFn) -> Values:
    values = draw(_common(free_head_dim=None)) | {"intermediate_size": draw(_NORMED_INNER)}
    return values | {"attention_bias": draw(st.booleans()), "rope_parameters": draw(_rope(("default", "yarn")))}


@st.composite
def _olmo3(draw: DrawFn) -> Values:
    """Windows in all layers but every fourth, or where the configuration says so."""
    values = draw(_common(free_head_dim=None)) | {"num_hidden_layers": draw(st.integers(2, 5))}
    if draw(st.booleans()):
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        num_layers = draw(st.integers(2, 4))
        layer_types = draw(st.lists(kinds, min_size=num_layers, max_size=num_layers))
        values |= {"num_hidden_layers": num_layers, "layer_types": layer_types}
    return values | {
        "intermediate_size": draw(_NORMED_INNER),
        "attention_bias": draw(st.booleans()),
        "sliding_window": draw(_WINDOWS),
        "rope_parameters": {
            "full_attention": draw(_rope(("default", "linear", "llama3", "yarn"), of_one_kind_of_layer=True)),
            "sliding_attention": draw(_rope(("default",))),
        },
    }


@st.composite
def _granite(draw: DrawFn) -> Values:
    values = draw(_common(free_head_dim=None))
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
        "rope_parameters": draw(_rope(("default", "llama3"))),
    }


@st.composite
def _starcoder2(draw: DrawFn) -> Values:
    return draw(_common(free_head_dim=None)) | {
        "sliding_window": draw(st.none() | _WINDOWS),
        "use_bias": draw(st.booleans()),
        "norm_epsilon": draw(_EPSILONS),
        "hidden_act": draw(st.sampled_from(["gelu_pytorch_tanh", "gelu", "relu"])),
        "rope_parameters": draw(_rope(("default", "yarn"))),
    }


@st.composite
def _partly_turned(draw: DrawFn, *, free_head_dim: bool = False) -> Values:
    """Heads of which a share turns."""
    values = draw(_common(free_head_dim=free_head_dim))
    heads = values["num_attention_heads"]
    assert isinstance(heads, int)
    head_dim, share = draw(st.sampled_from([(16, 0.25), (16, 0.5), (20, 0.4), (20, 0.5), (24, 0.75), (18, 1.0)]))
    width = heads * draw(st.integers(16, 24)) if free_head_dim else heads * head_dim
    rope: Values = {"rope_type": "default", "rope_theta": draw(_THETAS), "partial_rotary_factor": share}
    values |= {"hidden_size": width, "rope_parameters": rope}
    return values | {"head_dim": head_dim} if free_head_dim else values


@st.composite
def _phi(draw: DrawFn) -> Values:
    return draw(_partly_turned()) | {
        "layer_norm_eps": draw(_EPSILONS),
        "hidden_act": draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
    }


@st.composite
def _stablelm(draw: DrawFn, *, parallel: bool) -> Values:
    return draw(_partly_turned()) | {
        "layer_norm_eps": draw(_EPSILONS),
        "use_qkv_bias": draw(st.booleans()),
        "use_parallel_residual": parallel,
    }


@st.composite
def _cohere(draw: DrawFn) -> Values:
    return draw(_common(free_head_dim=None)) | draw(_cohere_flags())


@st.composite
def _cohere_flags(draw: DrawFn) -> Values:
    return {
        "attention_bias": draw(st.booleans()),
        "layer_norm_eps": draw(_EPSILONS),
        "logit_scale": draw(st.sampled_from([0.25, 0.7, 1.5])),
        "rope_parameters": draw(_rope(("default", "linear", "llama3"))),
    }


@st.composite
def _cohere2(draw: DrawFn) -> Values:
    """Only layers with a window turn."""
    values = draw(_common(free_head_dim=False)) | draw(_cohere_flags()) | {"num_hidden_layers": draw(st.integers(2, 4))}
    return values | {"sliding_window": draw(_WINDOWS), "sliding_window_pattern": draw(st.integers(2, 4))}


@st.composite
def _glm(draw: DrawFn) -> Values:
    return draw(_partly_turned(free_head_dim=True)) | {
        "intermediate_size": draw(_NORMED_INNER),
        "attention_bias": draw(st.booleans()),
        "rms_norm_eps": draw(_EPSILONS),
    }


@st.composite
def _mistral3(draw: DrawFn) -> Values:
    """A text part between the parts that see, which take no part."""
    vision: Values = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "text_config": draw(_mistral()) | {"model_type": "mistral"},
        "vision_config": vision | {"model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14},
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def _smollm3(draw: DrawFn) -> Values:
    values = draw(_common(free_head_dim=None)) | {
        "num_hidden_layers": draw(st.integers(2, 4)),
        "no_rope_layer_interval": draw(st.integers(2, 3)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "rope_parameters": draw(_rope(("default", "yarn"))),
        "use_sliding_window": draw(st.booleans()),
    }
    return values | {"sliding_window": draw(_WINDOWS) if values["use_sliding_window"] else None}


_TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def _family(architecture: str, config_class: str, values: SearchStrategy[Values]) -> SearchStrategy[Draft]:
    return st.builds(Draft, st.just(architecture), st.just(config_class), values, _TYPES, st.integers(0, 1 << 30))


FAMILIES: Mapping[str, SearchStrategy[Draft]] = {
    **{
        f"llama-{kind}": _family("LlamaForCausalLM", "LlamaConfig", _llama(kind))
        for kind in ("default", "linear", "dynamic", "llama3", "yarn")
    },
    "mistral": _family("MistralForCausalLM", "MistralConfig", _mistral()),
    "mixtral": _family("MixtralForCausalLM", "MixtralConfig", _mixtral()),
    "qwen2": _family("Qwen2ForCausalLM", "Qwen2Config", _qwen2()),
    "qwen3": _family("Qwen3ForCausalLM", "Qwen3Config", _qwen3()),
    "qwen2-moe": _family("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _qwen2_moe()),
    "qwen3-moe": _family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _qwen3_moe()),
    "gemma": _family("GemmaForCausalLM", "GemmaConfig", _gemma()),
    "gemma2": _family("Gemma2ForCausalLM", "Gemma2Config", _gemma2()),
    "gemma3": _family("Gemma3ForCausalLM", "Gemma3TextConfig", _gemma3()),
    "gemma3-vision": _family("Gemma3ForConditionalGeneration", "Gemma3Config", _gemma3_with_vision()),
    "phi3": _family("Phi3ForCausalLM", "Phi3Config", _phi3(long=False)),
    "phi3-longrope": _family("Phi3ForCausalLM", "Phi3Config", _phi3(long=True)),
    "gpt2": _family("GPT2LMHeadModel", "GPT2Config", _gpt2()),
    "gpt-neox-parallel": _family("GPTNeoXForCausalLM", "GPTNeoXConfig", _gpt_neox(parallel=True)),
    "gpt-neox-sequential": _family("GPTNeoXForCausalLM", "GPTNeoXConfig", _gpt_neox(parallel=False)),
    "olmo2": _family("Olmo2ForCausalLM", "Olmo2Config", _olmo2()),
    "olmo3": _family("Olmo3ForCausalLM", "Olmo3Config", _olmo3()),
    "granite": _family("GraniteForCausalLM", "GraniteConfig", _granite()),
    "starcoder2": _family("Starcoder2ForCausalLM", "Starcoder2Config", _starcoder2()),
    "phi": _family("PhiForCausalLM", "PhiConfig", _phi()),
    "stablelm": _family("StableLmForCausalLM", "StableLmConfig", _stablelm(parallel=False)),
    "stablelm-parallel": _family("StableLmForCausalLM", "StableLmConfig", _stablelm(parallel=True)),
    "cohere": _family("CohereForCausalLM", "CohereConfig", _cohere()),
    "cohere2": _family("Cohere2ForCausalLM", "Cohere2Config", _cohere2()),
    "glm": _family("GlmForCausalLM", "GlmConfig", _glm()),
    "glm4": _family("Glm4ForCausalLM", "Glm4Config", _glm()),
    "mistral3-vision": _family("Mistral3ForConditionalGeneration", "Mistral3Config", _mistral3()),
    "smollm3": _family("SmolLM3ForCausalLM", "SmolLM3Config", _smollm3()),
}
"""Variants by name: each draws a checkpoint."""
