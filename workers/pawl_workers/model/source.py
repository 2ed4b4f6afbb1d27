"""Where a checkpoint lies: turns a folder, a hub id or `demo` into a local folder, and names its revision.

Imports no torch, so that the front end can use it to find tokenizer files; reads no weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from pawl_workers.errors import CheckpointError

__all__ = ["DEMO_MODEL", "checkpoint_revision", "is_hub_id", "resolve_checkpoint", "weight_files"]

DEMO_MODEL = "demo"
"""The name of the packaged model."""

_TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHT_PATTERNS = ["*.json", "*.jinja", "model*.safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAMPLE_BYTES = 1 << 16
_MOST_SHOWN = 200  # characters of a name


def resolve_checkpoint(model: str | None, revision: str | None = None, *, tokenizer_only: bool = False) -> Path:
    """Find the local folder of a checkpoint, fetching it from the hub when it is not a folder.

    Args:
        model: a folder, a hub id such as `owner/name`, or `demo` (also None) for the packaged model.
        revision: branch, tag or commit on the hub; ignored for folders.
        tokenizer_only: fetch the configuration and tokenizer files, not the weights.

    Returns:
        The folder with `config.json` in it.

    Raises:
        CheckpointError: there is no such folder and the hub gave none either.
    """
    if model is None or model == DEMO_MODEL:
        return Path(__file__).resolve().parent.parent / "demo_model"
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json and the weights")
    if model.startswith((".", "/", "~")) or _HUB_ID.fullmatch(model) is None:
        raise CheckpointError(f"there is no folder {model}, and it is not a hub id such as owner/name")
    return _fetch(model, revision, _TOKENIZER_PATTERNS if tokenizer_only else _WEIGHT_PATTERNS)


def is_hub_id(model: str) -> bool:
    """Whether a name of a model stands for one on the hub."""
    return model != DEMO_MODEL and not Path(model).expanduser().is_dir() and _HUB_ID.fullmatch(model) is not None


def _fetch(model: str, revision: str | None, patterns: list[str]) -> Path:
    # Imported here: most starts use a local folder and should not pay for the hub client.
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - as above

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub's errors derive from these
        wanted = model if revision is None else f"{model} at {revision}"
        raise CheckpointError(
            f"could not fetch {wanted} from the hub ({type(error).__name__}: {error}); "
            "check the name and the network, or give a local folder"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint, in order.

    Raises:
        CheckpointError: there are none (such as a checkpoint of `.bin` files only), or one that the index
            names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _indexed_files(index)
        # A name is a plain file name: an index must not reach outside its folder.
        bad = [name for name in names if Path(name).name != name or not _is_file(folder / name)]
        if bad:
            shown = ", ".join(name[:_MOST_SHOWN] for name in bad)
            raise CheckpointError(f"{folder}: the index names {shown}, which is not there; fetch the missing files")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(others) == 1:
        return [folder / others[0]]
    if others:
        raise CheckpointError(f"{folder}: {len(others)} safetensors files ({', '.join(others)}) and no index")
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickled weights ({', '.join(pickles[:3])}); pawl loads safetensors only, since "
            "loading a pickle runs its code. Convert it with transformers' save_pretrained"
        )
    raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for the file system
        return False


def _indexed_files(index: Path) -> list[str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({name for name in files if isinstance(name, str)})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{index}: not an index of safetensors files ({type(error).__name__}: {error})"
        ) from error


def checkpoint_revision(folder: Path, *, dummy_weights: bool = False) -> str:
    """Name the content of a checkpoint: the hub's commit, else a SHA-256.

    The digest covers the names and sizes of the weight files, their headers and the first and last 64 KiB
    of each, and `config.json`; it reads no whole file, so a change in the middle of a file that leaves its
    header as it was is not seen.

    Args:
        folder: of the checkpoint.
        dummy_weights: its weights are not used: only `config.json` counts.

    Returns:
        A hub commit (40 hex digits) or `sha256:` and 64 hex digits; of dummy weights `dummy:` and 64 hex digits.
    """
    if dummy_weights:
        return f"dummy:{hashlib.sha256((folder / 'config.json').read_bytes()).hexdigest()}"
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), size)
            digest.update(file.read(length))
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(size - _SAMPLE_BYTES, 0))
            digest.update(file.read(_SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()}"
