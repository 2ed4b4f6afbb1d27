"""Tiny random checkpoints in Hugging Face format, made on the fly with transformers, for tests without a network.

`make_llama` and `make_gpt2` write a folder that `Worker.load` and `transformers` both read; `NAMED` lists the
variants that parity tests walk through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

__all__ = ["NAMED", "add_tokenizer", "load_reference", "make_gpt2", "make_llama", "make_qwen3_moe"]

VOCAB_SIZE = 257  # every byte and an end-of-text token, as the tiny tokenizer has it
EOS_TOKEN_ID = 256

_LLAMA: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": None,
}


def make_llama(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: bool = False,
    **changes: object,
) -> Path:
    """Write a tiny random Llama: 2 layers, hidden 48, 4 query and 2 KV heads of 16, untied.

    Args:
        folder: where; made if absent.
        seed: of the weights.
        dtype: the type the weights are stored in.
        max_shard_size: such as "20KB", to get several files and an index.
        tokenizer: also write a byte tokenizer.
        changes: of `LlamaConfig`, such as `tie_word_embeddings` or `rope_parameters`.

    Returns:
        The folder.
    """
    return _write(
        folder, LlamaForCausalLM, LlamaConfig(**{**_LLAMA, **changes}), seed, dtype, max_shard_size, tokenizer
    )


def make_gpt2(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: bool = False,
    **changes: object,
) -> Path:
    """Write a tiny random GPT-2: 2 layers, hidden 48, 3 heads of 16, tied. Arguments as for `make_llama`."""
    values: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 1024,
        "bos_token_id": EOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
    }
    return _write(folder, GPT2LMHeadModel, GPT2Config(**(values | changes)), seed, dtype, max_shard_size, tokenizer)


def make_qwen3_moe(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Write a tiny random Qwen3-MoE: as `make_llama`, and 6 experts of 40, of which 3 compute a token."""
    experts: dict[str, object] = {
        "moe_intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    }
    return _write(
        folder, Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**_LLAMA, **experts, **changes}), seed, dtype, "5GB", False
    )


def _write(
    folder: Path,
    architecture: type[PreTrainedModel],
    config: object,
    seed: int,
    dtype: torch.dtype,
    max_shard_size: str,
    tokenizer: bool,
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    model = architecture(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            # Larger than the usual initialisation, so that attention is not flat and logits are apart;
            # norms and biases are not left at 1 and 0, where mistakes would not show.
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or "ln_" in name
            parameter.copy_(1.0 + 0.2 * noise if is_norm and name.endswith("weight") else 0.2 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """Write a byte-level `tokenizer.json` of 256 bytes and `<|endoftext|>` (id 256) into a folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 1024}\n'
    )


def load_reference(folder: Path) -> PreTrainedModel:
    """Load a checkpoint with transformers in float32, in evaluation mode."""
    architecture: type[PreTrainedModel] = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    model = architecture.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


_LLAMA3_ROPE: Mapping[str, object] = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

NAMED: Mapping[str, Callable[[Path], Path]] = {
    "llama-gqa": make_llama,
    "llama-tied": lambda folder: make_llama(folder, tie_word_embeddings=True),
    "llama-mha": lambda folder: make_llama(folder, num_key_value_heads=4, head_dim=12),
    "llama-one-kv-head": lambda folder: make_llama(folder, num_attention_heads=3, num_key_value_heads=1, head_dim=20),
    "llama-biases": lambda folder: make_llama(folder, attention_bias=True, mlp_bias=True),
    "llama-rope-llama3": lambda folder: make_llama(folder, rope_parameters=dict(_LLAMA3_ROPE)),
    "llama-rope-linear": lambda folder: make_llama(
        folder, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "llama-rope-dynamic": lambda folder: make_llama(
        folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "llama-bf16-sharded": lambda folder: make_llama(folder, dtype=torch.bfloat16, max_shard_size="40KB"),
    "llama-fp16": lambda folder: make_llama(folder, dtype=torch.float16),
    "gpt2": make_gpt2,
    "gpt2-fp16-sharded": lambda folder: make_gpt2(folder, dtype=torch.float16, max_shard_size="60KB"),
    "gpt2-relu-inner": lambda folder: make_gpt2(folder, activation_function="relu", n_inner=80),
}
"""Checkpoints by name: each writes itself into a folder and returns it."""
