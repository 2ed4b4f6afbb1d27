"""What the benchmark of speculation generates: a model that follows a chain of tokens, and how requests sample."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pawl_loadtest.peers.shapes import Shape
from pawl_workers.plan import SamplingSpec

__all__ = ["CYCLE", "EOS_ID", "TASKS", "Task", "write_chain"]

CYCLE = 256
"""Tokens of the text that the chain repeats; the others are a chain that does not end."""

_MATCH = 20.0  # logit of the token that follows, where the others' are about 0
_APART = 10.0  # how much lower those are that are not of the text
_CONSTANT = 4.0  # first number of each embedding


@dataclass(frozen=True, slots=True)
class Task:
    """How a request samples, whether it begins in the text that repeats, and the schema that its output is to fit."""

    sampling: SamplingSpec
    repeats: bool = True
    schema: str = ""


EOS_ID = 2  # of the embedded tokenizer, whose ids are the first of every vocabulary here
_SCHEMA = json.dumps({
    "type": "array",
    "minItems": 40,
    "items": {
        "type": "object",
        "properties": {
            "given_name": {"type": "string", "minLength": 4, "maxLength": 8},
            "family_name": {"type": "string", "minLength": 4, "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "colour": {"enum": ["red", "green", "blue"]},
        },
        "required": ["given_name", "family_name", "age", "colour"],
        "additionalProperties": False,
    },
})  # fmt: skip

TASKS = {
    "copy": Task(SamplingSpec(temperature=0.0, logprobs=0)),
    "edit": Task(SamplingSpec(temperature=2.5, top_k=CYCLE, logprobs=0)),
    "misleading": Task(SamplingSpec(temperature=100.0, top_k=16, logprobs=0)),
    "fresh": Task(SamplingSpec(temperature=0.0, logprobs=0), repeats=False),
    "json": Task(SamplingSpec(temperature=100.0, logprobs=0), schema=_SCHEMA),
}


def write_chain(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of a shape that follows the chain; what its layers add is far too small to matter.

    Raises:
        ValueError: the shape is not of the Llama kind.
    """
    if shape.kind != "llama":
        raise ValueError(f"shape {shape.name} is of the {shape.kind} kind: choose one of the llama kind")
    config = LlamaConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab_size, max_position_embeddings=shape.max_context, rms_norm_eps=shape.norm_epsilon,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" not in name:
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1e-4 if small else 0.02))
        embedding = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator)
        embedding[:, 0] = _CONSTANT
        before = torch.arange(shape.vocab_size) - 1
        before[0], before[CYCLE] = CYCLE - 1, shape.vocab_size - 1
        head = embedding[before] * (_MATCH / shape.hidden_size)
        head[:, 0] = 0.0
        head[CYCLE:, 0] = -_APART / _CONSTANT
        model.get_input_embeddings().weight.copy_(embedding)
        model.get_output_embeddings().weight.copy_(head)
    path = folder / f"{shape.name}-chain-{seed}"
    model.to(torch.bfloat16).save_pretrained(path)
    return path
