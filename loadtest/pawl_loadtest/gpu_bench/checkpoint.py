"""Checkpoints of billions of random weights, made on the GPU and written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pawl_loadtest.gpu_bench.shapes import RoutedShape
from pawl_loadtest.peers.shapes import Shape

__all__ = ["make_gpu_checkpoint"]

_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 4 << 30
_SPREAD, _NORM_SPREAD = 0.02, 0.1  # as `peers.checkpoint`


def make_gpu_checkpoint(shape: Shape, folder: Path, device: str = "cuda") -> Path:
    """Write a checkpoint of a shape in bf16 with random weights, never zeros, or find it; return its folder.

    Tied, but where layers are routed: few random layers, tied, repeat the token that they are given.
    """
    path = folder / shape.name
    if (path / _INDEX).is_file():
        return path
    path.mkdir(parents=True)
    config = AutoConfig.for_model(
        shape.kind,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_context,
        rms_norm_eps=shape.norm_epsilon,
        tie_word_embeddings=not isinstance(shape, RoutedShape),
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta} | dict(shape.rope_scaling),
        bos_token_id=None,
        eos_token_id=shape.vocab_size - 1,
        pad_token_id=None,
        **_routing(shape),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    generator = torch.Generator(device).manual_seed(0)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(shard, path / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in model.named_parameters():  # tied ones are named once
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        is_norm = "norm" in name
        values.normal_(1.0 if is_norm else 0.0, _NORM_SPREAD if is_norm else _SPREAD, generator=generator)
        shard |= {part: tensor.contiguous() for part, tensor in _parts(name, values.cpu())}
        if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
            write()
    if shard:
        write()
    index = {"metadata": {}, "weight_map": places}
    (path / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    return path


def _routing(shape: Shape) -> dict[str, int | bool]:
    if not isinstance(shape, RoutedShape):
        return {}
    return {
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_active,
        "moe_intermediate_size": shape.intermediate_size,
        "norm_topk_prob": True,
    }


def _parts(name: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a parameter of transformers is stored as: experts lie together in memory, and one by one in files."""
    layer, found, part = name.partition(".experts.")
    if not found:
        yield name, values
        return
    for number, expert in enumerate(values):
        kinds = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        for kind, tensor in zip(kinds, expert.chunk(len(kinds)), strict=True):
            yield f"{layer}.experts.{number}.{kind}.weight", tensor
