"""Writes a checkpoint in Hugging Face format as GGUF, with the tensors in one type. Needs numpy and gguf, not torch."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf.quants import quantize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def export(checkpoint: Path, data_type: str) -> Path:
    """Write `checkpoint` (a folder) with matrices in `f32`, `f16` or `q8_0`, or find it written.

    Returns:
        The file, beside the folder.
    """
    path = checkpoint.with_name(f"{checkpoint.name}-{data_type}.gguf")
    if path.is_file():
        return path
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    architecture = _ARCHITECTURES[config["architectures"][0]]
    kind, file_type = _TYPES[data_type]
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, architecture)
    _add_sizes(writer, config, file_type)
    for name, values in _tensors(checkpoint):
        if architecture == "llama":
            values = _interleave(name, values, config)  # noqa: PLW2901 (the same tensor, reordered)
        is_matrix = values.ndim == 2
        data = quantize(values, kind) if is_matrix else values
        writer.add_tensor(_renamed(name), data, raw_dtype=kind if is_matrix else None)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)
    return path


def _add_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any], file_type: int) -> None:
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")  # token ids in, token ids out


def _tensors(checkpoint: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor of every safetensors file, in fp32."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        data = np.memmap(path, mode="r", offset=8 + length)
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                yield name, _as_float32(data[start:stop], entry["dtype"]).reshape(entry["shape"])


def _as_float32(data: NDArray[np.uint8], data_type: str) -> NDArray[np.float32]:
    if data_type == "F32":
        return data.view(np.float32)
    if data_type == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"tensors of type {data_type} are not known; known: F32, BF16")


def _renamed(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{_IN_LAYER[part.removesuffix('.weight')]}.weight"


def _interleave(name: str, values: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Queries and keys in llama.cpp's order: the two numbers that are turned together stand side by side."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return values
    rows, columns = values.shape
    pairs = values.reshape(config[heads], 2, rows // config[heads] // 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """What each frequency is divided by, where the rotation is scaled as in Llama 3."""
    rope = config["rope_parameters"]
    if rope.get("rope_type", "default") == "default":
        return None
    if rope["rope_type"] != "llama3":
        raise ValueError(f"rope type {rope['rope_type']!r} is not known; known: default, llama3")
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, config["head_dim"], 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / config["head_dim"])
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)
