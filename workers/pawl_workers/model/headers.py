"""Headers: which tensors a checkpoint stores, of which shape and type and where, without reading any of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pawl_workers.errors import CheckpointError
from pawl_workers.model.source import weight_files

__all__ = ["StoredTensor", "folder_headers", "hub_headers"]

_MOST_HEADER_BYTES = 1 << 27


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, as the file's header describes it. `kind` is the type's name there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    num_bytes: int


def folder_headers(folder: Path) -> list[StoredTensor]:
    """Read the headers of a checkpoint's files: file after file, in the order in which the data lies in each.

    Raises:
        CheckpointError: there are no weights, or a file is broken.
    """
    return [tensor for path in weight_files(folder) for tensor in _file_header(path)]


def hub_headers(model: str, revision: str | None) -> list[StoredTensor]:
    """Read the headers of a checkpoint on the hub, by ranges of its files: no weights are fetched.

    Raises:
        CheckpointError: the hub does not have them, or cannot be reached.
    """
    # Imported here: only models that are not on this machine need the hub.
    from huggingface_hub import get_safetensors_metadata  # noqa: PLC0415 - as above

    try:
        metadata = get_safetensors_metadata(model, revision=revision)
    except Exception as error:  # the root of the client's errors differs between its releases
        raise CheckpointError(
            f"could not read the headers of {model} on the hub ({type(error).__name__}: {error}); "
            "check the name and the network, or give a local folder"
        ) from error
    return [
        StoredTensor(Path(file), name, tuple(info.shape), info.dtype, info.data_offsets[1] - info.data_offsets[0])
        for file, content in sorted(metadata.files_metadata.items())
        for name, info in sorted(content.tensors.items(), key=lambda item: item[1].data_offsets[0])
    ]


def _file_header(path: Path) -> Iterator[StoredTensor]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < _MOST_HEADER_BYTES else None
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: not a safetensors file")
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            begin, end = entry["data_offsets"]
            yield StoredTensor(path, name, tuple(entry["shape"]), str(entry["dtype"]), end - begin)
    except (ValueError, LookupError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
