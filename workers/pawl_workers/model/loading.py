"""Loads a checkpoint: reads safetensors in file order and packs each linear layer as soon as it is whole.

Peak memory is the packed weights, one tensor, and merged layers that wait for a part in the next file. Refuses
pickles, missing tensors, left-over tensors, wrong shapes and models that do not fit, before or without reading them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pawl_workers.errors import CheckpointError, OutOfMemoryError
from pawl_workers.model.checkpoint_config import CheckpointConfig
from pawl_workers.model.dummy import DUMMY_FILE, dummy_tensor
from pawl_workers.model.headers import StoredTensor, folder_headers
from pawl_workers.model.packed import Packer
from pawl_workers.model.slots import Slot, Slots, held_bytes, slot_shapes
from pawl_workers.model.spec import TensorTarget
from pawl_workers.model.weights import Weights

__all__ = ["Reading", "load_weights", "plan_dummy", "plan_reading"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Entry:
    stored: StoredTensor
    target: TensorTarget


@dataclass(frozen=True, slots=True)
class Reading:
    """What will be read and where it goes: every stored tensor, in the order of the files, and the slots it fills."""

    entries: tuple[_Entry, ...]
    slots: Mapping[str, Slot]

    @property
    def num_parameters(self) -> int:
        """Numbers that are read."""
        return sum(math.prod(entry.stored.shape) for entry in self.entries)

    @property
    def stored_bytes(self) -> int:
        """Bytes that are read."""
        return sum(entry.stored.num_bytes for entry in self.entries)

    @property
    def stored_dtypes(self) -> tuple[str, ...]:
        """Types that are read, the one of most bytes first."""
        sizes: dict[str, int] = {}
        for entry in self.entries:
            name = str(_DTYPES[entry.stored.kind]).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + entry.stored.num_bytes
        return tuple(sorted(sizes, key=lambda name: -sizes[name]))

    def held_bytes(self, packer: Packer, dtype: torch.dtype) -> int:
        """Bytes that the packed weights will take: exact for 16-bit weights, else the most."""
        return held_bytes(self.slots, packer, dtype)


def plan_reading(config: CheckpointConfig, stored: Sequence[StoredTensor]) -> Reading:
    """Match what is stored with what the model needs.

    Raises:
        CheckpointError: tensors are missing, left over, stored twice, or of the wrong shape or type.
    """
    shapes = slot_shapes(config.spec)
    names = _names(config, {tensor.name for tensor in stored})
    prefix, ignored, other_parts = config.family.prefix, config.family.ignored, config.family.other_parts
    entries: list[_Entry] = []
    left_over: list[str] = []
    for tensor in stored:
        name = tensor.name if tensor.name in names else prefix + tensor.name
        if name in names:
            target = names[name]
            _check(tensor, _part_shape(shapes[target.slot], target))
            entries.append(_Entry(tensor, target))
        elif tensor.name.startswith(other_parts):
            continue
        elif not tensor.name.endswith(ignored):
            left_over.append(tensor.name)
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
    return Reading(tuple(entries), _slots(entries, shapes))


def _names(config: CheckpointConfig, stored: Set[str]) -> Mapping[str, TensorTarget]:
    """What is to be read; of a tied head, too, where it is stored: it need not be the embedding, whatever is said."""
    untied = config.family.names(replace(config.spec, tied_head=False))
    if any(target.slot == "head.weight" and name in stored for name, target in untied.items()):
        return untied
    return config.family.names(config.spec)


def plan_dummy(config: CheckpointConfig, kind: str = "BF16") -> Reading:
    """Plan to make every tensor that the model needs, of one type, instead of reading them; the folder needs none."""
    shapes, num_bytes = slot_shapes(config.spec), _DTYPES[kind].itemsize
    entries = []
    for name, target in config.family.names(config.spec).items():
        shape = _part_shape(shapes[target.slot], target)
        entries.append(_Entry(StoredTensor(DUMMY_FILE, name, shape, kind, math.prod(shape) * num_bytes), target))
    return Reading(tuple(entries), _slots(entries, shapes))


def _check(tensor: StoredTensor, wanted: tuple[int, ...]) -> None:
    where = f"{tensor.file.name}: {tensor.name}"
    if tensor.kind not in _DTYPES:
        raise CheckpointError(f"{where} is stored as {tensor.kind}, known: {', '.join(_DTYPES)}")
    if tensor.shape != wanted:
        raise CheckpointError(f"{where} has shape {tensor.shape}, config.json wants {wanted}")


def _slots(entries: Sequence[_Entry], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """The slots, each of a type that holds all of its parts."""
    slots: dict[str, Slot] = {}
    for entry in entries:
        name, kind = entry.target.slot, _DTYPES[entry.stored.kind]
        before = slots.get(name)
        slots[name] = Slot(shapes[name], kind if before is None else torch.promote_types(before.stored, kind))
    return slots


def load_weights(
    config: CheckpointConfig,
    packer: Packer,
    device: torch.device,
    dtype: torch.dtype,
    available_bytes: int,
    on_progress: Progress | None = None,
    *,
    reading: Reading | None = None,
) -> Weights:
    """Load and pack all weights.

    Args:
        config: of the checkpoint.
        packer: the kernel backend.
        device: where the weights go.
        dtype: the model's type.
        available_bytes: memory the packed weights may take.
        on_progress: called with (bytes read, bytes to read) after each tensor.
        reading: of this checkpoint, if it is planned already.

    Raises:
        CheckpointError: tensors are missing, left over, or of the wrong shape or type.
        OutOfMemoryError: the weights need more than `available_bytes`.
    """
    if reading is None:
        reading = plan_reading(config, folder_headers(config.folder))
    needed = reading.held_bytes(packer, dtype)
    if needed > available_bytes:
        raise OutOfMemoryError(
            f"{config.folder}: the weights need {needed / 1e9:.2f} GB as {dtype}, "
            f"{available_bytes / 1e9:.2f} GB is available on {device}"
        )
    slots = Slots(reading.slots, packer, device, dtype)
    done, total = 0, reading.stored_bytes
    for entry, tensor in _read(reading.entries):
        slots.put(entry.target, tensor)
        done += entry.stored.num_bytes
        if on_progress is not None:
            on_progress(done, total)
    return slots.assemble(config.spec, reading.num_parameters)


def _read(entries: Sequence[_Entry]) -> Iterator[tuple[_Entry, Tensor]]:
    for path in dict.fromkeys(entry.stored.file for entry in entries):
        if path == DUMMY_FILE:
            yield from ((e, dummy_tensor(e.stored, _DTYPES[e.stored.kind], i)) for i, e in enumerate(entries))
            continue
        try:
            with safe_open(path, framework="pt") as file:
                for entry in entries:
                    if entry.stored.file == path:
                        yield entry, file.get_tensor(entry.stored.name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _part_shape(whole: tuple[int, ...], target: TensorTarget) -> tuple[int, ...]:
    part = (target.num_rows or whole[0], *whole[1:])
    return part[::-1] if target.transposed else part
