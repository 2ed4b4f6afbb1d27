"""Reads what a checkpoint says of its model: `config.json` and `generation_config.json`, and whether it can be served.

Looks at no tensor. Refuses architectures, quantisations and sizes that are not supported, by the name of the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pawl_workers.errors import CheckpointError
from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families import Family, find_family
from pawl_workers.model.spec import ModelSpec

__all__ = ["CheckpointConfig", "read_config"]

_MOST_EXPERTS = 300_000  # of all layers; each has its tensors named before a checkpoint is looked at
_MOST_POSITIONS = (1 << 31) - 2  # the token after the last one has a position too


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """What `config.json` and `generation_config.json` say."""

    folder: Path
    architectures: tuple[str, ...]
    family: Family
    spec: ModelSpec
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def read_config(folder: Path) -> CheckpointConfig:
    """Read the configuration of a checkpoint.

    Raises:
        CheckpointError: no `config.json`, an unknown architecture or a value that is not supported.
    """
    values = _read_json(folder / "config.json")
    if values is None:
        raise CheckpointError(f"{folder}: no config.json; give a folder in Hugging Face format")
    name, family = find_family(values.get("architectures"))
    sections = _sections(values)
    _refuse_quantised(sections)
    spec = family.spec(ConfigReader(values))
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(
            f"config.json: {spec.num_heads} attention heads are no multiple of {spec.num_kv_heads} KV heads"
        )
    if spec.experts is not None and spec.experts.num_active > spec.experts.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok must be at most {spec.experts.num_experts}, the number of experts, "
            f"not {spec.experts.num_active}"
        )
    if spec.max_context > _MOST_POSITIONS:
        raise CheckpointError(
            f"config.json: a context of {spec.max_context} tokens is more than positions of 32 bits can name, "
            f"{_MOST_POSITIONS}; set what the model was trained for"
        )
    if spec.experts is not None and spec.num_layers * spec.experts.num_experts > _MOST_EXPERTS:
        raise CheckpointError(
            f"config.json: {spec.num_layers} layers of {spec.experts.num_experts} experts are more than "
            f"{_MOST_EXPERTS} experts in all, which no model has a tenth of"
        )
    generation = _read_json(folder / "generation_config.json") or {}
    bos = next((found["bos_token_id"] for found in sections if found.get("bos_token_id") is not None), None)
    return CheckpointConfig(
        folder=folder,
        architectures=(name,),
        family=family,
        spec=spec,
        eos_token_ids=_eos_token_ids((generation, *sections), spec.vocab_size),
        bos_token_id=bos if isinstance(bos, int) and 0 <= bos < spec.vocab_size else None,
    )


def _sections(values: Mapping[str, object]) -> list[Mapping[str, object]]:
    """A configuration and, where it has one, that of the part that makes text."""
    text = values.get("text_config")
    return [values, text] if isinstance(text, dict) else [values]


def _eos_token_ids(sections: Sequence[Mapping[str, object]], vocab_size: int) -> tuple[int, ...]:
    """What ends a text, by the first section that says so; ids that are none of the vocabulary's never come."""
    found = next((values["eos_token_id"] for values in sections if values.get("eos_token_id") is not None), [])
    listed = found if isinstance(found, list) else [found]
    ids = [i for i in listed if isinstance(i, int) and not isinstance(i, bool)]
    if len(ids) < len(listed):
        raise CheckpointError(
            f"config.json, generation_config.json: eos_token_id must be an integer or a list of them, not {found!r}"
        )
    return tuple(i for i in ids if 0 <= i < vocab_size)


def _refuse_quantised(sections: Sequence[Mapping[str, object]]) -> None:
    for values in sections:
        for key in ("quantization_config", "compression_config"):
            found = values.get(key)
            if not found:
                continue
            method = found.get("quant_method", "of no named method") if isinstance(found, dict) else found
            raise CheckpointError(
                f"config.json: {key} ({method}): quantised checkpoints are not supported; use the one it was made from "
                "(float32, bfloat16 or float16), and weight_dtype = int8 where memory is short"
            )


def _read_json(path: Path) -> Mapping[str, object] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return values
