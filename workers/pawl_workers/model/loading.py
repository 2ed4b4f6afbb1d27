"""Loads a checkpoint: reads safetensors in file order and packs each linear layer as soon as it is whole.

Peak memory is the packed weights and the layers whose parts are still arriving. Refuses pickles, missing
tensors, left-over tensors, wrong shapes and models that do not fit, before or without reading them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pawl_workers.errors import CheckpointError, OutOfMemoryError
from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families import Family, find_family
from pawl_workers.model.slots import Slots, slot_shapes
from pawl_workers.model.source import weight_files
from pawl_workers.model.spec import ModelSpec, TensorTarget
from pawl_workers.model.weights import Packer, Weights

__all__ = ["CheckpointConfig", "load_weights", "read_config"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

Progress = Callable[[int, int], None]


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
    spec = family.spec(ConfigReader(values))
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(
            f"config.json: {spec.num_heads} attention heads are no multiple of {spec.num_kv_heads} KV heads"
        )
    generation = _read_json(folder / "generation_config.json") or {}
    eos = generation.get("eos_token_id", values.get("eos_token_id"))
    ids = eos if isinstance(eos, list) else [eos]
    bos = values.get("bos_token_id")
    return CheckpointConfig(
        folder=folder,
        architectures=(name,),
        family=family,
        spec=spec,
        eos_token_ids=tuple(i for i in ids if isinstance(i, int)),
        bos_token_id=bos if isinstance(bos, int) and 0 <= bos < spec.vocab_size else None,
    )


def _read_json(path: Path) -> Mapping[str, object] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return values


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    name: str
    target: TensorTarget
    shape: tuple[int, ...]
    stored_bytes: int


def load_weights(
    config: CheckpointConfig,
    packer: Packer,
    device: torch.device,
    dtype: torch.dtype,
    available_bytes: int,
    on_progress: Progress | None = None,
) -> Weights:
    """Load and pack all weights.

    Args:
        config: of the checkpoint.
        packer: the kernel backend.
        device: where the weights go.
        dtype: what they are converted to.
        available_bytes: memory the packed weights may take.
        on_progress: called with (bytes read, bytes to read) after each tensor.

    Raises:
        CheckpointError: tensors are missing, left over, or of the wrong shape or type.
        OutOfMemoryError: the weights need more than `available_bytes`.
    """
    spec = config.spec
    shapes = slot_shapes(spec)
    entries = _plan_reading(config, shapes)
    element_bytes = torch.empty(0, dtype=dtype).element_size()
    needed = sum(math.prod(entry.shape) for entry in entries) * element_bytes
    if spec.tied_head:  # the head is packed; the embedding stays as it is for look-ups
        needed += spec.vocab_size * spec.hidden_size * element_bytes
    if needed > available_bytes:
        raise OutOfMemoryError(
            f"{config.folder}: the weights need {needed / 1e9:.2f} GB as {dtype}, "
            f"{available_bytes / 1e9:.2f} GB is available on {device}"
        )
    slots = Slots({entry.target.slot: shapes[entry.target.slot] for entry in entries}, packer, device, dtype)
    total = sum(entry.stored_bytes for entry in entries)
    done = 0
    for entry, tensor in _read(entries):
        slots.put(entry.target, tensor)
        done += entry.stored_bytes
        if on_progress is not None:
            on_progress(done, total)
    num_parameters = sum(math.prod(entry.shape) for entry in entries)
    return slots.assemble(spec, num_parameters)


def _plan_reading(config: CheckpointConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[_Entry]:
    names = config.family.names(config.spec)
    prefix, ignored = config.family.prefix, config.family.ignored
    entries: list[_Entry] = []
    left_over: list[str] = []
    for path in weight_files(config.folder):
        for stored, shape, kind, num_bytes in _read_header(path):
            name = stored if stored in names else prefix + stored
            if name in names:
                if kind not in _DTYPES:
                    raise CheckpointError(f"{path.name}: {stored} is stored as {kind}, known: {', '.join(_DTYPES)}")
                target = names[name]
                wanted = _part_shape(shapes[target.slot], target)
                if shape != wanted:
                    raise CheckpointError(f"{path.name}: {stored} has shape {shape}, config.json wants {wanted}")
                entries.append(_Entry(path, stored, target, shape, num_bytes))
            elif not (stored.endswith(ignored) or (config.spec.tied_head and stored == "lm_head.weight")):
                left_over.append(stored)
    found = {(entry.target.slot, entry.target.row) for entry in entries}
    missing = [name for name, target in names.items() if (target.slot, target.row) not in found]
    for problem, listed in (("missing", missing), ("not known", left_over)):
        if listed:
            more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
            raise CheckpointError(
                f"{config.folder}: {len(listed)} tensors are {problem}: {', '.join(listed[:5])}{more}"
            )
    if len(found) < len(entries):
        raise CheckpointError(f"{config.folder}: a tensor is stored twice")
    return entries


def _read_header(path: Path) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """Read names, shapes, types and sizes, in the order in which the data lies in the file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < 1 << 27 else None
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: not a safetensors file")
        header.pop("__metadata__", None)
        tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        for name, entry in tensors:
            begin, end = entry["data_offsets"]
            yield name, tuple(entry["shape"]), entry["dtype"], end - begin
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error


def _read(entries: list[_Entry]) -> Iterator[tuple[_Entry, Tensor]]:
    for path in dict.fromkeys(entry.file for entry in entries):
        try:
            with safe_open(path, framework="pt") as file:
                for entry in entries:
                    if entry.file == path:
                        yield entry, file.get_tensor(entry.name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _part_shape(whole: tuple[int, ...], target: TensorTarget) -> tuple[int, ...]:
    part = (target.num_rows or whole[0], *whole[1:])
    return part[::-1] if target.transposed else part
