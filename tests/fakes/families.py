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
from hypothesis.strategies import SearchStrategy
from transformers import PreTrainedModel

from tests.fakes import drawn_configs
from tests.fakes.checkpoints import load_reference
from tests.fakes.drawn_values import MAX_POSITIONS, Values

__all__ = ["ARCHITECTURES", "FAMILIES", "MAX_POSITIONS", "Draft", "write_checkpoint"]


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


_TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


_VARIANTS: Mapping[str, tuple[str, str, SearchStrategy[Values]]] = {
    **{
        f"llama-{kind}": ("LlamaForCausalLM", "LlamaConfig", drawn_configs.llama(kind))
        for kind in ("default", "linear", "dynamic", "llama3", "yarn")
    },
    "mistral": ("MistralForCausalLM", "MistralConfig", drawn_configs.mistral()),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", drawn_configs.mixtral()),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", drawn_configs.qwen2()),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", drawn_configs.qwen3()),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", drawn_configs.qwen2_moe()),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", drawn_configs.qwen3_moe()),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", drawn_configs.gemma()),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", drawn_configs.gemma2()),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", drawn_configs.gemma3()),
    "gemma3-vision": ("Gemma3ForConditionalGeneration", "Gemma3Config", drawn_configs.gemma3_with_vision()),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", drawn_configs.phi3(long=False)),
    "phi3-longrope": ("Phi3ForCausalLM", "Phi3Config", drawn_configs.phi3(long=True)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", drawn_configs.gpt2()),
    "gpt-neox-parallel": ("GPTNeoXForCausalLM", "GPTNeoXConfig", drawn_configs.gpt_neox(parallel=True)),
    "gpt-neox-sequential": ("GPTNeoXForCausalLM", "GPTNeoXConfig", drawn_configs.gpt_neox(parallel=False)),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", drawn_configs.olmo2()),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", drawn_configs.olmo3()),
    "granite": ("GraniteForCausalLM", "GraniteConfig", drawn_configs.granite()),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", drawn_configs.starcoder2()),
    "phi": ("PhiForCausalLM", "PhiConfig", drawn_configs.phi()),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", drawn_configs.stablelm(parallel=False)),
    "stablelm-parallel": ("StableLmForCausalLM", "StableLmConfig", drawn_configs.stablelm(parallel=True)),
    "cohere": ("CohereForCausalLM", "CohereConfig", drawn_configs.cohere()),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", drawn_configs.cohere2()),
    "glm": ("GlmForCausalLM", "GlmConfig", drawn_configs.glm()),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", drawn_configs.glm()),
    "mistral3-vision": ("Mistral3ForConditionalGeneration", "Mistral3Config", drawn_configs.mistral3()),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", drawn_configs.smollm3()),
}

FAMILIES: Mapping[str, SearchStrategy[Draft]] = {
    name: st.builds(Draft, st.just(architecture), st.just(config_class), values, _TYPES, st.integers(0, 1 << 30))
    for name, (architecture, config_class, values) in _VARIANTS.items()
}
"""Variants by name: each draws a checkpoint."""

ARCHITECTURES = frozenset(architecture for architecture, _, _ in _VARIANTS.values())
"""What the variants are of."""
