"""The ready file: written in one piece when a server is ready, removed when it ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from pawl.errors import InvalidRequest
from pawl_server.serve.events import ServerAddresses

__all__ = ["remove_ready_file", "write_ready_file"]


def write_ready_file(path: str, addresses: ServerAddresses) -> None:
    """Write the addresses as JSON; an empty path = nowhere.

    Raises:
        InvalidRequest: it cannot be written.
    """
    if not path:
        return
    target = Path(path)
    half = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        half.write_bytes(msgspec.json.encode(addresses) + b"\n")
        half.replace(target)
    except OSError as error:
        raise InvalidRequest(f"cannot write the ready file {path}: {error}", reason="BAD_SETTING") from error


def remove_ready_file(path: str) -> None:
    """Remove it, if it is there; at the start too, so that nobody reads that of an earlier server."""
    if path:
        with contextlib.suppress(OSError):
            Path(path).unlink()
