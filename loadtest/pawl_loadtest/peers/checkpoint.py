"""Checkpoints of a named shape with random weights, in Hugging Face format, with a tokenizer.

Never zeros: processors multiply zeros faster. Norms are not left at 1 either, so that an engine that forgot one
would not agree with the reference.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pawl_loadtest.peers.shapes import Shape

__all__ = ["WEIGHTS", "make_checkpoint"]

WEIGHTS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""What the weights are exact in: bfloat16 as published checkpoints are, or float32, which nothing shorter holds."""

_END = "<|endoftext|>"
_SPREAD = 0.02  # of the matrices, as these models are initialised
_NORM_SPREAD = 0.1


def make_checkpoint(shape: Shape, folder: Path, *, weights: str = "bfloat16", seed: int = 0) -> Path:
    """Write one, or find it written.

    Args:
        shape: the sizes.
        folder: where checkpoints lie; this one gets a folder in it, named after the arguments.
        weights: a key of `WEIGHTS`.
        seed: of the weights.

    Returns:
        Its folder.
    """
    path = folder / f"{shape.name}-{weights}-{seed}"
    if (path / "tokenizer.json").is_file():
        return path
    generator = torch.Generator().manual_seed(seed)
    model = _architecture(shape)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + _NORM_SPREAD * noise if "norm" in name else _SPREAD * noise)
    model.to(WEIGHTS[weights]).save_pretrained(path)
    _write_tokenizer(shape, path)
    return path


def _architecture(shape: Shape) -> PreTrainedModel:
    values: dict[str, object] = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_context,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta} | dict(shape.rope_scaling),
        "bos_token_id": None,
        "eos_token_id": shape.vocab_size - 1,
        "pad_token_id": None,
    }
    config: PretrainedConfig = (Qwen3Config if shape.kind == "qwen3" else LlamaConfig)(**values)
    made: PreTrainedModel = (Qwen3ForCausalLM if shape.kind == "qwen3" else LlamaForCausalLM)(config)
    return made


def _write_tokenizer(shape: Shape, path: Path) -> None:
    """Bytes first, then words that no text is cut into, so that every id of the vocabulary has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"Ġ{number}" for number in range(len(alphabet), shape.vocab_size - 1))]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_END, special=True)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, model_max_length=shape.max_context
    ).save_pretrained(path)
